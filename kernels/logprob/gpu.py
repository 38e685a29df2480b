"""linear_logprob on a GPU: the rows, the workspace and the products that both kernels share.

`triton_launch.py` and `cuda.py` turn a chunk of the vocabulary into the gradient of its logits,
`[n, columns]` in the dtype of the operands; the matrix products of that chunk with the weights and
with the hidden states are cuBLAS's, accumulated in float32. Chunks are walked in order: a chunk's
rows of grad_weight are finished at once, from all tokens, and grad_hidden grows in float32. So
scratch is one chunk, a float32 grad_hidden, and nothing of the size of the logits.

Ignored rows are dropped by index before any product. That takes their number, for which forward and
backward each wait for the device once; so neither can be recorded in a CUDA graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.logprob.library import Problem, Upstream

GRADIENT_BYTES = 128 * 2**20  # of logit gradients at once
COLUMNS = 256  # a chunk of the vocabulary is a multiple of these, unless it ends it
STRIPE = 64  # columns of the workspace with one maximum
FP16_TOP = 13  # fp16 gradients are scaled to about 2**13, so that small probabilities survive


class Rows(NamedTuple):
    """The rows that are not ignored, as the kernels read them."""

    index: Tensor | None  # where they were; None for all of them
    hidden: Tensor  # [n, H], contiguous
    weight: Tensor  # [V, H], stride 1 along H
    target: Tensor  # [n] int64
    bias: Tensor | None  # [V] float32
    inv_temperature: Tensor  # [n] float32
    softcap: float  # 0 for none
    logit_scale: float

    @property
    def dtype(self) -> torch.dtype:
        return meeting_dtype(self.hidden, self.weight)


class Slopes(NamedTuple):
    """Gradient of a row's logits: `p (of_p - of_spread (log p + entropy))`, `of_target` at target.

    Each is `[n]` float32: what the forward gave, and three slopes that hold 1 / temperature and
    logit_scale.
    """

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    of_p: Tensor
    of_spread: Tensor
    of_target: Tensor


class Kept(NamedTuple):
    """The workspace: what the forward knew of the first columns of the vocabulary."""

    exps: Tensor  # [n, columns], as they are multiplied: kept_scale * exp(z - highest)
    highest: Tensor  # [columns / STRIPE, n] float32, of each stripe of a row

    @property
    def columns(self) -> int:
        return self.exps.shape[1]


def kept_rows(p: Problem) -> Rows:
    """Drops the ignored rows; waits for the device."""
    flat, (vocab, width) = p.target.reshape(-1), p.weight.shape
    if width == 0:
        raise ValueError(f"weight must be [V, H] with H > 0, got shape {tuple(p.weight.shape)}")
    keep = flat != p.ignore_index
    wrong = keep & ((flat < 0) | (flat >= vocab))
    count, mistakes = torch.stack((keep.sum(), wrong.sum())).tolist()
    if mistakes:
        flat = flat[keep]
        raise ValueError(
            f"target must lie in [0, V={vocab}) or be ignore_index={p.ignore_index}, "
            f"got values from {int(flat.min())} to {int(flat.max())}"
        )
    hidden = p.hidden.reshape(-1, p.hidden.shape[-1])
    if p.temperatures is None:
        inverse = torch.full((len(flat),), 1 / p.temperature, device=flat.device)
    else:
        inverse = 1 / p.temperatures.reshape(-1).float()
    index = None
    if count < len(flat):
        index = torch.nonzero_static(keep, size=count).squeeze(-1)
        hidden, flat, inverse = hidden[index], flat[index], inverse[index]
    return Rows(
        index,
        hidden.contiguous(),
        p.weight if p.weight.stride(1) == 1 else p.weight.contiguous(),
        flat.contiguous(),
        None if p.bias is None else p.bias.float().contiguous(),
        inverse.contiguous(),
        p.softcap,
        p.logit_scale,
    )


def kept_scale(dtype: torch.dtype) -> int:
    """What exponentials are multiplied by in the workspace, so that fp16 holds small ones."""
    return 2**15 if dtype == torch.float16 else 1


def split_workspace(kept: Tensor, rows: Rows) -> Kept | None:
    """Views of the workspace for as many columns of the vocabulary as fit; None for none."""
    n, vocab, size = len(rows.target), rows.weight.shape[0], rows.dtype.itemsize
    if n == 0:
        return None
    columns = kept.numel() * STRIPE // (n * (size * STRIPE + 4))
    columns = min(columns // COLUMNS, -(-vocab // COLUMNS)) * COLUMNS
    if columns <= 0:
        return None
    parts = [size * n * columns, 4 * n * columns // STRIPE]
    exps, highest = kept[: sum(parts)].split(parts)
    return Kept(exps.view(rows.dtype).view(n, columns), highest.view(torch.float32).view(-1, n))


def on(tensor: Tensor):
    """Launches inside go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@contextmanager
def full_precision() -> Iterator[None]:
    """cuBLAS without TF32 and without sums in bf16, whatever the caller's settings are."""
    matmul = torch.backends.cuda.matmul
    tf32, reduced = matmul.fp32_precision, "allow_bf16_reduced_precision_reduction"
    split_k = getattr(matmul, f"{reduced}_split_k", None) if torch.cuda.is_available() else None
    before = getattr(matmul, reduced)
    try:
        matmul.fp32_precision = "ieee"
        setattr(matmul, reduced, False if split_k is None else (False, split_k))
        yield
    finally:
        matmul.fp32_precision = tf32
        setattr(matmul, reduced, before if split_k is None else (before, split_k))


