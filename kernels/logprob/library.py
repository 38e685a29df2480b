"""torch.ops.fastrl.linear_logprob: schema, fake, autograd, and the call of an implementation.

An implementation is a module beside this one with two functions,

    forward(problem, kept) -> (logprob, lse, entropy)
    backward(problem, kept, upstream, needed) -> (grad_hidden, grad_weight, grad_bias)

where `kept` is memory that the forward may fill with what spares the backward work, and, of means,
has to. If `problem.keeps` is "in_gradient", grad_weight is `kept`.
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
    keeps: str  # what `kept` is of, and so how large: one of KEEPS


KEEPS = (
    "exponentials",  # of the logits, in bytes of the workspace
    "in_gradient",  # the same, in the memory of grad_weight [V, H]
    "means",  # of the weight's rows, [N, H] float32, of which the gradient of hidden alone is made
)


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
    "int workspace, str keeps"
)
_UPSTREAM = ", ".join(f"Tensor {name}" for name in Upstream._fields)
_TAGS = (torch.Tag.cudagraph_unsafe,)  # on a GPU they wait for the number of ignored rows


def implementation(impl: str):
    """The module of an implementation."""
    return importlib.import_module(f"fastrl.kernels.logprob.{MODULES[impl]}")


def _room_for_all(hidden: Tensor, weight: Tensor, target: Tensor) -> int:
    """Bytes of all logits' exponentials, padded, with their maxima."""
    tokens, vocab = (target.numel() + 63) // 64 * 64, (weight.shape[0] + 191) // 192 * 192
    return 9 * tokens * vocab * hidden.element_size() // 8


def where_exponentials_fit(hidden: Tensor, weight: Tensor, target: Tensor, workspace: int) -> str:
    """In the workspace, of which scratch may take half, or, if that has more room, in_gradient."""
    if torch.compiler.is_compiling():
        return "exponentials"  # compiled code may copy what the backward writes to
    fits = workspace // 2 >= min(weight.nbytes, _room_for_all(hidden, weight, target))
    return "exponentials" if fits else "in_gradient"


def _new_kept(p: Problem) -> Tensor:
    if p.keeps == "means":
        return p.hidden.new_empty((p.target.numel(), p.hidden.shape[-1]), dtype=torch.float32)
    if p.keeps == "in_gradient":
        return p.weight.new_empty(p.weight.shape)
    everything = _room_for_all(p.hidden, p.weight, p.target)
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


def _backward_(*arguments):
    hidden, _, bias = _backward(*arguments)
    return hidden, bias


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
    ctx.spent = False
    ctx.set_materialize_grads(False)  # or there are zeros as large as `kept`


def _autograd(ctx, grad_logprob, grad_lse, grad_entropy, _):
    if ctx.spent:  # hooks on saved tensors may keep autograd from seeing it
        raise RuntimeError(
            "linear_logprob was called with inplace_backward=True, for one backward alone: the "
            "first one has overwritten what a second one needs"
        )
    *tensors, kept, logprob, lse, entropy = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    upstream = (
        torch.zeros_like(lse) if g is None else g for g in (grad_logprob, grad_lse, grad_entropy)
    )
    problem, given = (*tensors, *ctx.settings), (logprob, lse, entropy, *upstream, needed)
    if Problem(*problem).keeps == "in_gradient":
        ctx.spent = True
        gradient = kept.detach()
        hidden, bias = torch.ops.fastrl.linear_logprob_bwd_(*problem, gradient, *given)
        gradients = hidden, gradient, bias
    else:
        gradients = torch.ops.fastrl.linear_logprob_bwd(*problem, kept, *given)
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
define(
    "linear_logprob_bwd_",
    f"({_SCHEMA}, Tensor(a!) kept, {_UPSTREAM}, bool[] needed) -> (Tensor, Tensor)",
    _backward_,
    lambda *arguments: _fake_backward(*arguments)[::2],
    tags=_TAGS,
)
differentiate("linear_logprob", _autograd, _setup)
