"""linear_logprob on a GPU against eager PyTorch, torch.compile and the fused losses of others.

python bench/bench_logprob_gpu.py [--json FILE]   variants interleaved round by round, with peak
                                                  memory; only what is installed is compared
python bench/bench_logprob_gpu.py --table [...]   triton against cuda over the grid, and the rows
                                                  that belong into kernels/logprob/measured.py
python bench/bench_logprob_gpu.py --tiles [...]   sizes of the Triton kernels' tiles

Backward is of log-probs and entropies with an upstream gradient per token where a variant has
entropies, of log-probs alone where it has none. One product is 2 N H V operations; forward is one,
both are four, or three where the workspace holds the exponentials.
"""

import argparse
import importlib.metadata
import json
import math
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastrl.kernels import linear_logprob, native
from fastrl.kernels.logprob import measured

CUDA = torch.device("cuda")
EVERYTHING_MB = 2.0**20
# Tokens, width, vocabulary, dtype, share of ignored tokens.
SHAPES = [
    (8192, 4096, 131072, "bfloat16", 0.0),
    (8192, 4096, 131072, "bfloat16", 0.5),
    (8192, 4096, 131072, "bfloat16", 0.9),
    (2048, 896, 151936, "bfloat16", 0.0),
    (16384, 2048, 128256, "bfloat16", 0.0),
    (16, 4096, 151936, "bfloat16", 0.0),
    (4096, 2048, 32000, "float16", 0.0),
    (2048, 896, 32000, "float32", 0.0),
]
WIDTHS = ((896, 151936), (2048, 32000), (2048, 128256), (4096, 131072), (4096, 256000))
GRID = {"bfloat16": WIDTHS, "float16": WIDTHS[1:4:2], "float32": WIDTHS[:2]}
TOKENS = (256, 2048, 8192)  # of each row of the table
GAIN = 1.05  # cuda has to be so much faster: it does not keep a row's bits from batch to batch
TILES = [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)]


def ours(impl, workspace_mb, hidden, weight, target):
    options = {"entropy": True, "impl": impl, "workspace_mb": workspace_mb}
    out = linear_logprob(hidden, weight, target, **options)
    return out.logprob, out.entropy


def eager(hidden, weight, target):
    logp = F.linear(hidden, weight).float().log_softmax(-1)
    picked = logp.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return picked.where(target >= 0, 0.0), entropy.where(target >= 0, 0.0)


def liger(hidden, weight, target):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, target, temperature=1.0, ignore_index=-100, return_entropy=True
    )
    return -nll, entropy


def cce(hidden, weight, target):
    from cut_cross_entropy import linear_cross_entropy

    return (-linear_cross_entropy(hidden, weight, target, reduction="none", impl="cce"),)


def trl_chunked(hidden, weight, target):
    from trl.kernels import ChunkedLogProbFunction

    logprob, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, target.clamp(min=0), 1.0, 8192, None, 1.0, ("entropy",)
    )
    return logprob.where(target >= 0, 0.0), entropy.where(target >= 0, 0.0)


def variants():
    """Name to function; only what is installed here."""
    found = {}
    for impl in ("triton", "cuda"):
        if (reason := native.unavailable(impl, CUDA)) is None:
            found[impl] = partial(ours, impl, 0.0)
            found[f"{impl}, workspace"] = partial(ours, impl, EVERYTHING_MB)
        else:
            print(f"{impl} is unavailable: {reason}")
    found |= {"eager": eager, "compile": torch.compile(eager)}
    others = (
        ("liger", "liger_kernel", liger),
        ("cce", "cut_cross_entropy", cce),
        ("trl", "trl", trl_chunked),
    )
    for name, package, function in others:
        try:
            __import__(package)
            found[name] = function
        except ImportError:
            print(f"{name} is not installed")
    return found


def draw(n, h, v, dtype, ignored=0.0):
    g = torch.Generator(CUDA).manual_seed(0)
    dtype = getattr(torch, dtype)
    hidden = torch.randn(n, h, generator=g, device=CUDA).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=g, device=CUDA) / h**0.5).to(dtype).requires_grad_()
    target = torch.randint(v, (n,), generator=g, device=CUDA)
    target[torch.rand(n, generator=g, device=CUDA) < ignored] = -100
    return hidden, weight, target


def check(name, function, hidden, weight, target):
    """The gate before any timing: a wrong kernel has no speed."""
    kept = (target >= 0).nonzero().squeeze(-1)[:4]
    with torch.no_grad():
        truth = linear_logprob(
            hidden[kept].double(), weight.double(), target[kept], entropy=True, impl="reference"
        )
        got = function(hidden, weight, target)
    limit = 1e-3 if name.startswith(("triton", "cuda")) else 0.1
    for x, want in zip(got, (truth.logprob, truth.entropy), strict=False):
        error = (x[kept].double() - want).abs().max().item()
        assert error < limit, f"{name} is off by {error}"


