"""shared_prefix_attention with the flash attention of others: flash-attn's kernels or PyTorch's.

Two calls: `own`, every segment causally to itself, over the packed tokens as they lie; `shared`,
all of a group's completions to their prompt, which is one dense product of matrices, with the
query heads of a key head as further rows. With lse_o and lse_s the logsumexps of the two,

    lse = log(exp lse_o + exp lse_s)      out = exp(lse_o - lse) out_o + exp(lse_s - lse) out_s

in float32. The backward of each, given the merged out and lse, makes the probabilities of the whole
softmax, so their sum is the gradient; a prompt's keys get theirs from one call, which adds up its
completions in their order. On a GPU the kernels round out_o, out_s and the gradients of each part
to the dtype of the inputs, which no merge brings back and our own kernels need not do.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastrl.kernels.attention.layout import GroupLayout
from fastrl.kernels.attention.library import WIDEST, Problem
from fastrl.kernels.native import flash_attn_version

_aten = torch.ops.aten
MULTIPLE = 8  # of a head size, as the kernels want it


class Spans(NamedTuple):
    """Sequences packed one after another: the bounds of their queries and of their keys."""

    queries: list[int]
    keys: list[int]
    causal: bool

    def slices(self) -> Iterator[tuple[slice, slice]]:
        pairs = zip(itertools.pairwise(self.queries), itertools.pairwise(self.keys), strict=True)
        return ((slice(*q), slice(*k)) for q, k in pairs)

    def arguments(self, device: torch.device) -> tuple:
        """Both bounds on the device, then the longest of each."""
        bounds = (torch.tensor(x, dtype=torch.int32) for x in (self.queries, self.keys))
        longest = (max(b - a for a, b in itertools.pairwise(x)) for x in (self.queries, self.keys))
        return *(x.to(device) for x in bounds), *longest


class Scores(NamedTuple):
    """How a score is made of a query and a key."""

    scale: float
    softcap: float  # 0 for none


# ---- the kernels: q [N, Hq, D], k and v [M, Hkv, D], lse [N, Hq] float32 -------------------------


def _dense(x: Tensor) -> Tensor:
    return x.float().transpose(0, 1).unsqueeze(0)


class OnCPU:
    """PyTorch's flash attention for CPUs, sequence by sequence.

    In float32: of 16-bit inputs it would add up the query heads of a key head in 16 bits.
    """

    @staticmethod
    def forward(q, k, v, spans: Spans, scores: Scores):
        out = torch.empty_like(q, dtype=torch.float32)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        for rows, keys in spans.slices():
            given = map(_dense, (q[rows], k[keys], v[keys]))
            part, sums = _aten._scaled_dot_product_flash_attention_for_cpu(
                *given, 0.0, spans.causal, scale=scores.scale
            )
            out[rows], lse[rows] = part[0].transpose(0, 1), sums[0].T
        return out, lse

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, spans: Spans, scores: Scores):
        gradients = tuple(torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))
        for rows, keys in spans.slices():
            given = map(_dense, (grad_out[rows], q[rows], k[keys], v[keys], out[rows]))
            parts = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(*given, lse[rows].T.contiguous().unsqueeze(0), 0.0, spans.causal),
                scale=scores.scale,
            )
            for gradient, part, where in zip(gradients, parts, (rows, keys, keys), strict=True):
                gradient[where] = part[0].transpose(0, 1)
        return gradients


class OfTorch:
    """PyTorch's flash attention for GPUs."""

    @staticmethod
    def forward(q, k, v, spans: Spans, scores: Scores):
        out, lse, *_ = _aten._flash_attention_forward(
            *(q, k, v, *spans.arguments(q.device), 0.0, spans.causal, False), scale=scores.scale
        )
        return out, lse.T

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, spans: Spans, scores: Scores):
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
        with _deterministic():
            return _aten._flash_attention_backward(
                *(grad_out, q, k, v, out, lse.T.contiguous(), *spans.arguments(q.device)),
                *(0.0, spans.causal, *no_dropout),
                scale=scores.scale,
            )


class OfPackage:
    """flash-attn's kernels (versions: `fastrl.kernels.native.FLASH_ATTN`)."""

    @staticmethod
    def forward(q, k, v, spans: Spans, scores: Scores):
        from flash_attn import flash_attn_interface

        out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(
            *(q, k, v, *spans.arguments(q.device), 0.0, scores.scale, spans.causal),
            softcap=scores.softcap,
        )
        return out, lse.T

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, spans: Spans, scores: Scores):
        from flash_attn import flash_attn_interface

        gradients = tuple(map(torch.empty_like, (q, k, v)))
        flash_attn_interface._flash_attn_varlen_backward(
            *(grad_out, q, k, v, out, lse.T.contiguous(), *gradients),
            *(*spans.arguments(q.device), 0.0, scores.scale, spans.causal),
            window_size_left=-1,
            window_size_right=-1,
            softcap=scores.softcap,
            alibi_slopes=None,
            deterministic=True,
        )
        return gradients


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch has no argument for it: otherwise queries' gradients are summed in any order."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def kernels(device: torch.device) -> type[OnCPU] | type[OfTorch] | type[OfPackage]:
    """Those that run on a device."""
    if device.type == "cpu":
        return OnCPU
    return OfPackage if flash_attn_version() else OfTorch


