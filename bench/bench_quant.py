"""quantized_linear against F.linear in bf16 and float32, torchao, bitsandbytes and oneDNN.

python bench/bench_quant.py [--shapes 896x4864 ...] [--rows 1 16 ...] [--seconds 2] [--json FILE]

Every variant takes bf16 activations [M, K] and gives bf16 outputs [M, N]; quantizing the
activations is included, quantizing the weight is not. Rounds are interleaved; medians, and how many
times bf16 F.linear's speed that is. Peers that are not installed are left out.

The floor is arithmetic, 2 M N K operations at the peak of bench/peak.py (int8_dot or int8_tiles),
for many rows; for few it is memory, the stored weight read once.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import machine, take_turns

from fastrl.kernels import quantize, quantize_rows, quantized_linear

SHAPES = ["896x4864", "2048x8192", "4096x14336"]
ROWS = [1, 16, 128, 512, 1024, 2048, 8192]
# Relative errors that the variants may have; a wrong kernel has no speed.
LIMITS = {"int8": 0.03, "nf4": 0.15, "NF4": 0.15, "fp8": 0.06, "int4": 0.16}


def ours(weight):
    for scheme in ("int8", "nf4", "int4"):
        qweight = quantize(weight, scheme)
        yield f"ours {scheme}", lambda x, q=qweight: quantized_linear(x, q)


def torch_linear(weight):
    wide = weight.float()
    yield "bf16 F.linear", lambda x: F.linear(x, weight)
    yield "float32 F.linear", lambda x: F.linear(x.float(), wide).bfloat16()


def int_mm(weight):
    """PyTorch's int8 product (oneDNN) between our quantizer and a plain epilogue."""
    qweight = quantize(weight)
    data = qweight.data[:, : weight.shape[1]].t()

    def run(x):
        rows = quantize_rows(x)
        sums = torch._int_mm(rows.data, data)
        return (sums * rows.scale.unsqueeze(1) * qweight.scale).bfloat16()

    yield "oneDNN int8 (torch._int_mm)", run


def onednn(weight):
    """oneDNN's int8 linear with its own epilogue; one scale for all activations, given."""
    qweight = quantize(weight)
    columns = weight.shape[1]
    packed = torch.ops.onednn.qlinear_prepack(qweight.data[:, :columns].t(), None)
    zeros = torch.zeros(len(weight), dtype=torch.int64)

    def run(x):
        scale = float(x.abs().amax()) / 127
        q = (x.float() * (1 / scale)).round().to(torch.int8)
        return torch.ops.onednn.qlinear_pointwise(
            *(q, scale, 0, packed, qweight.scale, zeros, None),
            *(1.0, 0, torch.bfloat16, "none", [], ""),
        )

    yield "oneDNN int8 linear", run


def torchao(weight):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    holder = torch.nn.Sequential(layer)
    quantize_(holder, Int8DynamicActivationInt8WeightConfig())
    yield "torchao int8", holder


def bitsandbytes(weight):
    import bitsandbytes as bnb

    size = weight.shape[::-1]
    four = bnb.nn.Linear4bit(*size, False, compute_dtype=torch.bfloat16, quant_type="nf4")
    four.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    four = four.to("cpu").eval()
    yield "bitsandbytes NF4", four
    eight = bnb.nn.Linear8bitLt(*size, False, has_fp16_weights=False, threshold=0.0)
    eight.load_state_dict({"weight": weight.clone()})
    eight = eight.to("cpu").eval()
    yield "bitsandbytes LLM.int8", eight


def variants(weight, skip):
    calls = {}
    for peer in (torch_linear, ours, int_mm, onednn, torchao, bitsandbytes):
        if peer.__name__ in skip:
            continue
        try:
            calls |= dict(peer(weight))
        except Exception as error:  # a peer that does not install or run here is reported
            skip.add(peer.__name__)
            print(f"without {peer.__name__}: {type(error).__name__}: {str(error)[:160]}")
    return calls


def right(name, call, x, want) -> bool:
    """The gate before any timing."""
    try:
        error = ((call(x).double() - want).norm() / want.norm()).item()
    except Exception as failure:
        print(f"without {name}: {type(failure).__name__}: {str(failure)[:160]}")
        return False
    limit = next((v for k, v in LIMITS.items() if k in name), 0.03)
    if error > limit and not name.startswith(("ours", "bf16", "float32")):
        print(f"without {name}: its error is {error:.3f}")
        return False
    assert error <= limit, f"{name} is wrong by {error}"
    return True


def timed(call, x):
    start = time.perf_counter()
    call(x)
    return time.perf_counter() - start


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="KxN")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each table row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    skip: set[str] = set()
    results = []
    for shape in options.shapes:
        columns, outputs = map(int, shape.split("x"))
        g = torch.Generator().manual_seed(0)
        weight = (torch.randn(outputs, columns, generator=g) * columns**-0.5).bfloat16()
        calls = variants(weight, skip)
        probe = torch.randn(32, columns, generator=g).bfloat16()
        want = probe.double() @ weight.double().T
        calls = {n: c for n, c in calls.items() if right(n, c, probe, want)}
        for rows in options.rows:
            x = torch.randn(rows, columns, generator=g).bfloat16()
            turns = {n: (lambda c=c, x=x: timed(c, x)) for n, c in calls.items()}
            if rows <= 16:  # torch._int_mm's few rows are not what it is for, but it may take them
                turns = {n: t for n, t in turns.items() if "_int_mm" not in n}
            times = take_turns(turns, options.seconds, 3)
            base = times["bf16 F.linear"]["median"]
            for name, time_ in times.items():
                rate = 2 * rows * outputs * columns / time_["median"] * 1e-9
                results.append({"shape": shape, "rows": rows, "name": name, **time_})
                print(
                    f"{shape} M={rows:<5} {name:28} {time_['median'] * 1e3:10.2f} ms "
                    f"{rate:8.0f} GOP/s {base / time_['median']:7.2f}x bf16",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