def once(function, hidden, weight, target):
    """Milliseconds of the forward and of the backward, on the GPU's clock."""
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    out = function(hidden, weight, target)
    middle.record()
    upstream = torch.linspace(0.5, 1.5, len(target), device=CUDA)
    loss = sum((x.float() * upstream).sum() for x in out)
    torch.autograd.grad(loss, (hidden, weight))
    end.record()
    end.synchronize()
    return start.elapsed_time(middle), middle.elapsed_time(end)


def compare(functions, inputs, rounds):
    """Medians of forward and of both in ms and peak MB, each in turn in every round; failures."""
    failed, memory = {}, {}
    for name, function in list(functions.items()):
        try:
            check(name, function, *inputs)
            once(function, *inputs)  # compiles
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once(function, *inputs)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as error:  # a peer that cannot do this shape is reported, not hidden
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            del functions[name]
        torch.cuda.empty_cache()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(once(function, *inputs))
    medians = {
        name: {
            "forward": statistics.median(f for f, _ in t),
            "both": statistics.median(f + b for f, b in t),
            "peak_mb": memory[name],
        }
        for name, t in times.items()
    }
    return medians, failed


def show(shape, medians, failed):
    n, h, v, dtype, ignored = shape
    print(f"N={n} H={h} V={v} {dtype}, {ignored:.0%} ignored")
    product = 2e-9 * n * (1 - ignored) * h * v
    mine = [t["both"] for name, t in medians.items() if name.startswith(("triton", "cuda"))]
    for name, t in medians.items():
        rates = product / t["forward"], 4 * product / t["both"]
        ratio = t["both"] / min(mine) if mine else math.nan
        print(
            f"  {name:20s} forward {t['forward']:8.2f} ms ({rates[0]:4.0f} TFLOP/s)"
            f"   both {t['both']:8.2f} ms ({rates[1]:4.0f} TFLOP/s as of 4 products,"
            f" {ratio:.2f}x)   peak {t['peak_mb']:7.0f} MB"
        )
    for name, why in failed.items():
        print(f"  {name:20s} failed: {why}")


def races(rounds):
    for shape in SHAPES:
        medians, failed = compare(variants(), draw(*shape), rounds)
        show(shape, medians, failed)
        yield {"shape": shape, "milliseconds": medians, "failed": failed}


def table(rounds):
    """A row per dtype and head: the faster of ours by the geometric mean over numbers of tokens."""
    ours_only = {name: f for name, f in variants().items() if name in ("triton", "cuda")}
    for dtype, heads in GRID.items():
        for h, v in heads:
            ratios = []
            for n in TOKENS:
                medians, failed = compare(dict(ours_only), draw(n, h, v, dtype), rounds)
                show((n, h, v, dtype, 0.0), medians, failed)
                if len(medians) == 2:
                    ratios.append(medians["triton"]["both"] / medians["cuda"]["both"])
            if ratios:
                gain = statistics.geometric_mean(ratios)
                row = measured.Row(dtype, h, v, "cuda" if gain > GAIN else "triton")
                print(f"    {row!r},  # triton / cuda {gain:.2f}")
                yield row._asdict() | {"triton_over_cuda": ratios, "tokens": TOKENS}


def tiles(rounds):
    from fastrl.kernels.logprob import triton_launch as t

    before = t.ENGINE
    for shape in (SHAPES[0], SHAPES[3]):
        inputs = draw(*shape)
        for sizes in TILES:
            t.ENGINE = t.Tile(*sizes)
            medians, failed = compare({"triton": partial(ours, "triton", 0.0)}, inputs, rounds)
            print(sizes, end=" ")
            show(shape, medians, failed)
            yield {"shape": shape, "tile": sizes, "milliseconds": medians, "failed": failed}
    t.ENGINE = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("shape", SHAPES[3:4], ids=str)
def test_linear_logprob_gpu(benchmark, shape):
    for name, function in variants().items():
        check(name, function, *draw(*shape))
    benchmark.pedantic(once, args=(partial(ours, "auto", 64.0), *draw(*shape)), rounds=3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="rows for kernels/logprob/measured.py")
    parser.add_argument("--tiles", action="store_true", help="sizes of the Triton kernels' tiles")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; bench/bench_logprob.py is for the CPU")
    work = table if options.table else tiles if options.tiles else races
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        work.__name__: [],
    }
    for figures in work(options.rounds):
        report[work.__name__].append(figures)
        if options.json:  # every time: who runs out of time keeps what was measured
            options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
