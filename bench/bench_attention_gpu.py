"""Shared prefixes on a GPU: attention for training, for a decode step, and whole rollouts.

python -m fastrl.bench.bench_attention_gpu [--json FILE]   variants interleaved round by round;
                                                           compared with float64 before timing
python -m fastrl.bench.bench_attention_gpu --tiles [...]   sizes of the training kernels' tiles

"flash" is flash-attn's kernels, or PyTorch's where that is not installed, over the shared prompt.
"replicated" gives each completion a copy of its prompt: for training torch's flash attention over
the G padded rows, for a decode step torch's attention over each row's own keys and values. A group
is bench_attention.py's. Rollouts are of a model of the shape of Qwen2.5-0.5B with random weights,
against Hugging Face's generate with the prompts repeated.
"""

import argparse
import itertools
import json
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastrl.bench.bench_attention import MODELS, RACE, TINY, replicated
from fastrl.bench.race import FORWARD
from fastrl.kernels import shared_prefix_attention

DECODE = [
    (model, p, g, 48)
    for model in MODELS
    for p, g in ((512, 16), (1024, 16), (4096, 8), (4096, 32), (16384, 16))
]  # model, prompt, rows, own tokens


CUDA = torch.device("cuda")
SHAPES = [
    RACE.defaults | shape
    for shape in (
        {"G": 8},
        {},
        {"G": 32, "C": 256},
        {"P": 1024, "C": 256},
        {"P": 4096, "G": 8},
        {"dtype": "float32"},
        {"model": "8B", "G": 8},
        {"model": "8B", "P": 1024, "G": 8, "C": 256},
    )
]


def ours(impl, case):
    def function(q, k, v):
        return shared_prefix_attention(q, k, v, case.layout, impl=impl)

    return case.inputs, function, lambda x: x


triton = partial(ours, "triton")


# Queries, keys, warps, stages of each kernel; those that do not fit are said to.
TILES = {
    "forward": [
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (64, 64, 4, 3),
        (128, 128, 8, 2),
        (128, 32, 8, 3),
    ],
    "queries": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2)],
    "keys": [(64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 3), (128, 64, 8, 2)],
}
VARIANTS = {"triton": triton, "flash": partial(ours, "flash"), "replicated": replicated}


def check(name):
    """The gate before any timing: a wrong kernel has no speed."""
    case = RACE.draw(RACE.defaults | TINY, CUDA)
    (*leaves, upstream), function, gather = VARIANTS[name](case)
    leaves = [x.detach().requires_grad_() for x in leaves]
    got = torch.autograd.grad(function(*leaves), leaves, upstream)
    exact = [x.double().requires_grad_() for x in case.inputs[:3]]
    want = shared_prefix_attention(*exact, case.layout, impl="reference")
    wanted = torch.autograd.grad(want, exact, case.inputs[3].double())
    for x, y in zip(got, wanted, strict=True):
        error = ((gather(x).double() - y).norm() / y.norm()).item()
        assert error < 0.02, f"{name} is off by {error}"


def milliseconds(*calls):
    """Of each call, one after the other, after what came before has ended."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    result = None
    for call, event in zip(calls, events[1:], strict=True):
        result = call(result)
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def medians(calls, rounds):
    """Of the milliseconds of each variant's calls, in turn in every round."""
    times = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, some in calls.items():
            measured = milliseconds(*some)
            if turn > 1:
                times[name].append(measured)
    return {name: [statistics.median(x) for x in zip(*t, strict=True)] for name, t in times.items()}


def forward_and_backward(variant, case):
    """Two calls, of which the second takes what the first returned."""
    (*leaves, upstream), function, _ = variant(case)
    leaves = [x.detach().requires_grad_() for x in leaves]
    return lambda _: function(*leaves), lambda out: torch.autograd.grad(out, leaves, upstream)


def train(shape, rounds):
    case = RACE.draw(shape, CUDA)
    calls = {
        name: forward_and_backward(variant, case)
        for name, variant in VARIANTS.items()
        if name != "flash" or shape["dtype"] != "float32"
    }
    work = RACE.work(shape, FORWARD).operations
    print(f"train {shape}: {work / 1e9:.1f} GFLOP forward")
    found = medians(calls, rounds)
    base = sum(found["triton"])
    for name, (forward, backward) in found.items():
        print(
            f"  {name:12s} forward {forward:7.3f} ms ({work / forward / 1e9:4.0f} TFLOP/s)"
            f"   both {forward + backward:7.3f} ms ({(forward + backward) / base:.2f}x)"
        )
    return found