def refusal(q: Tensor, softcap: float | None, window: int | None) -> str | None:
    """What these kernels cannot do of what is asked, or None."""
    if window is not None:
        return f"has no sliding window, got window={window}"
    if softcap is not None and kernels(q.device) is not OfPackage:
        return f"caps scores with flash-attn on a GPU alone, got softcap={softcap}"
    if q.is_cuda and q.dtype == torch.float32:
        return "takes bfloat16 and float16 alone on a GPU, got q of torch.float32"
    if q.is_cuda and q.shape[2] > WIDEST:
        return f"takes a head size D of at most {WIDEST} on a GPU, got {q.shape[2]}"
    return None


# ---- the two parts -------------------------------------------------------------------------------


class _Parts(NamedTuple):
    """Both parts' sequences, none of them empty, and the tokens of the shared one."""

    own: Spans
    shared: Spans
    rows: Tensor  # of completions behind a prompt
    keys: Tensor  # of prompts before completions


def _parts(layout: GroupLayout, tokens: int, device: torch.device) -> _Parts:
    layout.check(tokens)  # also brings it to the host
    offsets = layout.offsets.tolist()
    bounds = list(dict.fromkeys(offsets))
    groups = [
        (offsets[first], offsets[first + 1], offsets[end])
        for first, end in itertools.pairwise(layout.groups.tolist())
    ]
    groups = [(a, b, c) for a, b, c in groups if a < b < c]
    none = torch.empty(0, dtype=torch.int64)
    return _Parts(
        Spans(bounds, bounds, True),
        Spans(
            [0, *itertools.accumulate(c - b for _, b, c in groups)],
            [0, *itertools.accumulate(b - a for a, b, _ in groups)],
            False,
        ),
        torch.cat([none, *(torch.arange(b, c) for _, b, c in groups)]).to(device),
        torch.cat([none, *(torch.arange(a, b) for a, b, _ in groups)]).to(device),
    )


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """`[N, Hq, ...]` to `[N Hq / Hkv, Hkv, ...]`: a row for each query head of a key head."""
    return x.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _unfold(x: Tensor, rows: int) -> Tensor:
    return x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(1, 2)


def _folded(spans: Spans, share: int) -> Spans:
    return spans._replace(queries=[n * share for n in spans.queries])


def _ready(x: Tensor) -> Tensor:
    """Contiguous, its heads filled up with zeros, which change no score."""
    missing = -x.shape[2] % MULTIPLE
    return pad(x, (0, missing)) if missing else x.contiguous()


def forward(p: Problem, out: Tensor, lse: Tensor, rest: Tensor) -> None:
    parts = _parts(p.layout, len(p.q), p.q.device)
    if len(p.q) == 0:
        return
    run, scores, width = kernels(p.q.device), Scores(p.scale, p.softcap), p.q.shape[2]
    q, k, v = map(_ready, (p.q, p.k, p.v))
    own_out, own_lse = run.forward(q, k, v, parts.own, scores)
    out.copy_(own_out[..., :width])
    lse.copy_(own_lse)
    rows, keys, (heads, kv_heads) = parts.rows, parts.keys, (q.shape[1], k.shape[1])
    if len(rows) == 0:
        return
    spans = _folded(parts.shared, heads // kv_heads)
    shared = run.forward(_fold(q[rows], kv_heads), k[keys], v[keys], spans, scores)
    shared_out, shared_lse = (_unfold(x, len(rows)) for x in shared)
    both = torch.logaddexp(own_lse[rows], shared_lse)
    lse[rows] = both
    merged = sum(
        (part_lse - both).exp().unsqueeze(-1) * part.float()
        for part, part_lse in ((own_out[rows], own_lse[rows]), (shared_out, shared_lse))
    )
    out[rows] = merged[..., :width].to(out.dtype)


def backward(
    p: Problem,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if len(p.q) == 0:
        return tuple(x.new_empty(x.shape) for x in (p.q, p.k, p.v))
    parts, width = _parts(p.layout, len(p.q), p.q.device), p.q.shape[2]
    q, k, v, out, grad_out = map(_ready, (p.q, p.k, p.v, out, grad_out))
    gradients = _gradients(p, parts, q, k, v, out, lse, grad_out)
    if grad_lse is not None:
        # The kernels know a score's gradient as p_ij (grad_out_i . v_j - grad_out_i . out_i): with
        # no values, and these two, it is p_ij grad_lse_i.
        minus, ones = torch.zeros_like(out), torch.zeros_like(out)
        left = -grad_lse
        for column in range(3):  # 16 bits of it at a time
            ones[..., column] = 1
            minus[..., column] = left
            left = left - minus[..., column]
        more = _gradients(p, parts, q, k, torch.zeros_like(v), minus, lse, ones)
        gradients = *(a + b for a, b in zip(gradients[:2], more[:2], strict=True)), gradients[2]
    return tuple(x[..., :width].to(p.q.dtype) for x in gradients)


def _gradients(p: Problem, parts: _Parts, q, k, v, out, lse, grad_out) -> tuple[Tensor, ...]:
    """Those of q, k and v in float32, both parts added up."""
    run, scores = kernels(p.q.device), Scores(p.scale, p.softcap)
    own = run.backward(grad_out, q, k, v, out, lse, parts.own, scores)
    gradients = tuple(x.float() for x in own)
    rows, keys, (heads, kv_heads) = parts.rows, parts.keys, (q.shape[1], k.shape[1])
    if len(rows):
        spans = _folded(parts.shared, heads // kv_heads)
        queries, of_out, upstream, sums = (
            _fold(x[rows], kv_heads) for x in (q, out, grad_out, lse)
        )
        shared = run.backward(upstream, queries, k[keys], v[keys], of_out, sums, spans, scores)
        for total, part, at in zip(
            gradients, (_unfold(shared[0], len(rows)), *shared[1:]), (rows, keys, keys), strict=True
        ):
            total[at] += part.float()
    return gradients
