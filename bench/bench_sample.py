"""linear_sample against linear_logprob's forward and eager PyTorch.

python -m pytest bench/bench_sample.py       pytest-benchmark's table, one case at a time
python bench/bench_sample.py [--rounds N]    variants interleaved round by round, ratios printed

The floor is linear_logprob's forward of as many tokens: the same product, the same statistics.
"""

import argparse
import statistics
import time

import pytest
import torch

from fastrl.kernels import linear_logprob, linear_sample

# Rows, width, vocabulary, dtype.
SHAPES = [
    (1, 896, 151936, "bfloat16"),
    (16, 896, 151936, "bfloat16"),
    (16, 896, 151936, "float32"),
    (256, 896, 151936, "bfloat16"),
]
SETTINGS = {
    "sample": {},
    "greedy": {"temperature": 0.0},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "all three": {"top_k": 100, "top_p": 0.9, "min_p": 0.05},
}


def draw(n, h, v, dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).to(getattr(torch, dtype))
    weight = (2 * torch.randn(v, h, generator=g) / h**0.5).to(hidden.dtype)
    return hidden, weight


def eager(hidden, weight):
    return torch.multinomial(torch.softmax((hidden @ weight.T).float(), -1), 1)


def eager_top_k(hidden, weight):
    values, index = (hidden @ weight.T).float().topk(50)
    return index.gather(1, torch.multinomial(torch.softmax(values, -1), 1))


def eager_top_p(hidden, weight):
    values, index = (hidden @ weight.T).float().sort(descending=True)
    p = values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= 0.9, 0.0)
    return index.gather(1, torch.multinomial(p, 1))


def variants():
    """Name to function; the first is the floor."""

    def floor(hidden, weight):
        return linear_logprob(hidden, weight, torch.zeros(len(hidden), dtype=torch.int64))

    def ours(settings):
        def run(hidden, weight, impl="cpu"):
            rows = torch.arange(len(hidden))
            options = {"seeds": rows, "positions": torch.zeros_like(rows), **settings}
            return linear_sample(hidden, weight, impl=impl, **options)

        return run

    mine = {name: ours(settings) for name, settings in SETTINGS.items()}
    peers = {"eager": eager, "eager top-k": eager_top_k, "eager top-p": eager_top_p}
    return {"linear_logprob": floor, **mine, **peers}


def check(name, hidden, weight):
    """The gate before any timing: a wrong kernel has no speed."""
    if name in SETTINGS:
        run, few = variants()[name], hidden[:4]
        got, want = run(few, weight), run(few, weight, impl="reference")
        assert torch.equal(got.token, want.token), f"{name} draws other tokens than the reference"


@pytest.mark.parametrize("shape", SHAPES[1:2], ids=str)
@pytest.mark.parametrize("name", variants())
def test_linear_sample(benchmark, name, shape):
    inputs = draw(*shape)
    check(name, *inputs)
    benchmark.pedantic(variants()[name], args=inputs, rounds=3, warmup_rounds=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for shape in SHAPES:
        inputs, times = draw(*shape), {name: [] for name in variants()}
        for name, run in variants().items():
            check(name, *inputs)
            run(*inputs)
        for _ in range(rounds):
            for name, run in variants().items():
                start = time.perf_counter()
                run(*inputs)
                times[name].append(time.perf_counter() - start)
        print("M={} H={} V={} {}".format(*shape))
        floor = statistics.median(times["linear_logprob"])
        for name, t in times.items():
            median = statistics.median(t)
            print(f"  {name:16s} {median * 1e3:9.2f} ms ({median / floor:.2f}x)")


if __name__ == "__main__":
    main()
