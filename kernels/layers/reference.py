"""The layers' ops in plain PyTorch; autograd has their gradients."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normed(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """In float32 or float64."""
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse * (weight_offset + weight.to(x.dtype))


def rmsnorm(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    h = x if residual is None else x + residual
    return _normed(_wide(h), weight, eps, weight_offset).to(x.dtype), h


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight_offset: float,
) -> Tensor:
    wide = _wide(x)
    if norm_weight is not None:
        wide = _normed(wide, norm_weight, eps, weight_offset)
    one, two = wide.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    g = _wide(gate)
    acted = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")
    return (acted * _wide(up)).to(gate.dtype)
