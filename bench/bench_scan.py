"""Advantages: our kernels against the loops that PPO trainers run.

python -m pytest bench/bench_scan.py            pytest-benchmark's table, one case at a time
python bench/bench_scan.py [--json FILE]        variants interleaved round by round, ratios printed

Each token is 4 bytes of reward and of value read, of advantage and of return written.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import measure
import pytest
import torch

from fastrl.kernels import gae, native

GAMMA, LAM = 1.0, 0.95
SHAPES = [(16, 512), (64, 1024), (512, 2048)]
BYTES_PER_TOKEN = 16


def inline_loop(rewards, values):
    """The loop that TRL's PPO trainer ran until 1.12, which verl and others still run."""
    following, reversed_advantages = 0.0, []
    length = rewards.shape[1]
    for t in reversed(range(length)):
        next_values = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        following = delta + GAMMA * LAM * following
        reversed_advantages.append(following)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def ours(impl):
    return lambda rewards, values: gae(rewards, values, gamma=GAMMA, lam=LAM, impl=impl)


def variants(device):
    """Name to function, the reference last; only what can run on ``device``."""
    fast = [i for i in ("cpu", "cuda", "triton") if native.unavailable(i, device) is None]
    return {i: ours(i) for i in fast} | {"inline loop": inline_loop, "reference": ours("reference")}


def draw(shape, device):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device).unbind()


def check(name, function, rewards, values):
    """The gate before any timing: a wrong kernel has no speed."""
    truth = gae(rewards.double(), values.double(), gamma=GAMMA, lam=LAM, impl="reference")
    for got, want in zip(function(rewards, values), truth, strict=True):
        error = (got - want).abs().max().item()
        assert error < 1e-4, f"{name} is off by {error}"


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def once(function, rewards, values):
    """Seconds of one call, all of it done."""
    start = time.perf_counter()
    function(rewards, values)
    if rewards.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"B{s[0]}-T{s[1]}")
@pytest.mark.parametrize("name", variants(device()))
def test_gae(benchmark, name, shape):
    rewards, values = draw(shape, device())
    function = variants(device())[name]
    check(name, function, rewards, values)
    benchmark.pedantic(
        once, args=(function, rewards, values), rounds=5, iterations=1, warmup_rounds=1
    )


def compare(shape, seconds):
    """Median and best time of each variant, measured in turns for about ``seconds`` in all."""
    rewards, values = draw(shape, device())
    functions = variants(device())
    for name, function in functions.items():
        check(name, function, rewards, values)
    calls = {name: partial(once, f, rewards, values) for name, f in functions.items()}
    return measure.take_turns(calls, seconds, least=5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each shape")
    options = parser.parse_args()
    report = {"machine": measure.machine(), "shapes": {}}
    for shape in SHAPES:
        times = compare(shape, options.seconds)
        report["shapes"]["x".join(map(str, shape))] = times
        fastest = min(times, key=lambda n: times[n]["median"])
        print(f"B={shape[0]} T={shape[1]}")
        for name, t in times.items():
            rate = BYTES_PER_TOKEN * shape[0] * shape[1] / t["median"] / 1e9
            ratio = t["median"] / times[fastest]["median"]
            print(
                f"  {name:12s} {t['median'] * 1e3:9.3f} ms (best {t['best'] * 1e3:.3f})"
                f"  {rate:7.2f} GB/s  {ratio:7.1f}x"
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
