"""The ops of the lm-head on a CPU: what csrc/cpu/logprob.cpp and sample.cpp are called with."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.logprob.draws import Draws
from fastrl.kernels.logprob.library import FLOATS, Problem, Upstream
from fastrl.kernels.native import module, pointer, threads


class _Rows(NamedTuple):
    """The rows to compute, as the kernels read them; it keeps their tensors alive."""

    count: int
    index: Tensor | None  # of these rows, if there are others
    hidden: Tensor
    weight: Tensor
    target: Tensor | None
    bias: Tensor | None
    inv_temperature: Tensor
    softcap: float
    logit_scale: float

    def arguments(self):
        """The same as `fastrl._C.linear_args`."""
        c = module()
        kind = {t: getattr(c.Float, str(t).removeprefix("torch.")) for t in FLOATS}
        return c.linear_args(
            self.count,
            self.hidden.shape[1],
            self.weight.shape[0],
            pointer(self.index),
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


def _rows(p: Problem) -> _Rows:
    target = p.target.reshape(-1).contiguous()
    index = torch.nonzero(target != p.ignore_index).squeeze(-1)
    valid = target if len(index) == len(target) else target[index]
    if len(index) and not 0 <= int(valid.min()) <= int(valid.max()) < p.weight.shape[0]:
        raise ValueError(
            f"target must lie in [0, V={p.weight.shape[0]}) or be ignore_index={p.ignore_index}, "
            f"got values from {int(valid.min())} to {int(valid.max())}"
        )
    if p.temperatures is None:
        inverse = torch.full((len(target),), 1 / p.temperature)
    else:
        inverse = 1 / p.temperatures.reshape(-1).float()
    return _Rows(
        len(index),
        None if len(index) == len(target) else index,
        p.hidden.reshape(-1, p.hidden.shape[-1]).contiguous(),
        _readable(p.weight),
        target,
        _readable_bias(p.bias),
        inverse,
        p.softcap,
        p.logit_scale,
    )


def _readable(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _readable_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _workspace(p: Problem, kept: Tensor):
    return module().workspace(p.workspace, pointer(kept), kept.numel())


def forward(p: Problem, kept: Tensor) -> tuple[Tensor, ...]:
    rows = _rows(p)
    new = torch.empty if rows.index is None else torch.zeros  # ignored rows stay 0
    results = [new(p.target.shape) for _ in range(3)]
    if rows.count:
        c = module()
        args = c.linear_logprob_fwd_args(
            rows.arguments(), _workspace(p, kept), *map(pointer, results)
        )
        c.linear_logprob_fwd_cpu(args, threads())
    return tuple(results)


def backward(
    p: Problem, kept: Tensor, upstream: Upstream, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    rows = _rows(p)
    given = [x.reshape(-1).float().contiguous() for x in upstream]
    need_hidden, need_weight, need_bias = needed
    new = torch.empty if rows.index is None else torch.zeros
    grad_hidden = new(p.hidden.shape, dtype=p.hidden.dtype) if need_hidden else None
    new = torch.empty if rows.count else torch.zeros
    grad_weight = new(p.weight.shape, dtype=p.weight.dtype) if need_weight else None
    grad_bias = new(p.weight.shape[0]) if need_bias else None
    if rows.count:
        c = module()
        args = c.linear_logprob_bwd_args(
            rows.arguments(),
            _workspace(p, kept),
            *map(pointer, (*given, grad_hidden, grad_weight, grad_bias)),
        )
        c.linear_logprob_bwd_cpu(args, threads())
    return (
        grad_hidden,
        grad_weight,
        None if grad_bias is None or p.bias is None else grad_bias.to(p.bias.dtype),
    )


def sample(d: Draws) -> tuple[Tensor, ...]:
    count = len(d.hidden)
    rows = _Rows(
        count,
        None,
        d.hidden.contiguous(),
        _readable(d.weight),
        None,
        _readable_bias(d.bias),
        torch.full((count,), 1 / (d.temperature or 1.0)),
        d.softcap,
        d.logit_scale,
    )
    seeds, positions = d.seeds.contiguous(), d.positions.contiguous()
    token, logprob, untruncated = torch.empty_like(seeds), torch.empty(count), torch.empty(count)
    if count:
        c = module()
        args = c.linear_sample_args(
            rows.arguments(),
            pointer(seeds),
            pointer(positions),
            d.temperature == 0,
            d.top_k,
            d.top_p,
            d.min_p,
            *map(pointer, (token, logprob, untruncated)),
        )
        c.linear_sample_cpu(args, threads())
    return token, logprob, untruncated
