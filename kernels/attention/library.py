"""torch.ops.fastrl.shared_prefix_attention: schema, fake, autograd, call of an implementation.

An implementation is a module beside this one with two functions,

    forward(problem, out, lse, rest), which fills the last three
    backward(problem, out, lse, rest, grad_out, grad_lse) -> (grad_q, grad_k, grad_v)

Both parts of a query's attention, its prompt and its own segment, share one softmax: `out` and
`lse` are of the two together, and that is all the backward needs of either. `rest` is what rounding
took from `out`, a byte for each element, empty where nothing was rounded, no gradient is wanted or
the implementation has no use for it.
"""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.attention.layout import GroupLayout
from fastrl.kernels.operators import define, differentiate

WIDEST = 256  # head size of the GPU's kernels
MODULES = {"cpu": "cpu", "triton": "triton_launch", "flash": "flash"}  # of each implementation


class Problem(NamedTuple):
    """The op's inputs, in its schema's order."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [T, Hkv, D]
    v: Tensor  # [T, Hkv, D]
    offsets: Tensor
    groups: Tensor
    scale: float
    softcap: float  # 0 for none
    window: int  # 0 for none
    impl: str
    differentiated: bool

    @property
    def layout(self) -> GroupLayout:
        return GroupLayout(self.offsets, self.groups)


_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor groups, "
    "float scale, float softcap, int window, str impl, bool differentiated"
)


def _implementation(impl: str):
    return importlib.import_module(f"fastrl.kernels.attention.{MODULES[impl]}")


def _fake_forward(*arguments):
    p = Problem(*arguments)
    rounds = p.differentiated and p.q.dtype != torch.float32 and p.impl != "flash"
    return (
        p.q.new_empty(p.q.shape),
        p.q.new_empty(p.q.shape[:2], dtype=torch.float32),
        p.q.new_empty(p.q.shape if rounds else 0, dtype=torch.int8),
    )


def _forward(*arguments):
    outputs = _fake_forward(*arguments)
    p = Problem(*arguments)
    _implementation(p.impl).forward(p, *outputs)
    return outputs


def _backward(*arguments):
    p = Problem(*arguments[: len(Problem._fields)])
    return _implementation(p.impl).backward(p, *arguments[len(Problem._fields) :])


def _fake_backward(*arguments):
    p = Problem(*arguments[: len(Problem._fields)])
    return tuple(x.new_empty(x.shape) for x in (p.q, p.k, p.v))


def _setup(ctx, inputs, output):
    ctx.settings = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.set_materialize_grads(False)  # a logsumexp that nobody uses costs nothing


def _autograd(ctx, grad_out, grad_lse, _):
    *tensors, out, lse, rest = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    gradients = torch.ops.fastrl.shared_prefix_attention_bwd(
        *tensors, *ctx.settings, out, lse, rest, grad_out, grad_lse
    )
    return *gradients, *[None] * 7


define(
    "shared_prefix_attention",
    f"({_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
define(
    "shared_prefix_attention_bwd",
    f"({_SCHEMA}, Tensor out, Tensor lse, Tensor rest, Tensor grad_out, Tensor? grad_lse)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
differentiate("shared_prefix_attention", _autograd, _setup)
