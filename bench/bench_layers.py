"""Norms, rotations and gated activations with their backward, against Hugging Face's own modules.

The shapes are of a layer's tokens: rmsnorm with the residual addition `[T, H]`, rope with Qwen3's
norm of heads `[T, heads, D]`, glu `[T, H]`. A call reads its inputs and writes its outputs once;
the backward reads those and the upstream gradient and writes the inputs' gradients.
"""

from functools import partial

import torch
import torch.nn.functional as F
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, rotate_half

from fastrl.bench.race import BOTH, Race, Variant, Work, relative, within
from fastrl.kernels import glu, rmsnorm, rope

EPS = 1e-6
SLACK = 2e-6
# Tensors of the shape read and written: forward, and backward.
MOVED = {"rmsnorm": (4, 4), "rope": (2, 3), "glu": (3, 5)}


def ours(op, x, other, weight, angles, impl="auto"):
    if op == "rmsnorm":
        return rmsnorm(x, weight, residual=other, eps=EPS, impl=impl)
    if op == "rope":
        return (rope(x, angles.cos(), angles.sin(), norm_weight=weight, eps=EPS, impl=impl),)
    return (glu(x, other, impl=impl),)


def modules(op, x, other, weight, angles):
    """What transformers' Qwen3 runs."""
    norm = Qwen3RMSNorm(len(weight), eps=EPS)
    norm.weight = weight  # a leaf stays one
    if op == "rmsnorm":
        total = x + other
        return norm(total), total
    if op == "rope":
        both = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        x = norm(x)
        return (x * both.cos().to(x.dtype) + rotate_half(x) * both.sin().to(x.dtype),)
    return (F.silu(x) * other,)


def liger(op, x, other, weight, angles):
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    if op == "rope":
        raise NotImplementedError("Liger's rotation has no norm of heads")
    if op == "glu":
        raise NotImplementedError("Liger's backward overwrites gate and up")
    return LigerFusedAddRMSNormFunction.apply(x, other, weight, EPS)


class Layers(Race):
    op = "layers"
    about = "norms, rotations, gated activations"
    modes = (BOTH,)
    defaults = {"layer": "rmsnorm", "T": 2048, "heads": 1, "H": 896, "dtype": "float32"}
    grids = {
        "quick": [{"layer": "rmsnorm", "T": 512}],
        "default": [
            {"layer": "rmsnorm"},
            {"layer": "rope", "heads": 14, "H": 64},
            {"layer": "glu", "H": 4864},
        ],
        "full": [
            {**shape, "T": tokens, "dtype": dtype}
            for dtype in ("float32", "bfloat16")
            for tokens in (256, 2048, 8192)
            for shape in (
                {"layer": "rmsnorm", "H": 128},
                {"layer": "rmsnorm", "H": 896},
                {"layer": "rope", "heads": 4, "H": 32},
                {"layer": "rope", "heads": 14, "H": 64},
                {"layer": "glu", "H": 512},
                {"layer": "glu", "H": 4864},
            )
        ],
    }

    cuda = [
        {"layer": "rmsnorm", "T": 8192, "H": 4096, "dtype": "bfloat16"},
        {"layer": "rope", "T": 8192, "heads": 32, "H": 128, "dtype": "bfloat16"},
        {"layer": "glu", "T": 8192, "H": 8192, "dtype": "bfloat16"},
    ]

    def variants(self, device):
        return {
            "fastrl": Variant(ours),
            **({"Liger": Variant(liger, "liger")} if device.type == "cuda" else {}),
            "transformers": Variant(modules, "eager"),
            "reference": Variant(partial(ours, impl="reference"), "eager"),
            "torch.compile": Variant(torch.compile(modules), "compile", compiled=True),
        }

    def draw(self, shape, device):
        g = torch.Generator().manual_seed(0)
        size = (shape["T"], shape["heads"], shape["H"])
        size = size if shape["layer"] == "rope" else size[::2]
        dtype = getattr(torch, shape["dtype"])
        x, other, first, second = torch.randn(4, *size, generator=g).to(dtype).unbind()
        weight = torch.rand(shape["H"], generator=g).to(dtype)
        angles = torch.rand(shape["T"], shape["H"] // 2, generator=g)
        leaves = [t.to(device).requires_grad_() for t in (x, other)]
        weight = torch.nn.Parameter(weight.to(device))
        return (
            shape["layer"],
            leaves,
            weight,
            angles.to(device),
            [first.to(device), second.to(device)],
        )

    def call(self, variant, inputs, mode):
        return partial(self.results, variant.function, inputs)

    @staticmethod
    def results(function, inputs):
        op, (x, other), weight, angles, upstream = inputs
        outputs = function(op, x, other, weight, angles)
        leaves = {
            "rmsnorm": (x, other, weight),
            "rope": (x, weight),
            "glu": (x, other),
        }[op]
        return *outputs, *torch.autograd.grad(outputs, leaves, upstream[: len(outputs)])

    def gate(self, variant, inputs, shape):
        op, leaves, weight, angles, upstream = inputs
        wide = [x.detach().double().requires_grad_() for x in (*leaves, weight)]
        exact = (op, wide[:2], torch.nn.Parameter(wide[2].detach()), angles.double())
        exact = (*exact, [x.double() for x in upstream])
        truth = self.results(partial(ours, impl="reference"), exact)
        plain = self.results(modules, inputs)
        got = self.results(variant.function, inputs)
        errors, limits = {}, {}
        for i, want in enumerate(truth):
            errors[f"result {i}"] = relative(got[i], want)
            limits[f"result {i}"] = 2 * relative(plain[i], want) + SLACK
        return within(errors, limits)

    def work(self, shape, mode):
        elements = shape["T"] * shape["heads"] * shape["H"]
        size = getattr(torch, shape["dtype"]).itemsize
        return Work(20.0 * elements, float(size * elements * sum(MOVED[shape["layer"]])))


RACE = Layers()
