"""shared_prefix_attention against torch's attention on the replicated and on the packed batch.

python -m pytest bench/bench_attention.py      pytest-benchmark's table, one case at a time
python bench/bench_attention.py [--json FILE]  variants interleaved round by round, ratios printed

A group is a prompt of P tokens and G completions of C / 2 to C tokens. "replicated" is what a
trainer does without sharing: G rows of prompt and completion, padded on the right to the longest,
causal, so that torch takes its flash kernel. "masked" is the packed sequence with a dense mask.
The arithmetic floor is 4 Hq D operations for each pair of a query and a key it sees, and 10 for
the backward, which computes the scores again.
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.kernels import GroupLayout, native, shared_prefix_attention


class Model(NamedTuple):
    heads: int
    kv_heads: int
    width: int


MODELS = {"0.5B": Model(14, 2, 64), "8B": Model(32, 8, 128)}
EVERY = [
    (model, p, g, c, "bfloat16")
    for model, p, g, c in itertools.product(MODELS, (512, 1024, 4096), (8, 16, 32), (64, 256))
]
SHAPES = [
    ("0.5B", 512, 8, 64, "bfloat16"),
    ("0.5B", 512, 16, 64, "bfloat16"),
    ("0.5B", 512, 32, 256, "bfloat16"),
    ("0.5B", 1024, 16, 256, "bfloat16"),
    ("0.5B", 4096, 8, 64, "bfloat16"),
    ("0.5B", 512, 16, 64, "float32"),
    ("8B", 512, 8, 64, "bfloat16"),
    ("8B", 1024, 8, 256, "bfloat16"),
]
TINY = ("0.5B", 40, 3, 16, "bfloat16")


class Case(NamedTuple):
    """A group, packed, and where its tokens are in the replicated batch."""

    layout: GroupLayout
    inputs: tuple[Tensor, ...]  # q, k, v, upstream gradient; [T, heads, D]
    rows: Tensor  # [G, P + C] packed tokens
    kept: Tensor  # [G, P + C], each packed token once


def draw(shape):
    name, p, g, c, dtype = shape
    model = MODELS[name]
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(c // 2, c + 1, (g,), generator=random)
    lengths[0] = c
    layout = GroupLayout.from_lengths([p], [lengths.tolist()])
    tokens = int(layout.offsets[-1])
    heads = (model.heads, model.kv_heads, model.kv_heads, model.heads)
    inputs = (torch.randn(tokens, h, model.width, generator=random) for h in heads)
    column = torch.arange(p + c)
    starts = layout.offsets[1:-1, None] - p
    rows = torch.where(column < p, column, starts + column).clamp(max=tokens - 1)
    kept = (column < p + lengths[:, None]) & ((column >= p) | (torch.arange(g)[:, None] == 0))
    return Case(layout, tuple(x.to(getattr(torch, dtype)) for x in inputs), rows.long(), kept)


# A variant gives its leaves, a function of them, and what brings its rows to the packed tokens.
def ours(case):
    def function(q, k, v):
        return shared_prefix_attention(q, k, v, case.layout, impl="cpu")

    return case.inputs, function, lambda x: x


def replicated(case):
    *inputs, upstream = (x[case.rows].transpose(1, 2).contiguous() for x in case.inputs)
    upstream = upstream * case.kept[:, None, :, None]

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def gather(x):
        x = x.transpose(1, 2)
        packed = x.new_zeros(len(case.inputs[0]), *x.shape[2:], dtype=torch.float32)
        return packed.index_add_(0, case.rows.flatten(), x.flatten(0, 1).float())

    return (*inputs, upstream), function, gather


def masked(case):
    mask = case.layout.mask()

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    leaves = tuple(x.transpose(0, 1).unsqueeze(0).contiguous() for x in case.inputs)
    return leaves, function, lambda x: x.squeeze(0).transpose(0, 1)


def variants():
    """Name to function; only what can run here."""
    found = {"replicated": replicated, "masked": masked}
    missing = native.unavailable("cpu", torch.device("cpu"))
    return found if missing else {"ours": ours, **found}


def differentiated(variant, case):
    """The variant's leaves, its function and its upstream gradient."""
    (*leaves, upstream), function, gather = variant(case)
    return [x.detach().requires_grad_() for x in leaves], function, upstream, gather


def check(name, variant):
    """The gate before any timing: a wrong kernel has no speed."""
    case = draw(TINY)
    leaves, function, upstream, gather = differentiated(variant, case)
    out = function(*leaves)
    got = [gather(g).double() for g in torch.autograd.grad(out, leaves, upstream)]
    exact = [x.double().requires_grad_() for x in case.inputs[:3]]
    want = shared_prefix_attention(*exact, case.layout, impl="reference")
    wanted = torch.autograd.grad(want, exact, case.inputs[3].double())
    for x, y in zip(got, wanted, strict=True):
        error = ((x - y).norm() / y.norm()).item()
        assert error < 0.02, f"{name} is off by {error}"


def once(leaves, function, upstream):
    """Seconds of the forward and of the backward."""
    start = time.perf_counter()
    out = function(*leaves)
    middle = time.perf_counter()
    torch.autograd.grad(out, leaves, upstream)
    return middle - start, time.perf_counter() - middle


def operations(shape):
    """Of the forward, over pairs of a query and a key that it sees."""
    name, p, *_ = shape
    lengths = draw(shape).layout.offsets.diff()[1:].double()
    pairs = p * (p + 1) / 2 + (lengths * p + lengths * (lengths + 1) / 2).sum().item()
    return 4 * MODELS[name].heads * MODELS[name].width * pairs


@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
@pytest.mark.parametrize("name", variants())
def test_shared_prefix_attention(benchmark, name, shape):
    check(name, variants()[name])
    at = differentiated(variants()[name], draw(shape))[:3]
    benchmark.pedantic(once, args=at, rounds=3, warmup_rounds=1)


def compare(shape, rounds):
    """Medians of forward and of both, each variant in turn in every round."""
    case = draw(shape)
    at = {name: differentiated(variant, case)[:3] for name, variant in variants().items()}
    times = {name: [] for name in at}
    for turn in range(rounds + 1):
        for name in at:
            seconds = once(*at[name])
            if turn:
                times[name].append(seconds)
    return {
        name: {
            "forward": statistics.median(f for f, _ in t),
            "both": statistics.median(f + b for f, b in t),
        }
        for name, t in times.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--all", action="store_true", help="every shape; needs 16 GB and an hour")
    options = parser.parse_args()
    for name, variant in variants().items():
        check(name, variant)
    report = {
        "machine": platform.processor() or platform.machine(),
        "isa": native.module().isa() if not native.why_missing else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shapes": {},
    }
    for shape in EVERY if options.all else SHAPES:
        medians = compare(shape, options.rounds)
        report["shapes"]["-".join(map(str, shape))] = medians
        name, p, g, c, dtype = shape
        work = operations(shape)
        print(f"{name} P={p} G={g} C={c} {dtype}: {work / 1e9:.1f} GFLOP forward")
        base = medians.get("ours", medians["replicated"])
        for which, t in medians.items():
            forward, both = t["forward"], t["both"]
            print(
                f"  {which:12s} forward {forward * 1e3:9.2f} ms ({forward / base['forward']:5.2f}x)"
                f"   both {both * 1e3:9.2f} ms ({both / base['both']:5.2f}x)"
                f"   {3.5e-9 * work / both:.0f} GFLOP/s"
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
