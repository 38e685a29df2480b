"""Training on a group with its prompt computed once, against the batch that repeats it.

python -m pytest bench/bench_shared_prefix.py            pytest-benchmark's table, a small model
python bench/bench_shared_prefix.py [--layers 24 ...]    in turns, ratios printed, peak memory

Log-probs of G completions of C tokens behind a prompt of P, forward and backward, through a model
of Qwen2.5-0.5B's shape with random weights: `group_logprobs` against `completion_logprobs` with the
model's own sdpa attention. The vocabulary shrinks with the layers, so that the lm-head, which costs
both the same, keeps the share it has in the whole model. The bar is the ratio of tokens that go
through the layers, G(P + C) / (P + GC).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastrl.models import completion_logprobs, group_logprobs

SHAPES = [(512, 128, 8), (64, 32, 8), (1024, 256, 4)]  # P, C, G
LAYERS, VOCABULARY = 24, 151936


def build(layers, dtype):
    config = Qwen2Config(
        vocab_size=max(64, VOCABULARY * layers // LAYERS),
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(getattr(torch, dtype)).train()


def draw(model, prompt, completion, group):
    g = torch.Generator().manual_seed(0)
    top = model.config.vocab_size
    one = torch.randint(top, (prompt,), generator=g).tolist()
    ids = torch.randint(top, (group, completion), generator=g)
    return [one] * group, ids, torch.ones_like(ids, dtype=torch.bool)


VARIANTS = {
    "shared": lambda model, batch: group_logprobs(model, batch),
    "replicated": lambda model, batch: completion_logprobs(model, *batch),
}


def step(name, model, batch):
    """Seconds of a forward and a backward, and the log-probs."""
    model.zero_grad(set_to_none=False)
    start = time.perf_counter()
    logprob = VARIANTS[name](model, batch).logprob
    logprob.sum().backward()
    return time.perf_counter() - start, logprob.detach()


def check(model, batch):
    """The gate before any timing: the same log-probs, to what the dtype rounds."""
    got, want = (step(name, model, batch)[1] for name in VARIANTS)
    error = (got - want).abs().max().item()
    allowed = 1e-3 if model.dtype == torch.float32 else 0.1
    assert error < allowed, f"the two are apart by {error}"


def high_water(reset=False):
    """Peak resident memory of this process in MB; Linux's own counter."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024


def peak(name, layers, dtype, shape):
    """MB that a step adds to model and gradients, printed by a process of its own."""
    model = build(layers, dtype)
    step(name, model, draw(model, 2, 2, 2))  # gradients exist from here on
    before = high_water(reset=True)
    step(name, model, draw(model, *shape))
    print(high_water() - before)


def peak_of_child(name, layers, dtype, shape):
    command = [sys.executable, __file__, "--peak", name, "--layers", str(layers)]
    command += ["--dtype", dtype, "--shape", *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize("name", VARIANTS)
def test_group(benchmark, name):
    model = build(1, "float32")
    batch = draw(model, 64, 32, 8)
    check(model, batch)
    benchmark.pedantic(step, args=(name, model, batch), rounds=5, iterations=1, warmup_rounds=1)


def compare(model, shape, rounds):
    """Times of each variant, taken in turns."""
    batch = draw(model, *shape)
    check(model, batch)
    times = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name in VARIANTS:
            times[name].append(step(name, model, batch)[0])
    return {n: {"median": statistics.median(t), "best": min(t)} for n, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=5, help="for each shape")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("P", "C", "G"), help="only this one")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return peak(options.peak, options.layers, options.dtype, options.shape)
    report = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "layers": options.layers,
        "dtype": options.dtype,
        "shapes": {},
    }
    model = build(options.layers, options.dtype)
    for shape in [tuple(options.shape)] if options.shape else SHAPES:
        p, c, g = shape
        tokens = g * (p + c) / (p + g * c)
        figures = compare(model, shape, options.rounds)
        for name, figure in figures.items():
            figure["peak_mb"] = peak_of_child(name, options.layers, options.dtype, shape)
        ours, theirs = figures["shared"], figures["replicated"]
        ratio = theirs["median"] / ours["median"]
        report["shapes"][f"P{p}-C{c}-G{g}"] = figures | {"tokens": tokens, "ratio": ratio}
        print(
            f"P={p} C={c} G={g}: {ours['median']:.2f} s against {theirs['median']:.2f} s: "
            f"{ratio:.2f}x of {tokens:.2f}x in tokens ({100 * ratio / tokens:.0f}%); best of each "
            f"{theirs['best'] / ours['best']:.2f}x; peak +{ours['peak_mb']:.0f} MB against "
            f"+{theirs['peak_mb']:.0f} MB ({theirs['peak_mb'] / ours['peak_mb']:.2f}x)",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
