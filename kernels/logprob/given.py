"""torch.ops.fastrl.logprob_from_logits: schema, fake, autograd, and the call of an implementation.

An implementation is a module named in `library.MODULES` with

    logits_forward(given) -> (logprob, lse, entropy)
    logits_backward(given, returning, into)      `into` is contiguous; it may be the logits
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.logprob.library import implementation
from fastrl.kernels.operators import define, differentiate


class Given(NamedTuple):
    """The op's inputs, in its schema's order."""

    logits: Tensor  # [..., V]
    target: Tensor  # [...] or [..., K]
    temperatures: Tensor | None  # [...], or the one temperature
    temperature: float
    inplace_backward: bool
    impl: str


class Returning(NamedTuple):
    """What the backward is given: the forward's statistics, and gradients of its results."""

    lse: Tensor  # [...]
    entropy: Tensor  # [...]
    grad_logprob: Tensor  # as target
    grad_lse: Tensor  # [...]
    grad_entropy: Tensor  # [...]


def _forward(*arguments):
    g = Given(*arguments)
    return implementation(g.impl).logits_forward(g)


def _fake_forward(*arguments):
    g = Given(*arguments)
    rows = g.logits.shape[:-1]
    shapes = (g.target.shape, rows, rows)
    return tuple(g.logits.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _split(arguments) -> tuple[Given, Returning]:
    n = len(Given._fields)
    return Given(*arguments[:n]), Returning(*arguments[n:])


def _backward(*arguments):
    g, returning = _split(arguments)
    gradient = _fake_backward(*arguments)
    implementation(g.impl).logits_backward(g, returning, gradient)
    return gradient


def _fake_backward(*arguments):
    g, _ = _split(arguments)
    return g.logits.new_empty(g.logits.shape)


def _backward_inplace(*arguments):
    g, returning = _split(arguments)
    implementation(g.impl).logits_backward(g, returning, g.logits)


def _fake_backward_inplace(*arguments):
    return None


def _setup(ctx, inputs, output):
    tensors, ctx.settings = inputs[:3], inputs[3:]
    ctx.save_for_backward(*tensors, *output[1:])


def _autograd(ctx, *grads):
    logits, target, temperatures, lse, entropy = ctx.saved_tensors
    upstream = (
        lse.new_zeros(shape) if grad is None else grad
        for grad, shape in zip(grads, (target.shape, lse.shape, lse.shape), strict=True)
    )
    rest = (target, temperatures, *ctx.settings, lse, entropy, *upstream)
    if not Given(logits, target, temperatures, *ctx.settings).inplace_backward:
        return torch.ops.fastrl.logprob_from_logits_bwd(logits, *rest), *[None] * 5
    gradient = logits.detach()
    torch.ops.fastrl.logprob_from_logits_bwd_(gradient, *rest)
    # Whatever else in the graph has saved the logits must find out.
    torch.autograd.graph.increment_version(gradient)
    return gradient, *[None] * 5


_ARGUMENTS = (
    "Tensor target, Tensor? temperatures, float temperature, bool inplace_backward, str impl"
)
_RETURNING = ", ".join(f"Tensor {name}" for name in Returning._fields)
for _name, _tail, _run, _fake in (
    ("", f"(Tensor logits, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward),
    ("_bwd", f"(Tensor logits, {_ARGUMENTS}, {_RETURNING}) -> Tensor", _backward, _fake_backward),
    (
        "_bwd_",
        f"(Tensor(a!) logits, {_ARGUMENTS}, {_RETURNING}) -> ()",
        _backward_inplace,
        _fake_backward_inplace,
    ),
):
    define(f"logprob_from_logits{_name}", _tail, _run, _fake)
differentiate("logprob_from_logits", _autograd, _setup)
