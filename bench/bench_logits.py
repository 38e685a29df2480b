"""logprob_from_logits against eager PyTorch and TRL's selective_log_softmax.

python -m pytest bench/bench_logits.py       pytest-benchmark's table, one case at a time
python bench/bench_logits.py [--rounds N]    variants interleaved round by round, ratios printed

The floor is memory: the logits read once forward, and read and a gradient written once backward.
"""

import argparse
import statistics
import time

import pytest
import torch

from fastrl.kernels import logprob_from_logits

SHAPES = [
    ((64, 8, 32000), "float32"),
    ((64, 8, 32000), "bfloat16"),
    ((1024, 151936), "float32"),
    ((2048, 151936), "bfloat16"),
]


def ours(logits, target):
    return logprob_from_logits(logits, target, impl="cpu").logprob


def inplace(logits, target):
    return logprob_from_logits(logits, target, inplace_backward=True, impl="cpu").logprob


def eager(logits, target):
    return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def trl(logits, target):
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, target)


VARIANTS = {"ours": ours, "ours, in place": inplace, "eager": eager, "trl": trl}


def draw(shape, dtype):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=g, dtype=getattr(torch, dtype))
    return logits, torch.randint(shape[-1], shape[:-1], generator=g)


def check(name, logits, target):
    """The gate before any timing: a wrong kernel has no speed."""
    got = VARIANTS[name](logits[:2], target[:2]).double()
    want = eager(logits[:2].double(), target[:2])
    limit = 1e-4 if name.startswith("ours") or logits.dtype == torch.float32 else 0.1
    assert (got - want).abs().max() < limit, f"{name} is wrong"


def once(name, logits, target):
    """Seconds of the forward and of the backward, on logits that may be overwritten."""
    x = (logits.clone() if name == "ours, in place" else logits.detach()).requires_grad_()
    start = time.perf_counter()
    out = VARIANTS[name](x, target)
    middle = time.perf_counter()
    torch.autograd.grad(out.sum(), x)
    return middle - start, time.perf_counter() - middle


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_logprob_from_logits(benchmark, name, shape):
    inputs = draw(*shape)
    check(name, *inputs)
    benchmark.pedantic(once, args=(name, *inputs), rounds=3, warmup_rounds=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    for shape in SHAPES:
        inputs, times = draw(*shape), {name: [] for name in VARIANTS}
        for name in VARIANTS:
            check(name, *inputs)
            once(name, *inputs)
        for _ in range(rounds):
            for name in VARIANTS:
                times[name].append(once(name, *inputs))
        print(*shape)
        medians = {
            name: (statistics.median(f for f, _ in t), statistics.median(f + b for f, b in t))
            for name, t in times.items()
        }
        ours_forward, ours_both = medians["ours"]
        for name, (forward, both) in medians.items():
            print(
                f"  {name:16s} forward {forward * 1e3:9.2f} ms ({forward / ours_forward:.2f}x)"
                f"   both {both * 1e3:9.2f} ms ({both / ours_both:.2f}x)"
            )


if __name__ == "__main__":
    main()
