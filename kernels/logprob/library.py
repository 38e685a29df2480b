"""torch.ops.fastrl.linear_logprob: schema, fake, autograd, and the call of the compiled kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.native import module, pointer, threads

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Problem(NamedTuple):
    """The rows that are not ignored, as the kernels read them; tensors are kept alive by it."""

    rows: Tensor
    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    inv_temperature: Tensor
    softcap: float
    logit_scale: float

    def arguments(self):
        """The same as `fastrl._C.linear_args`."""
        c = module()
        kind = {t: getattr(c.Float, str(t).removeprefix("torch.")) for t in FLOATS}
        return c.linear_args(
            *self.hidden.shape,
            self.weight.shape[0],
            pointer(self.hidden),
            kind[self.hidden.dtype],
            pointer(self.weight),
            kind[self.weight.dtype],
            self.weight.stride(0),
            pointer(self.bias),
            pointer(self.inv_temperature),
            pointer(self.target),
            self.logit_scale,
            self.softcap,
        )


def _problem(
    hidden, weight, target, bias, temperatures, temperature, softcap, logit_scale, ignore_index
) -> _Problem:
    flat = target.reshape(-1)
    rows = torch.nonzero(flat != ignore_index).squeeze(-1)
    flat = flat[rows]
    if len(rows) and not 0 <= int(flat.min()) <= int(flat.max()) < weight.shape[0]:
        raise ValueError(
            f"target must lie in [0, V={weight.shape[0]}) or be ignore_index={ignore_index}, "
            f"got values from {int(flat.min())} to {int(flat.max())}"
        )
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if temperatures is None:
        inverse = torch.full((len(rows),), 1 / temperature)
    else:
        inverse = 1 / temperatures.reshape(-1)[rows].float()
    return _Problem(
        rows,
        hidden.contiguous() if len(rows) == len(hidden) else hidden[rows],
        weight if weight.stride(1) == 1 else weight.contiguous(),
        flat,
        None if bias is None else bias.float().contiguous(),
        inverse.contiguous(),
        softcap,
        logit_scale,
    )


_SETTINGS = (
    "Tensor? temperatures, float temperature, float softcap, float logit_scale, int ignore_index"
)
_library = torch.library.Library("fastrl", "FRAGMENT")
_library.define(
    f"linear_logprob(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_logprob_bwd(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, {_SETTINGS}, "
    "Tensor lse, Tensor entropy, Tensor grad_logprob, Tensor grad_lse, Tensor grad_entropy, "
    "bool[] needed) -> (Tensor, Tensor, Tensor)"
)


def _scatter(values: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Values of the kept rows among zeros."""
    if len(rows) == shape.numel():
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_copy_(0, rows, values).view(shape)


def _forward(hidden, weight, target, bias, *settings):
    problem = _problem(hidden, weight, target, bias, *settings)
    results = [torch.empty(len(problem.rows)) for _ in range(3)]
    if len(problem.rows):
        c = module()
        args = c.linear_logprob_fwd_args(problem.arguments(), *map(pointer, results))
        c.linear_logprob_fwd_cpu(args, threads())
    return tuple(_scatter(r, problem.rows, target.shape) for r in results)


def _backward(hidden, weight, target, bias, *rest):
    *settings, lse, entropy, grad_logprob, grad_lse, grad_entropy, needed = rest
    problem = _problem(hidden, weight, target, bias, *settings)
    rows = problem.rows
    given = [
        g.reshape(-1)[rows].float().contiguous()
        for g in (lse, entropy, grad_logprob, grad_lse, grad_entropy)
    ]
    need_hidden, need_weight, need_bias = needed
    nothing = hidden.new_empty(0)
    grad_hidden = torch.empty_like(problem.hidden) if need_hidden else None
    grad_weight = weight.new_empty(weight.shape) if need_weight else None
    grad_bias = torch.empty(weight.shape[0]) if need_bias else None
    if len(rows):
        c = module()
        gradients = map(pointer, (grad_hidden, grad_weight, grad_bias))
        args = c.linear_logprob_bwd_args(problem.arguments(), *map(pointer, given), *gradients)
        c.linear_logprob_bwd_cpu(args, threads())
    else:
        for gradient in (grad_weight, grad_bias):
            if gradient is not None:
                gradient.zero_()
    if grad_hidden is None:
        whole = nothing
    elif len(rows) == target.numel():
        whole = grad_hidden.view(hidden.shape)
    else:
        whole = hidden.new_zeros(target.numel(), hidden.shape[-1])
        whole = whole.index_copy_(0, rows, grad_hidden).view(hidden.shape)
    return (
        whole,
        weight.new_empty(0) if grad_weight is None else grad_weight,
        nothing.clone() if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _fake_forward(hidden, weight, target, bias, *settings):
    return tuple(hidden.new_empty(target.shape, dtype=torch.float32) for _ in range(3))


def _fake_backward(hidden, weight, target, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-1]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        bias.new_empty(bias.shape) if need_bias else hidden.new_empty(0),
    )


def _setup(ctx, inputs, output):
    hidden, weight, target, bias, temperatures, *settings = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, target, bias, temperatures, lse, entropy)
    ctx.settings = settings


def _autograd(ctx, grad_logprob, grad_lse, grad_entropy):
    hidden, weight, target, bias, temperatures, lse, entropy = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = torch.ops.fastrl.linear_logprob_bwd(
        hidden,
        weight,
        target,
        bias,
        temperatures,
        *ctx.settings,
        lse,
        entropy,
        *(
            lse.new_zeros(lse.shape) if g is None else g
            for g in (grad_logprob, grad_lse, grad_entropy)
        ),
        needed,
    )
    grad_hidden, grad_weight, grad_bias = (
        g if need else None for g, need in zip(gradients, needed, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None, None


for _name, _run, _fake in (
    ("linear_logprob", _forward, _fake_forward),
    ("linear_logprob_bwd", _backward, _fake_backward),
):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"fastrl::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "fastrl::linear_logprob", _autograd, setup_context=_setup, lib=_library
)
