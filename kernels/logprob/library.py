"""torch.ops.fastrl.linear_logprob: schema, fake, autograd, and the call of an implementation.

An implementation is a module beside this one with two functions,

    forward(problem, kept) -> (logprob, lse, entropy)
    backward(problem, kept, upstream, needed) -> (grad_hidden, grad_weight, grad_bias)

where `kept` is memory that the forward may fill with what spares the backward work, and, with
`problem.means`, has to.
"""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.operators import define, differentiate

MODULES = {"cpu": "cpu", "triton": "triton_launch", "cuda": "cuda"}  # of each implementation


class Problem(NamedTuple):
    """The op's inputs, in its schema's order."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    target: Tensor  # [...]
    bias: Tensor | None  # [V]
    temperatures: Tensor | None  # [...], or the one temperature
    temperature: float
    softcap: float  # 0 for none
    logit_scale: float
    ignore_index: int
    impl: str
    workspace: int  # bytes of scratch at most, `kept` included; 0 where no backward follows
    means: bool  # the backward is of hidden alone, and `kept` [N, H] float32 what it is made of


class Upstream(NamedTuple):
    """What the backward is given, each [...]: the forward's results, and gradients of them."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    grad_logprob: Tensor
    grad_lse: Tensor
    grad_entropy: Tensor


_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? temperatures, "
    "float temperature, float softcap, float logit_scale, int ignore_index, str impl, "
    "int workspace, bool means"
)
_UPSTREAM = ", ".join(f"Tensor {name}" for name in Upstream._fields)
_TAGS = (torch.Tag.cudagraph_unsafe,)  # on a GPU they wait for the number of ignored rows


def implementation(impl: str):
    """The module of an implementation."""
    return importlib.import_module(f"fastrl.kernels.logprob.{MODULES[impl]}")


def _new_kept(p: Problem) -> Tensor:
    """Room for the means; or for all logits' exponentials, padded, with their maxima, or less."""
    if p.means:
        return p.hidden.new_empty((p.target.numel(), p.hidden.shape[-1]), dtype=torch.float32)
    tokens, vocab = (p.target.numel() + 63) // 64 * 64, (p.weight.shape[0] + 191) // 192 * 192
    everything = 9 * tokens * vocab * p.hidden.element_size() // 8
    return p.hidden.new_empty(torch.sym_min(p.workspace, everything), dtype=torch.uint8)


def _forward(*arguments):
    p = Problem(*arguments)
    kept = _new_kept(p)
    return *implementation(p.impl).forward(p, kept), kept


def _fake_forward(*arguments):
    p = Problem(*arguments)
    statistics = (p.hidden.new_empty(p.target.shape, dtype=torch.float32) for _ in range(3))
    return *statistics, _new_kept(p)


def _split(arguments) -> tuple[Problem, Tensor, Upstream, list[bool]]:
    n = len(Problem._fields)
    *upstream, needed = arguments[n + 1 :]
    return Problem(*arguments[:n]), arguments[n], Upstream(*upstream), needed


def _backward(*arguments):
    p, kept, upstream, needed = _split(arguments)
    gradients = implementation(p.impl).backward(p, kept, upstream, needed)
    return tuple(p.hidden.new_empty(0) if g is None else g for g in gradients)


def _fake_backward(*arguments):
    p, _, _, needed = _split(arguments)
    return tuple(
        like.new_empty(like.shape) if need else p.hidden.new_empty(0)
        for like, need in zip((p.hidden, p.weight, p.bias), needed, strict=True)
    )


def _setup(ctx, inputs, output):
    tensors, ctx.settings = inputs[:5], inputs[5:]
    *statistics, kept = output
    ctx.save_for_backward(*tensors, kept, *statistics)
    ctx.set_materialize_grads(False)  # or there are zeros as large as `kept`


def _autograd(ctx, grad_logprob, grad_lse, grad_entropy, _):
    *tensors, kept, logprob, lse, entropy = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    upstream = (
        torch.zeros_like(lse) if g is None else g for g in (grad_logprob, grad_lse, grad_entropy)
    )
    gradients = torch.ops.fastrl.linear_logprob_bwd(
        *tensors, *ctx.settings, kept, logprob, lse, entropy, *upstream, needed
    )
    hidden, weight, bias = (g if n else None for g, n in zip(gradients, needed, strict=True))
    return hidden, weight, None, bias, *[None] * 8


define(
    "linear_logprob",
    f"({_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    tags=_TAGS,
)
define(
    "linear_logprob_bwd",
    f"({_SCHEMA}, Tensor kept, {_UPSTREAM}, bool[] needed) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    tags=_TAGS,
)
differentiate("linear_logprob", _autograd, _setup)