def step(shape, rounds):
    """One layer of a decode step, without the host: both as CUDA graphs."""
    from fastrl.kernels.attention.decode import Segment, Visit, Workspace, decode_attention, table

    name, p, g, own = shape
    heads, kv_heads, width = MODELS[name]
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=random, device="cuda").bfloat16()

    prompt = normal(1, 2, kv_heads, p, width)
    tails = [normal(1, 2, kv_heads, 64, width) for _ in range(g)]
    q, k, v = normal(g, heads, width), normal(g, kv_heads, width), normal(g, kv_heads, width)
    segments = [Segment(prompt.data_ptr(), 0, p, True)]
    segments += [Segment(x.data_ptr(), p, 64, False) for x in tails]
    chains = [[Visit(r, 0, p), Visit(r, r + 1, -1)] for r in range(g)]
    where = table(segments, chains, heads // kv_heads, g)
    where = where._replace(values=where.values.cuda())
    workspace = Workspace.of(where.size, heads, width, q.device)
    positions = torch.full((g,), p + own - 1, device="cuda")

    def ours():
        return decode_attention(q, k, v, positions, where, workspace, 0, scale=width**-0.5)

    out = ours()
    both = [
        torch.cat([prompt.expand(g, *prompt.shape[1:]), torch.cat(tails)], 3)[:, i, :, : p + own]
        for i in range(2)
    ]
    keys, values = (x.contiguous() for x in both)

    def copies():
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True)

    gap = (out.float() - copies()[:, :, 0].float()).norm() / out.float().norm()
    assert gap < 0.02, f"off by {gap}"
    calls = {}
    for label, function in (("triton", ours), ("replicated", copies)):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                function()
        calls[label] = (lambda _, graph=graph: graph.replay(),)
    found = {label: [t / 20 for t in times] for label, times in medians(calls, rounds).items()}
    read = 4 * kv_heads * width * (p + g * own)
    print(f"step {shape}: {read / 1e6:.1f} MB of keys and values, the prompt once")
    for label, (t,) in found.items():
        ratio = t / found["triton"][0]
        print(f"  {label:12s} {t * 1e3:8.1f} us ({read / t / 1e6:.0f} GB/s of those, {ratio:.2f}x)")
    return found


def rollouts(rounds, p=512, g=16, tokens=64):
    """The whole of prefill and decoding, greedy."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from fastrl.rollout import RolloutEngine, SamplingParams

    config = Qwen2Config(
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).bfloat16().eval()
    prompt = torch.randint(10, 1000, (p,)).tolist()
    sampling = SamplingParams(temperature=0, max_new_tokens=tokens, ignore_eos=True)
    engine = RolloutEngine(model)
    ids = torch.tensor([prompt] * g, device="cuda")
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}

    calls = {
        "engine": (lambda _: engine.generate([prompt], g, sampling),),
        "generate": (lambda _: model.generate(ids, **options),),
    }
    found = medians(calls, max(1, rounds // 3))
    print(f"rollouts P={p} G={g} L={tokens}, fallback: {engine.fallback_reason}")
    for name, (t,) in found.items():
        rate = g * tokens / t * 1e3
        print(f"  {name:12s} {t:8.1f} ms ({rate:.0f} tokens/s, {t / found['engine'][0]:.2f}x)")
    return found


def tiles(rounds):
    """Forward and both for each tile in place of the one that is used."""
    from fastrl.kernels.attention import triton_launch

    used = triton_launch.tile
    for shape in (SHAPES[1], SHAPES[7]):
        calls = forward_and_backward(triton, RACE.draw(shape, CUDA))
        for kernel, candidates in TILES.items():
            for sizes in candidates:

                def other(which, *arguments, kernel=kernel, sizes=sizes):
                    changed = which == kernel
                    return triton_launch.Tile(*sizes) if changed else used(which, *arguments)

                triton_launch.tile = other
                try:
                    found = medians({"triton": calls}, rounds)["triton"]
                except Exception as error:  # of Triton: too much shared memory
                    print(f"{shape} {kernel} {sizes}: {type(error).__name__}")
                    continue
                finally:
                    triton_launch.tile = used
                now = (
                    "  <- used"
                    if used(kernel, torch.bfloat16, MODELS[shape["model"]].width) == sizes
                    else ""
                )
                print(f"{shape} {kernel} {sizes}: {found[0]:.3f} + {found[1]:.3f} ms{now}")
                yield shape, (kernel, *sizes), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_attention_gpu():
    for name in VARIANTS:
        check(name)
    step(DECODE[0], 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiles", action="store_true")
    options = parser.parse_args()
    for name in VARIANTS:
        check(name)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": []}

    def add(what, shape, found):
        report["results"].append({"what": what, "shape": shape, "milliseconds": found})
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")

    if options.tiles:
        for shape, sizes, found in tiles(options.rounds):
            add(sizes, shape, found)
        return
    add("rollouts", (512, 16, 64), rollouts(options.rounds))
    for shape in DECODE:
        add("step", shape, step(shape, options.rounds))
    for shape in SHAPES:
        add("train", shape, train(shape, options.rounds))


if __name__ == "__main__":
    main()
