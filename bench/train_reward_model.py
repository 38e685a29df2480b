"""Train the small reward model that bench_fidelity.py judges quantization on.

python -m fastrl.bench.train_reward_model runs/reward-model [--steps 1200 ...]

A character-level Qwen3 sequence classifier learns to rank answers to reasoning-gym's task
`spell_backward`, whose verifier grades an answer by the share of letters that are right. Groups of
answers are made by damaging the right one; the loss is Bradley-Terry's over all pairs of a group
that the verifier ranks, `-log sigmoid(r_better - r_worse)` (1706.03741). The folder gets the model,
its tokenizer, and `held_out.jsonl`: groups of words it has not seen, with the verifier's grades.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from fastrl.models import character_tokenizer
from fastrl.reward.reasoning_gym import make_problems, verifier

TASK, TEMPLATE = "spell_backward", "{word} > "
LETTERS = "abcdefghijklmnopqrstuvwxyz"
GROUP = 8


def damaged(answer: str, draw: random.Random) -> str:
    """The answer after none to four small accidents."""
    letters = list(answer)
    for _ in range(draw.randint(0, 4)):
        i = draw.randrange(len(letters))
        kind = draw.random()
        if kind < 0.6:
            letters[i] = draw.choice(LETTERS)
        elif kind < 0.8:
            j = draw.randrange(len(letters))
            letters[i], letters[j] = letters[j], letters[i]
        elif kind < 0.9 and len(letters) > 2:
            letters.pop()
        else:
            letters.append(draw.choice(LETTERS))
    return "".join(letters)


def groups(problems, draw: random.Random, score) -> list[dict]:
    """For each problem GROUP different answers and their grades."""
    out = []
    for p in problems:
        answer = p["completion"].lower()
        answers = {answer: None}
        while len(answers) < GROUP:
            answers[damaged(answer, draw)] = None
        texts = draw.sample(list(answers), GROUP)
        prompt = p["prompt"].lower()
        grades = score([prompt] * GROUP, texts, entry=[p["entry"]] * GROUP)
        out.append({"prompt": prompt, "completions": texts, "grades": grades})
    return out


def padded(tokenizer, some: list[dict]) -> torch.Tensor:
    texts = [g["prompt"] + c for g in some for c in g["completions"]]
    return tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]


def bradley_terry(scores: torch.Tensor, grades: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss over ranked pairs of each group `[N, G]`, and the share that is ranked rightly."""
    better = grades[:, :, None] > grades[:, None, :] + 1e-6
    margin = (scores[:, :, None] - scores[:, None, :])[better]
    return F.softplus(-margin).mean(), (margin > 0).float().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16, help="groups per step")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    draw = random.Random(options.seed)
    tokenizer = character_tokenizer(LETTERS + " '-.>")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=options.hidden // 4,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForSequenceClassification(config)
    train, held_out = make_problems(TASK, {}, 20_000, 200, options.seed, TEMPLATE)
    score = verifier(TASK, {})
    test = groups(held_out, random.Random(1), score)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    warm = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 1 - 0.95 * s / options.steps)
    )
    start = time.perf_counter()
    for step in range(options.steps):
        some = groups(draw.sample(train, options.batch), draw, score)
        scores = model(padded(tokenizer, some)).logits.view(-1, GROUP)
        loss, right = bradley_terry(scores, torch.tensor([g["grades"] for g in some]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == options.steps - 1:
            with torch.no_grad():
                held = model(padded(tokenizer, test)).logits.view(-1, GROUP)
            _, accuracy = bradley_terry(held, torch.tensor([g["grades"] for g in test]))
            print(
                f"step {step}: loss {loss.item():.3f}, pairs ranked rightly {right.item():.3f}, "
                f"held out {accuracy.item():.3f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    lines = (json.dumps(g) + "\n" for g in test)
    (options.out / "held_out.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
