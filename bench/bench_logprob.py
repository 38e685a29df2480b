"""linear_logprob against eager PyTorch, torch.compile and the fused losses of others.

python -m pytest bench/bench_logprob.py      pytest-benchmark's table, one case at a time
python bench/bench_logprob.py [--json FILE]  variants interleaved round by round, ratios printed

Forward and backward with the gradient of a sum over tokens. The arithmetic floor is 2 N H V
operations forward and 8 N H V in all (the backward computes the logits again).
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastrl.kernels import linear_logprob, native

# Tokens, width, vocabulary, dtype.
SHAPES = [
    (16, 896, 151936, "bfloat16"),
    (2048, 896, 151936, "bfloat16"),
    (1024, 896, 151936, "float32"),
    (2048, 2048, 32000, "bfloat16"),
    (512, 128, 17, "float32"),
]


def ours(hidden, weight, target):
    return linear_logprob(hidden, weight, target, impl="cpu").logprob


def eager(hidden, weight, target):
    logits = F.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def torch_linear_cross_entropy(hidden, weight, target):
    return -F.linear_cross_entropy(hidden, weight, target, reduction="sum").unsqueeze(0)


def cce(hidden, weight, target):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, target, reduction="none", impl="torch_compile")


def trl_chunked(hidden, weight, target):
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 8192, None, 1.0, ())[0]


def variants():
    """Name to function; only what is installed here."""
    found = {"eager": eager, "compile": torch.compile(eager)}
    if native.unavailable("cpu", torch.device("cpu")) is None:
        found = {"ours": ours, **found}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = torch_linear_cross_entropy
    for name, package, function in (("cce", "cut_cross_entropy", cce), ("trl", "trl", trl_chunked)):
        try:
            __import__(package)
            found[name] = function
        except ImportError:
            print(f"{name} is not installed: pip install 'fastrl[bench]'")
    return found


def draw(n, h, v, dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(v, h, generator=g) / h**0.5).to(hidden.dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=g)


def check(name, function, hidden, weight, target):
    """The gate before any timing: a wrong kernel has no speed."""
    with torch.no_grad():
        few = slice(0, 4)
        want = linear_logprob(hidden[few].double(), weight.double(), target[few]).logprob
        got = function(hidden[few], weight, target[few]).double()
    limit = 1e-4 if hidden.dtype == torch.float32 else 0.1
    error = (got.sum() - want.sum()).abs().item()
    assert error < limit, f"{name} is off by {error}"


def once(function, hidden, weight, target):
    """Seconds of the forward and of the backward."""
    start = time.perf_counter()
    out = function(hidden, weight, target)
    middle = time.perf_counter()
    torch.autograd.grad(out.sum(), (hidden, weight))
    return middle - start, time.perf_counter() - middle


@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[-1:], ids=str)
@pytest.mark.parametrize("name", variants())
def test_linear_logprob(benchmark, name, shape):
    inputs = draw(*shape)
    check(name, variants()[name], *inputs)
    benchmark.pedantic(once, args=(variants()[name], *inputs), rounds=3, warmup_rounds=1)


def compare(shape, rounds):
    """Medians of forward and of both, each variant in turn in every round."""
    inputs = draw(*shape)
    functions = variants()
    failed = {}
    for name, function in list(functions.items()):
        try:
            check(name, function, *inputs)
            once(function, *inputs)
        except Exception as error:  # a peer that cannot do this shape is reported, not hidden
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            del functions[name]
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(once(function, *inputs))
    medians = {
        name: {
            "forward": statistics.median(f for f, _ in t),
            "both": statistics.median(f + b for f, b in t),
        }
        for name, t in times.items()
    }
    return medians, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    report = {
        "machine": platform.processor() or platform.machine(),
        "isa": native.module().isa() if not native.why_missing else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shapes": {},
    }
    for shape in SHAPES:
        medians, failed = compare(shape, options.rounds)
        report["shapes"]["x".join(map(str, shape))] = {"seconds": medians, "failed": failed}
        n, h, v, dtype = shape
        print(f"N={n} H={h} V={v} {dtype}")
        for name, t in medians.items():
            base = medians.get("ours", medians["eager"])
            rate = 2e-9 * n * h * v / t["forward"]
            forward, both = t["forward"], t["both"]
            print(
                f"  {name:24s} forward {forward * 1e3:9.2f} ms ({forward / base['forward']:.2f}x, "
                f"{rate:.0f} GFLOP/s)   both {both * 1e3:9.2f} ms ({both / base['both']:.2f}x)"
            )
        for name, why in failed.items():
            print(f"  {name:24s} failed: {why}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
