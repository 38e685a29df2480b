"""linear_logprob on a CPU: what csrc/cpu/logprob.cpp is called with."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.logprob.library import FLOATS, Problem, Upstream
from fastrl.kernels.native import module, pointer, threads


class _Rows(NamedTuple):
    """The rows that are not ignored, as the kernels read them; it keeps their tensors alive."""

    index: Tensor
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


def _kept_rows(p: Problem) -> _Rows:
    flat = p.target.reshape(-1)
    index = torch.nonzero(flat != p.ignore_index).squeeze(-1)
    flat = flat[index]
    if len(index) and not 0 <= int(flat.min()) <= int(flat.max()) < p.weight.shape[0]:
        raise ValueError(
            f"target must lie in [0, V={p.weight.shape[0]}) or be ignore_index={p.ignore_index}, "
            f"got values from {int(flat.min())} to {int(flat.max())}"
        )
    hidden = p.hidden.reshape(-1, p.hidden.shape[-1])
    if p.temperatures is None:
        inverse = torch.full((len(index),), 1 / p.temperature)
    else:
        inverse = 1 / p.temperatures.reshape(-1)[index].float()
    return _Rows(
        index,
        hidden.contiguous() if len(index) == len(hidden) else hidden[index],
        p.weight if p.weight.stride(1) == 1 else p.weight.contiguous(),
        flat,
        None if p.bias is None else p.bias.float().contiguous(),
        inverse.contiguous(),
        p.softcap,
        p.logit_scale,
    )


def _scatter(values: Tensor, index: Tensor, rows: torch.Size) -> Tensor:
    """[*rows, ...] with the values of the kept rows among zeros."""
    if len(index) < rows.numel():
        whole = values.new_zeros(rows.numel(), *values.shape[1:])
        values = whole.index_copy_(0, index, values)
    # Not a view of `values`, which nobody else holds: FSDP2 warns of outputs that are views.
    return torch.ops.aten._unsafe_view(values, [*rows, *values.shape[1:]])


def forward(p: Problem, kept: Tensor) -> tuple[Tensor, ...]:
    rows = _kept_rows(p)
    results = [torch.empty(len(rows.index)) for _ in range(3)]
    if len(rows.index):
        c = module()
        args = c.linear_logprob_fwd_args(rows.arguments(), *map(pointer, results))
        c.linear_logprob_fwd_cpu(args, threads())
    return tuple(_scatter(r, rows.index, p.target.shape) for r in results)


def backward(
    p: Problem, kept: Tensor, upstream: Upstream, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    rows = _kept_rows(p)
    given = [x.reshape(-1)[rows.index].float().contiguous() for x in upstream]
    need_hidden, need_weight, need_bias = needed
    grad_hidden = torch.empty_like(rows.hidden) if need_hidden else None
    grad_weight = p.weight.new_empty(p.weight.shape) if need_weight else None
    grad_bias = torch.empty(p.weight.shape[0]) if need_bias else None
    if len(rows.index):
        c = module()
        gradients = map(pointer, (grad_hidden, grad_weight, grad_bias))
        args = c.linear_logprob_bwd_args(rows.arguments(), *map(pointer, given), *gradients)
        c.linear_logprob_bwd_cpu(args, threads())
    else:
        for gradient in (grad_weight, grad_bias):
            if gradient is not None:
                gradient.zero_()
    return (
        None if grad_hidden is None else _scatter(grad_hidden, rows.index, p.target.shape),
        grad_weight,
        None if grad_bias is None or p.bias is None else grad_bias.to(p.bias.dtype),
    )
