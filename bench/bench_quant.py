"""quantized_linear against F.linear in bf16 and float32, torchao, bitsandbytes and oneDNN.

Every variant takes bf16 activations [M, K] and gives bf16 outputs [M, N]; quantizing the
activations is included, quantizing the weight is not. The floor is 2 M N K operations on int8, and
the weight read once in int8.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastrl.bench.race import FORWARD, Race, Variant, Work, relative, within
from fastrl.kernels import native, quantize, quantize_rows, quantized_linear

PROBE = 32  # rows of the gate, against float64


# A variant makes what it needs of a weight [N, K], and gives a function of the activations.
def ours(weight, scheme="int8"):
    return partial(_ours, quantize(weight, scheme))


def _ours(weight, x):
    return quantized_linear(x, weight)


def linear(weight):
    return lambda x: F.linear(x, weight)


def wide(weight):
    exact = weight.float()
    return lambda x: F.linear(x.float(), exact).to(x.dtype)


def int_mm(weight):
    """PyTorch's int8 product between our quantizer and a plain epilogue."""
    weight = quantize(weight)
    data = weight.data[:, : weight.columns].t()

    def run(x):
        rows = quantize_rows(x)
        sums = torch._int_mm(rows.data, data)
        return (sums * rows.scale.unsqueeze(1) * weight.scale).to(x.dtype)

    return run


def torchao(weight):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = torch.nn.Linear(*weight.shape[::-1], False, weight.device, weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    holder = torch.nn.Sequential(layer)
    quantize_(holder, Int8DynamicActivationInt8WeightConfig())
    return holder


def bitsandbytes_nf4(weight):
    import bitsandbytes as bnb

    size = weight.shape[::-1]
    layer = bnb.nn.Linear4bit(*size, False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    return layer.to(weight.device).eval()


def bitsandbytes_int8(weight):
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(*weight.shape[::-1], False, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict({"weight": weight.clone()})
    return layer.to(weight.device).eval()


NF4, INT4 = partial(ours, scheme="nf4"), partial(ours, scheme="int4")
FOUR_BITS = (NF4, INT4, bitsandbytes_nf4)
SIZES = ({"K": 896, "N": 4864}, {"K": 2048, "N": 8192}, {"K": 4096, "N": 14336})


class Inputs(NamedTuple):
    weight: torch.Tensor
    x: torch.Tensor
    rows: int
    made: dict  # each variant's function of the activations


class Quant(Race):
    op = "quant"
    about = "activations [M, K] times a quantized weight [N, K]"
    modes = (FORWARD,)
    defaults = {"M": 512, "K": 896, "N": 4864}
    grids = {
        "quick": [{"M": 128}],
        "default": [{"M": 1}, {}, SIZES[1]],
        "full": [{"M": m, **size} for size in SIZES for m in (1, 16, 128, 512, 1024, 2048, 8192)],
    }

    cuda = [{"M": 64}, {"M": 4096}, {"M": 4096, **SIZES[2]}]  # what PyTorch's int8 product takes

    def variants(self, device):
        kernel = device.type != "cpu" or native.unavailable("cpu", device) is None
        mine = {
            "fastrl int8": Variant(ours),
            "fastrl nf4": Variant(NF4),
            "fastrl int4": Variant(INT4),
        }
        return {
            **(mine if kernel else {}),
            "bf16 F.linear": Variant(linear, "eager"),
            "float32 F.linear": Variant(wide, "eager"),
            "torch._int_mm": Variant(int_mm, "torch"),
            "torchao int8": Variant(torchao, "torchao"),
            "bitsandbytes NF4": Variant(bitsandbytes_nf4, "bitsandbytes"),
            "bitsandbytes int8": Variant(bitsandbytes_int8, "bitsandbytes"),
        }

    @torch.no_grad()
    def draw(self, shape, device):
        g = torch.Generator().manual_seed(0)
        weight = torch.randn(shape["N"], shape["K"], generator=g) * shape["K"] ** -0.5
        x = torch.randn(max(shape["M"], PROBE), shape["K"], generator=g)
        return Inputs(weight.to(device).bfloat16(), x.to(device).bfloat16(), shape["M"], {})

    def _function(self, variant, inputs):
        if variant not in inputs.made:
            inputs.made[variant] = variant.function(inputs.weight)
        return inputs.made[variant]

    def call(self, variant, inputs, mode):
        function = self._function(variant, inputs)
        return torch.no_grad()(partial(function, inputs.x[: inputs.rows]))

    def before(self, variant, inputs, mode):
        self._function(variant, inputs)
        return inputs

    @torch.no_grad()
    def gate(self, variant, inputs, shape):
        x = inputs.x[:PROBE]
        want = x.double() @ inputs.weight.double().T
        # What quantization itself may bring; a wrong kernel is off by far more.
        limit = 0.16 if variant.function in FOUR_BITS else 0.03
        return within({"output": relative(self._function(variant, inputs)(x), want)}, limit)

    def small(self, shape):
        return shape | {"M": PROBE}

    def bytes_needed(self, name, shape):
        return 12.0 * shape["N"] * shape["K"] + 8.0 * shape["M"] * (shape["N"] + shape["K"])

    def work(self, shape, mode):
        m, k, n = shape["M"], shape["K"], shape["N"]
        return Work(2.0 * m * n * k, n * k + 2.0 * m * (n + k), "int8")


RACE = Quant()
