"""One GRPO step of this trainer against TRL's GRPOTrainer: same model, data and settings, one run.

Qwen3 of 0.8M parameters, 128 completions (16 prompts x 8) of up to 32 tokens, float32. The two take
turns, a step each; the loss of a fixed batch agrees to 1e-5 before anything is timed.
"""

import statistics
import time

import pytest
import torch

from fastrl import losses, train
from fastrl.models import completion_logprobs, load_model
from fastrl.train import loop
from fastrl.train.algorithms import Context
from fastrl.train.checkpoints import Progress
from fastrl.train.optimizer import Optimizer

STEPS, WARM_UP = 12, 2
PROMPTS, GROUP, TOKENS = 16, 8, 32
RECIPE = {
    "name": "bench",
    "model": {
        "alphabet": "0123456789+-= ",
        "architecture": {"hidden_size": 128, "num_layers": 4, "intermediate_size": 384},
    },
    "data": {
        "reasoning_gym": {
            "task": "chain_sum",
            "options": {"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 2},
            "prompt": "{expression}=",
            "size": 512,
            "eval_size": 0,
        }
    },
    "rewards": [{"function": "bench_trainer:digits"}],
    "max_completion_length": TOKENS,
    "stages": {
        "grpo": {
            "steps": 1000,
            "prompts_per_step": PROMPTS,
            "group_size": GROUP,
            "micro_batch_size": PROMPTS * GROUP,
            "eval_every": 1000,
            "optimizer": {"lr": 1e-4},
        }
    },
}


def digits(prompts, completions, **_):
    """A reward that differs within every group, so that no row of the batch is idle."""
    return [c.count("3") + 0.1 * c.count("7") + 0.01 * len(c) for c in completions]


def test_loss_of_a_fixed_batch(trl_trainer):
    """The same batch through TRL's loss and ours, to 1e-5."""
    model = trl_trainer.model
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 17, (PROMPTS * GROUP, TOKENS), generator=g)
    mask = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (len(ids), 1), generator=g)
    prompts = torch.randint(3, 17, (len(ids), 9), generator=g)
    advantages = torch.randn(len(ids), generator=g)
    with torch.no_grad():
        logprobs = completion_logprobs(model, prompts.tolist(), ids, mask).logprob
    old = logprobs + 0.1 * torch.randn(logprobs.shape, generator=g)
    trl_trainer.current_gradient_accumulation_steps = 1
    theirs = trl_trainer._compute_loss(
        model,
        {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": ids,
            "completion_mask": mask.long(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "num_items_in_batch": mask.sum(),
        },
    ).item()
    weights = losses.token_weights(mask, "dapo")
    ours = losses.policy_loss(logprobs, old, advantages, mask, weights)[0].item()
    print(f"\nloss of one fixed batch: ours {ours:.8f}, TRL {theirs:.8f}")
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.fixture(scope="module")
def setup():
    torch.manual_seed(0)
    return loop.prepare(train.parse_config(RECIPE))


@pytest.fixture(scope="module")
def trl_trainer(setup, tmp_path_factory):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("trl")
    setup.policy.save_pretrained(folder / "model")
    args = trl.GRPOConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        num_generations=GROUP,
        per_device_train_batch_size=PROMPTS * GROUP,
        max_completion_length=TOKENS,
        learning_rate=1e-4,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    return trl.GRPOTrainer(
        load_model(str(folder / "model")),
        reward_funcs=lambda prompts, completions, **_: digits(prompts, completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": e.prompt} for e in setup.train]),
        processing_class=setup.tokenizer,
    )


def test_grpo_step(benchmark, setup, trl_trainer, tmp_path):
    """Times of one step, taken in turns inside TRL's own training loop."""
    from transformers import TrainerCallback

    stage = setup.config.stages["grpo"]
    optimizers = {"policy": Optimizer(setup.policy, stage.optimizer, stage.steps)}
    work = loop.Work(Context(setup, stage, seed=0), optimizers)
    progress = Progress(stage="grpo")
    ours: list[float] = []
    theirs: list[float] = []

    class Silent:
        def log(self, *_):
            pass

    def our_step():
        nonlocal progress
        start = time.perf_counter()
        progress = loop._step(work, progress, Silent(), tmp_path)
        ours.append(time.perf_counter() - start)

    class Turns(TrainerCallback):
        # The rollouts of step n + 1 are made before on_step_begin, so a step lasts from end to end.
        start = time.perf_counter()

        def on_step_end(self, *_, **__):
            theirs.append(time.perf_counter() - self.start)
            our_step()
            self.start = time.perf_counter()

    trl_trainer.add_callback(Turns())
    benchmark.pedantic(trl_trainer.train, rounds=1)
    print("\nours", [round(t, 2) for t in ours], "\nTRL ", [round(t, 2) for t in theirs])
    mine, trl = (statistics.median(t[WARM_UP:]) for t in (ours, theirs))
    tokens = PROMPTS * GROUP * TOKENS
    benchmark.extra_info |= {
        "ours_ms": 1e3 * mine,
        "trl_ms": 1e3 * trl,
        "ratio": trl / mine,
        "parameters": sum(p.numel() for p in setup.policy.parameters()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(
        f"\nGRPO step, up to {tokens} tokens: ours {1e3 * mine:.0f} ms, TRL {1e3 * trl:.0f} ms, "
        f"ratio {trl / mine:.2f}"
    )