def meeting_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What is multiplied: operands of two dtypes meet in float32."""
    return hidden.dtype if hidden.dtype == weight.dtype else torch.float32


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, of operands of one dtype, in that dtype or float32; summed in float32."""
    if not a.is_cuda:
        out.copy_(a.float() @ b.float())
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


@cache
def _adds_to_float32() -> bool:
    """Whether this torch adds a product of bf16 to a float32 matrix in place; 2.9 does not."""
    total = torch.zeros(16, 16, device="cuda")
    half = total.bfloat16()
    try:
        torch.addmm(total, half, half, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda and _adds_to_float32():
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        part = torch.empty_like(total)
        product(a, b, out=part)
        total += part


def scatter(values: Tensor, index: Tensor | None, shape: torch.Size) -> Tensor:
    """`[*shape, ...]` with the values of the kept rows among zeros."""
    if index is not None:
        whole = values.new_zeros(shape.numel(), *values.shape[1:])
        values = whole.index_copy_(0, index, values)
    return values.view(*shape, *values.shape[1:])


def _slopes(rows: Rows, upstream: Upstream) -> tuple[Slopes, Tensor | None]:
    """The slopes and, for fp16, the power of two that they were multiplied by."""
    given = [x.reshape(-1) for x in upstream]
    if rows.index is not None:
        given = [x[rows.index] for x in given]
    *forward, grad_logprob, grad_lse, grad_entropy = (x.float().contiguous() for x in given)
    chain = rows.inv_temperature * rows.logit_scale
    slopes = [(grad_lse - grad_logprob) * chain, grad_entropy * chain, grad_logprob * chain]
    scale = None
    if rows.dtype == torch.float16:
        # |p (log p + entropy)| is below 2**4 for any vocabulary that fits in memory.
        top = torch.stack([slopes[0], slopes[1] * 16, slopes[2]]).abs().amax()
        scale = torch.exp2((FP16_TOP - torch.log2(top).ceil()).clamp(-100, 100))
        slopes = [x * scale for x in slopes]
    return Slopes(*forward, *slopes), scale


def _chunks(vocab: int, kept_columns: int, columns: int) -> Iterator[tuple[int, int]]:
    """Stretches of the vocabulary, none of them both kept and not."""
    for begin, end in ((0, kept_columns), (kept_columns, vocab)):
        for first in range(begin, end, columns):
            yield first, min(first + columns, end)


# fill(rows, slopes, kept, first, gradient, sums): the gradient [n, columns] of the logits from
# entry `first` on, recomputed unless kept is given, and unless it is None sums [columns] float32
# of the unrounded gradient over the rows.
Fill = Callable[[Rows, Slopes, Kept | None, int, Tensor, Tensor | None], None]


def backward(
    p: Problem, kept: Tensor, upstream: Upstream, needed: list[bool], fill: Fill
) -> tuple[Tensor | None, ...]:
    rows = kept_rows(p)
    n, (vocab, width) = len(rows.target), rows.weight.shape
    need_hidden, need_weight, need_bias = needed
    new = rows.hidden.new_empty
    total = rows.hidden.new_zeros(n, width, dtype=torch.float32) if need_hidden else None
    grad_weight = p.weight.new_empty(vocab, width) if need_weight else None
    grad_bias = new(vocab, dtype=torch.float32) if need_bias else None
    if n == 0:
        for gradient in (grad_weight, grad_bias):
            if gradient is not None:
                gradient.zero_()
    else:
        store = split_workspace(kept, rows)
        kept_columns = 0 if store is None else min(store.columns, vocab)
        slopes, scale = _slopes(rows, upstream)
        hidden = rows.hidden.to(rows.dtype)
        most = GRADIENT_BYTES // (n * hidden.itemsize) // COLUMNS * COLUMNS
        columns = min(max(most, COLUMNS), -(-vocab // COLUMNS) * COLUMNS)
        scratch = new(n, columns, dtype=rows.dtype)
        with on(hidden), full_precision():
            for first, last in _chunks(vocab, kept_columns, columns):
                gradient = scratch[:, : last - first]
                sums = None if grad_bias is None else grad_bias[first:last]
                fill(rows, slopes, store if first < kept_columns else None, first, gradient, sums)
                if total is not None:
                    add_product(total, gradient, rows.weight[first:last].to(rows.dtype))
                if grad_weight is not None:
                    if scale is None and grad_weight.dtype == rows.dtype:
                        product(gradient.T, hidden, out=grad_weight[first:last])
                    else:
                        part = new(last - first, width, dtype=torch.float32)
                        product(gradient.T, hidden, out=part)
                        grad_weight[first:last] = part if scale is None else part / scale
        if scale is not None:
            for gradient in (total, grad_bias):
                if gradient is not None:
                    gradient /= scale
    return (
        None if total is None else scatter(total.to(p.hidden.dtype), rows.index, p.target.shape),
        grad_weight,
        None if grad_bias is None or p.bias is None else grad_bias.to(p.bias.dtype),
    )
