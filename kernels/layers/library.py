"""The torch operators of this family: schemas, fakes, autograd, call of an implementation.

An implementation is a module beside this one with functions of the operators' names, which take
the operators' arguments but `impl` and return their results.
"""

import torch

from fastrl.kernels.operators import by_last, define, differentiate

MODULES = {"cpu": "cpu", "triton": "triton_launch"}  # of each implementation

_SCHEMAS = {
    # y, h (empty without a residual), 1 / sqrt(mean h^2 + eps)
    "rmsnorm": (
        "(Tensor x, Tensor weight, Tensor? residual, float eps, float weight_offset, str impl)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    # grad of h, which is that of x and of the residual; of weight, empty where not wanted
    "rmsnorm_bwd": (
        "(Tensor h, Tensor weight, Tensor inverse, Tensor grad_y, Tensor? grad_h, "
        "float weight_offset, bool wants_weight, str impl) -> (Tensor, Tensor)"
    ),
    "rope": (
        "(Tensor x, Tensor cos, Tensor sin, Tensor? norm_weight, float eps, float weight_offset, "
        "str impl) -> Tensor"
    ),
    "rope_bwd": (
        "(Tensor x, Tensor cos, Tensor sin, Tensor? norm_weight, float eps, float weight_offset, "
        "Tensor grad_y, bool wants_weight, str impl) -> (Tensor, Tensor)"
    ),
    "glu": "(Tensor gate, Tensor up, str activation, str impl) -> Tensor",
    "glu_bwd": (
        "(Tensor gate, Tensor up, str activation, Tensor grad, str impl) -> (Tensor, Tensor)"
    ),
}


def _fake_rmsnorm(x, weight, residual, *_):
    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), inverse


def _fake_rmsnorm_bwd(h, weight, inverse, grad_y, grad_h, weight_offset, wants_weight, impl):
    return h.new_empty(h.shape), weight.new_empty(weight.shape if wants_weight else 0)


def _fake_rope_bwd(x, cos, sin, norm_weight, eps, weight_offset, grad_y, wants_weight, impl):
    grad_weight = norm_weight.new_empty(norm_weight.shape) if wants_weight else x.new_empty(0)
    return x.new_empty(x.shape), grad_weight


_FAKES = {
    "rmsnorm": _fake_rmsnorm,
    "rmsnorm_bwd": _fake_rmsnorm_bwd,
    "rope": lambda x, *_: x.new_empty(x.shape),
    "rope_bwd": _fake_rope_bwd,
    "glu": lambda gate, *_: gate.new_empty(gate.shape),
    "glu_bwd": lambda gate, up, *_: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
}

for _name, _schema in _SCHEMAS.items():
    define(_name, _schema, by_last(_name, "fastrl.kernels.layers", MODULES), _FAKES[_name])


def _setup_rmsnorm(ctx, inputs, output):
    x, weight, residual, _, ctx.weight_offset, ctx.impl = inputs
    _, h, inverse = output
    ctx.mark_non_differentiable(inverse)
    ctx.set_materialize_grads(False)
    ctx.added = residual is not None
    ctx.save_for_backward(h if ctx.added else x, weight, inverse)


def _rmsnorm_autograd(ctx, grad_y, grad_h, _):
    h, weight, inverse = ctx.saved_tensors
    grad_h = grad_h if ctx.added else None
    if grad_y is None:
        return grad_h, None, grad_h, None, None, None
    wants = ctx.needs_input_grad
    grad, grad_weight = torch.ops.fastrl.rmsnorm_bwd(
        h, weight, inverse, grad_y, grad_h, ctx.weight_offset, wants[1], ctx.impl
    )
    return grad, grad_weight if wants[1] else None, grad if ctx.added else None, None, None, None


def _setup_rope(ctx, inputs, output):
    x, cos, sin, norm_weight, ctx.eps, ctx.weight_offset, ctx.impl = inputs
    # Without a norm the gradient is that of a rotation and needs no x.
    ctx.shape = x.shape
    ctx.save_for_backward(None if norm_weight is None else x, cos, sin, norm_weight)


def _rope_autograd(ctx, grad_y):
    x, cos, sin, norm_weight = ctx.saved_tensors
    wants_weight = norm_weight is not None and ctx.needs_input_grad[3]
    grad, grad_weight = torch.ops.fastrl.rope_bwd(
        grad_y if x is None else x,
        *(cos, sin, norm_weight, ctx.eps, ctx.weight_offset, grad_y, wants_weight, ctx.impl),
    )
    return grad, None, None, grad_weight if wants_weight else None, None, None, None


def _setup_glu(ctx, inputs, output):
    gate, up, ctx.activation, ctx.impl = inputs
    ctx.save_for_backward(gate, up)


def _glu_autograd(ctx, grad):
    gradients = torch.ops.fastrl.glu_bwd(*ctx.saved_tensors, ctx.activation, grad, ctx.impl)
    return *gradients, None, None


differentiate("rmsnorm", _rmsnorm_autograd, _setup_rmsnorm)
differentiate("rope", _rope_autograd, _setup_rope)
differentiate("glu", _glu_autograd, _setup_glu)
