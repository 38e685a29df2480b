"""Whole scoring of groups of completions, part by part, against Hugging Face on the same texts.

python -m pytest bench/bench_score.py          pytest-benchmark's table, a small model
python bench/bench_score.py [--layers 24 ...]  in turns, ratios printed

A sequence classifier of Qwen2.5-0.5B's shape with random weights scores G completions of about C
tokens behind each of some prompts of P. Hugging Face runs them right-padded in one batch, in bf16
and in float32. Ours adds one part at a time: unpadded (prompts repeated, all tokens in the last
layer), shared prompt, last layer (the pooled tokens alone), int8.
"""

import argparse
import json
import time
from pathlib import Path

import pytest
import torch
from measure import machine, take_turns
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from fastrl.reward import Checkpoint, QuantizedRewardModel
from fastrl.reward.pairs import Pair, pack

SHAPES = [(128, 128, 8), (512, 256, 1), (512, 256, 4), (512, 256, 8), (512, 256, 16)]  # P, C, G
ALL = 1 << 30  # tokens: one batch


def build(layers, vocabulary=4096):
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        num_labels=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2ForSequenceClassification(config).eval()


def draw(prompt, completion, group, spread, prompts=1):
    """Pairs of `prompts` groups; lengths of completions differ by up to `spread` either way."""
    g = torch.Generator().manual_seed(0)

    def ids(n):
        return tuple(torch.randint(1, 4096, (n,), generator=g).tolist())

    out = []
    for _ in range(prompts):
        shared = ids(prompt)
        for factor in torch.rand(group, generator=g).mul(2).sub(1).mul(spread).add(1).tolist():
            out.append(Pair(shared, ids(max(1, round(completion * factor)))))
    return out


@torch.inference_mode()
def hugging_face(model, pairs):
    rows = [torch.tensor(p.prompt + p.completion) for p in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return model(ids, attention_mask=ids != 0).logits[:, 0].float()


@torch.no_grad()
def ours(model, pairs, *, share_prompts=True, last_layer="pooled"):
    out = torch.empty(len(pairs))
    for rows, batch in pack(pairs, ALL, share_prompts=share_prompts):
        out[rows] = model.run(batch, last_layer=last_layer)[:, 0]
    return out


def variants(model, dtype):
    """Name -> scores of pairs, in the order in which parts are added."""
    checkpoint = Checkpoint.of(model)
    plain, int8 = (QuantizedRewardModel.from_pretrained(checkpoint, s) for s in (dtype, "int8"))
    half = Qwen2ForSequenceClassification(model.config).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    apart = {"share_prompts": False, "last_layer": "all"}
    return {
        "hf float32": lambda pairs: hugging_face(model, pairs),
        "hf bf16": lambda pairs: hugging_face(half, pairs),
        "unpadded": lambda pairs: ours(plain, pairs, **apart),
        "+ shared prompt": lambda pairs: ours(plain, pairs, last_layer="all"),
        "+ last layer": lambda pairs: ours(plain, pairs),
        "+ int8": lambda pairs: ours(int8, pairs),
    }


def check(calls, pairs):
    """The gate before any timing: all score alike, to what their dtypes round."""
    want = calls["hf float32"](pairs)
    for name, call in calls.items():
        error = ((call(pairs) - want).square().mean().sqrt() / want.abs().max()).item()
        assert error < 0.1, f"{name} is {error:.3f} of the largest score away"


@pytest.mark.parametrize("name", ["hf float32", "unpadded", "+ last layer", "+ int8"])
def test_score(benchmark, name):
    calls, pairs = variants(build(2), "float32"), draw(32, 16, 4, 0.5)
    check(calls, pairs)
    benchmark.pedantic(calls[name], args=(pairs,), rounds=3, iterations=1, warmup_rounds=1)


def compare(calls, pairs, rounds):
    def timed(call):
        def run():
            start = time.perf_counter()
            call(pairs)
            return time.perf_counter() - start

        return run

    return take_turns({n: timed(c) for n, c in calls.items()}, 0, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="of the 24 that the model has")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bf16"), help="our parts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spread", type=float, nargs="*", default=[0.0, 0.5])
    parser.add_argument("--shape", type=int, nargs=3, metavar=("P", "C", "G"), help="only this one")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    calls = variants(build(options.layers), options.dtype)
    check(calls, draw(64, 32, 4, 0.5))
    report = {"machine": machine(), "layers": options.layers, "dtype": options.dtype, "shapes": {}}
    for p, c, g in [tuple(options.shape)] if options.shape else SHAPES:
        for spread in options.spread:
            figures = compare(calls, draw(p, c, g, spread), options.rounds)
            base = figures["hf float32"]["median"]
            report["shapes"][f"P{p}-C{c}-G{g}-spread{spread}"] = figures
            parts = [
                f"{n} {f['median']:.2f} s ({base / f['median']:.2f}x)" for n, f in figures.items()
            ]
            print(f"P={p} C={c} G={g} spread {spread}: " + ", ".join(parts), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
