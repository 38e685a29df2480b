"""The operators of library.py on a CPU: what csrc/cpu/layers.cpp is called with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.kernels.native import float_kind, module, pointer, threads

LANES = 16  # floats that a kernel reads at a time


def _padded(weight: Tensor, offset: float) -> Tensor:
    """What a norm multiplies by, in float32, with zeros up to whole vectors."""
    wide = weight.detach().float()
    wide = wide + offset if offset else wide.contiguous()
    return F.pad(wide, (0, -len(wide) % LANES)) if len(wide) % LANES else wide


def rmsnorm(x, weight, residual, eps, weight_offset) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    h = x.new_empty(0 if residual is None else x.shape)
    scale = _padded(weight, weight_offset)
    module().rmsnorm_cpu(
        *(inverse.numel(), x.shape[-1], float_kind(x.dtype)),
        *map(pointer, (x, residual, scale)),
        *(eps, pointer(h), pointer(y), pointer(inverse), threads()),
    )
    return y, h, inverse


def rmsnorm_bwd(h, weight, inverse, grad_y, grad_h, weight_offset, wants_weight):
    h, grad_y = h.contiguous(), grad_y.contiguous()
    grad_h = None if grad_h is None else grad_h.contiguous()
    grad, scale = torch.empty_like(h), _padded(weight, weight_offset)
    grad_weight = scale.new_empty(len(weight) if wants_weight else 0)
    module().rmsnorm_bwd_cpu(
        *(inverse.numel(), h.shape[-1], float_kind(h.dtype)),
        *map(pointer, (h, scale, inverse, grad_y, grad_h, grad)),
        *(pointer(grad_weight if wants_weight else None), threads()),
    )
    return grad, grad_weight.to(weight.dtype)


def _rope_args(x, cos, sin, norm_weight, eps, weight_offset, out):
    """The same as `fastrl._C.rope_args`, and the tensors it points into."""
    scale = None if norm_weight is None else _padded(norm_weight, weight_offset)
    kept = x, cos.float().contiguous(), sin.float().contiguous(), scale
    args = module().rope_args(*x.shape, float_kind(x.dtype), *map(pointer, kept), eps, pointer(out))
    return args, kept


def rope(x, cos, sin, norm_weight, eps, weight_offset) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    args, _kept = _rope_args(x, cos, sin, norm_weight, eps, weight_offset, out)
    module().rope_cpu(args, threads())
    return out


def rope_bwd(x, cos, sin, norm_weight, eps, weight_offset, grad_y, wants_weight):
    x, grad_y = x.contiguous(), grad_y.contiguous()
    grad = torch.empty_like(grad_y)
    grad_weight = x.new_empty(x.shape[-1] if wants_weight else 0, dtype=torch.float32)
    args, _kept = _rope_args(x, cos, sin, norm_weight, eps, weight_offset, None)
    module().rope_bwd_cpu(
        args,
        *map(pointer, (grad_y, grad, grad_weight if wants_weight else None)),
        threads(),
    )
    return grad, grad_weight.to(x.dtype if norm_weight is None else norm_weight.dtype)


def glu(gate, up, activation) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    c = module()
    kind, gelu = float_kind(gate.dtype), activation == "gelu_tanh"
    addresses = pointer(gate), pointer(up)
    c.glu_cpu(c.glu_args(gate.numel(), kind, *addresses, gelu, pointer(out)), threads())
    return out


def glu_bwd(gate, up, activation, grad) -> tuple[Tensor, Tensor]:
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    c = module()
    kind, gelu = float_kind(gate.dtype), activation == "gelu_tanh"
    args = c.glu_args(gate.numel(), kind, pointer(gate), pointer(up), gelu, 0)
    c.glu_bwd_cpu(args, *map(pointer, (grad, to_gate, to_up)), threads())
    return to_gate, to_up
