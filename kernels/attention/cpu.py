"""shared_prefix_attention on a CPU: what csrc/cpu/attention.cpp is called with."""

from torch import Tensor

from fastrl.kernels.attention.library import Problem
from fastrl.kernels.native import float_kind, module, pointer, threads


def _rows(x: Tensor) -> Tensor:
    """[T, H, D] with the elements of a row side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _heads(x: Tensor):
    return module().Heads(pointer(x), x.stride(0), x.stride(1))


def _arguments(p: Problem):
    """The same as `fastrl._C.attention_args`, and the tensors it points into."""
    p.layout.check(len(p.q))
    kept = (*map(_rows, (p.q, p.k, p.v)), p.offsets.contiguous(), p.groups.contiguous())
    q, k, v, offsets, groups = kept
    c = module()
    arguments = c.attention_args(
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        pointer(offsets),
        pointer(groups),
        len(groups) - 1,
        float_kind(q.dtype),
        *map(_heads, (q, k, v)),
        p.scale,
        p.softcap,
        p.window,
    )
    return arguments, kept


def _rest(rest: Tensor) -> int:
    return pointer(rest if rest.numel() else None)


def forward(p: Problem, out: Tensor, lse: Tensor, rest: Tensor) -> None:
    arguments, _kept = _arguments(p)
    c = module()
    args = c.attention_fwd_args(arguments, pointer(out), _rest(rest), pointer(lse))
    c.shared_prefix_attention_fwd_cpu(args, threads())


def backward(
    p: Problem,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments, _kept = _arguments(p)
    out, lse, grad_out = _rows(out), lse.contiguous(), _rows(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    gradients = tuple(x.new_empty(x.shape) for x in (p.q, p.k, p.v))
    c = module()
    args = c.attention_bwd_args(
        arguments,
        _heads(out),
        _rest(rest),
        pointer(lse),
        _heads(grad_out),
        pointer(grad_lse),
        *map(pointer, gradients),
    )
    c.shared_prefix_attention_bwd_cpu(args, threads())
    return gradients
