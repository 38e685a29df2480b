"""The ops on a CPU: what csrc/cpu/logprob.cpp, sample.cpp and logits.cpp are called with."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.logprob.draws import Draws
from fastrl.kernels.logprob.given import Given, Returning
from fastrl.kernels.logprob.library import Problem, Upstream
from fastrl.kernels.native import float_kind, module, pointer, threads
from fastrl.kernels.quant.cpu import Int8Rows


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
    int8: Int8Rows | None = None  # for draws: the weight instead

    def arguments(self):
        """The same as `fastrl._C.linear_args`."""
        weight, scale, sums = self.int8 or (self.weight, None, None)
        return module().linear_args(
            self.count,
            self.hidden.shape[1],
            self.weight.shape[0],
            pointer(self.index),
            pointer(self.hidden),
            float_kind(self.hidden.dtype),
            pointer(weight),
            float_kind(self.weight.dtype),
            weight.stride(0),
            pointer(self.bias),
            pointer(self.inv_temperature),
            pointer(self.target),
            self.logit_scale,
            self.softcap,
            pointer(scale),
            pointer(sums),
        )


def _check_range(target: Tensor, vocab: int, otherwise: str = "") -> None:
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < vocab:
        raise ValueError(
            f"target must lie in [0, V={vocab}){otherwise}, "
            f"got values from {int(target.min())} to {int(target.max())}"
        )


def _rows(p: Problem) -> _Rows:
    target = p.target.reshape(-1).contiguous()
    index = torch.nonzero(target != p.ignore_index).squeeze(-1)
    valid = target if len(index) == len(target) else target[index]
    _check_range(valid, p.weight.shape[0], f" or be ignore_index={p.ignore_index}")
    return _Rows(
        len(index),
        None if len(index) == len(target) else index,
        p.hidden.reshape(-1, p.hidden.shape[-1]).contiguous(),
        _readable(p.weight),
        target,
        _readable_bias(p.bias),
        _inverse(p, len(target)),
        p.softcap,
        p.logit_scale,
    )


def _inverse(p: Problem | Given, rows: int) -> Tensor:
    if p.temperatures is None:
        return torch.full((rows,), 1 / p.temperature)
    return 1 / p.temperatures.reshape(-1).float()


def _readable(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _readable_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _workspace(p: Problem, kept: Tensor):
    if p.keeps == "means":
        return module().workspace(0, 0, 0, False)
    return module().workspace(p.workspace, pointer(kept), kept.nbytes, p.keeps == "in_gradient")


def _means(p: Problem, kept: Tensor) -> Tensor | None:
    return kept if p.keeps == "means" else None


def forward(p: Problem, kept: Tensor) -> tuple[Tensor, ...]:
    rows = _rows(p)
    new = torch.empty if rows.index is None else torch.zeros  # ignored rows stay 0
    results = [new(p.target.shape) for _ in range(3)]
    if rows.count:
        c = module()
        args = c.linear_logprob_fwd_args(
            rows.arguments(),
            _workspace(p, kept),
            *map(pointer, (*results, _means(p, kept))),
        )
        c.linear_logprob_fwd_cpu(args, threads())
    return tuple(results)


def backward(
    p: Problem, kept: Tensor, upstream: Upstream, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    rows = _rows(p)
    given = [x.reshape(-1).float().contiguous() for x in upstream]
    need_hidden, need_weight, need_bias = needed
    assert p.keeps != "means" or not (need_weight or need_bias), "means are of hidden's gradient"
    new = torch.empty if rows.index is None else torch.zeros
    grad_hidden = new(p.hidden.shape, dtype=p.hidden.dtype) if need_hidden else None
    new = torch.empty if rows.count else torch.zeros
    grad_weight = None
    if p.keeps == "in_gradient":
        grad_weight = kept if rows.count else kept.zero_()
    elif need_weight:
        grad_weight = new(p.weight.shape, dtype=p.weight.dtype)
    grad_bias = new(p.weight.shape[0]) if need_bias else None
    if rows.count:
        c = module()
        args = c.linear_logprob_bwd_args(
            rows.arguments(),
            _workspace(p, kept),
            *map(pointer, (*given[:3], _means(p, kept), *given[3:])),
            *map(pointer, (grad_hidden, grad_weight, grad_bias)),
        )
        c.linear_logprob_bwd_cpu(args, threads())
    return (
        grad_hidden,
        grad_weight,
        None if grad_bias is None or p.bias is None else grad_bias.to(p.bias.dtype),
    )


class Drawing(NamedTuple):
    """Draws as the kernels read them, and where they leave them; it keeps their tensors alive."""

    rows: _Rows
    draws: Draws
    token: Tensor
    logprob: Tensor
    untruncated: Tensor

    @classmethod
    def of(cls, d: Draws, *shape: int, int8: Int8Rows | None = None) -> "Drawing":
        """Results of a shape, which the kernel fills; `int8` stands for the weight."""
        count = len(d.seeds)
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
            int8,
        )
        d = d._replace(seeds=d.seeds.contiguous(), positions=d.positions.contiguous())
        token = torch.empty(shape, dtype=torch.int64)
        return cls(rows, d, token, torch.empty(shape), torch.empty(shape))

    def arguments(self):
        """The same as `fastrl._C.linear_sample_args`."""
        d = self.draws
        return module().linear_sample_args(
            self.rows.arguments(),
            pointer(d.seeds),
            pointer(d.positions),
            d.temperature == 0,
            d.top_k,
            d.top_p,
            d.min_p,
            *map(pointer, self[2:]),
        )


def sample(d: Draws, int8: Int8Rows | None = None) -> tuple[Tensor, ...]:
    drawing = Drawing.of(d, len(d.hidden), int8=int8)
    if len(d.hidden):
        module().linear_sample_cpu(drawing.arguments(), threads())
    return drawing[2:]


class _Held(NamedTuple):
    """Logits as the kernels read them; it keeps their tensors alive."""

    logits: Tensor
    offset: Tensor  # of each row from the first
    inv_temperature: Tensor
    target: Tensor  # [N, K]

    def arguments(self):
        """The same as `fastrl._C.logits_args`."""
        rows, targets = self.target.shape
        return module().logits_args(
            rows,
            self.logits.shape[-1],
            targets,
            pointer(self.logits),
            float_kind(self.logits.dtype),
            *map(pointer, (self.offset, self.inv_temperature, self.target)),
        )


def _held(g: Given) -> _Held:
    logits, rows = g.logits, g.logits.shape[:-1].numel()
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    _check_range(g.target, logits.shape[-1])
    offset = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        offset = (offset.unsqueeze(-1) + torch.arange(size) * stride).flatten()
    target = g.target.contiguous().view(rows, g.target.numel() // max(rows, 1))
    return _Held(logits, offset, _inverse(g, rows), target)


def logits_forward(g: Given) -> tuple[Tensor, ...]:
    held, rows = _held(g), g.logits.shape[:-1]
    results = torch.empty(g.target.shape), torch.empty(rows), torch.empty(rows)
    if rows.numel():
        c = module()
        args = c.logits_logprob_fwd_args(held.arguments(), *map(pointer, results))
        c.logits_logprob_fwd_cpu(args, threads())
    return results


def logits_backward(g: Given, returning: Returning, into: Tensor) -> None:
    held = _held(g)
    given = [x.float().contiguous() for x in returning]
    if into.numel():
        c = module()
        args = c.logits_logprob_bwd_args(held.arguments(), *map(pointer, (*given, into)))
        c.logits_logprob_bwd_cpu(args, threads())
