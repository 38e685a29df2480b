"""linear_logprob in Triton: how the kernels beside this are launched."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastrl.kernels.logprob import gpu
from fastrl.kernels.logprob.library import Problem, Upstream
from fastrl.kernels.logprob.triton_kernels import (
    _bwd_kept_kernel,
    _bwd_kernel,
    _fwd_kernel,
    _merge_kernel,
)


class Tile(NamedTuple):
    """A program's tokens, vocabulary entries and step along H, and how it is compiled."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


ENGINE = Tile(128, 256, 64, 8, 3)  # bf16 and fp16, fetched by Hopper's copy engine
HALF = Tile(128, 128, 64, 8, 3)  # bf16 and fp16
FLOAT = Tile(64, 64, 32, 4, 2)  # float32: never TF32
GROUP = 16  # blocks of tokens that share a stretch of the weights in L2
PARTIAL_BYTES = 64 * 2**20  # of statistics of tiles at once
MERGE = (64, 16)  # tiles and tokens that a merging program reads at once
KEPT_ROWS = 32  # tokens of a program that reads the workspace


def _for_the_engine(tensor: Tensor) -> bool:
    """Whether Hopper's copy engine can fetch from it; the interpreter takes descriptors too."""
    able = not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.itemsize % 16 == 0
    return able and aligned


def _tile(rows: gpu.Rows) -> Tile:
    if rows.dtype == torch.float32:
        return FLOAT
    return ENGINE if _for_the_engine(rows.hidden) and _for_the_engine(rows.weight) else HALF


def _operands(rows: gpu.Rows, tile: Tile) -> tuple[tuple, dict[str, object]]:
    """The kernels' first arguments, and the flags and sizes that all products share."""
    hidden, weight = rows.hidden, rows.weight
    operands: tuple = (hidden, weight)
    if described := tile is ENGINE:
        operands = (
            TensorDescriptor.from_tensor(hidden, [tile.m, tile.k]),
            TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
        )
    return operands, {
        "M": tile.m,
        "N": tile.n,
        "K": tile.k,
        "STRIPE": gpu.STRIPE,
        "GROUP": GROUP,
        "DESCRIBED": described,
        "WHOLE": hidden.shape[1] % tile.k == 0,
        # The interpreter would multiply the integers that hold bf16.
        "WIDE": hidden.dtype != weight.dtype or not hidden.is_cuda,
        "BIAS": rows.bias is not None,
        "SOFTCAP": rows.softcap != 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def forward(p: Problem, kept: Tensor) -> tuple[Tensor, ...]:
    rows = gpu.kept_rows(p)
    n, (vocab, width) = len(rows.target), rows.weight.shape
    store = gpu.split_workspace(kept, rows)
    new = rows.inv_temperature.new_empty
    logprob, lse, entropy = (new(n) for _ in range(3))
    at_target = new(n)
    tile = _tile(rows)
    tiles, group = triton.cdiv(vocab, tile.n), GROUP * tile.m
    most = max(PARTIAL_BYTES // (12 * tiles) // group, 1) * group
    with gpu.on(rows.hidden):
        for first in range(0, n, most):
            part = slice(first, min(first + most, n))
            some = rows._replace(hidden=rows.hidden[part])
            operands, flags = _operands(some, tile)
            count = len(some.hidden)
            statistics = (*(new(tiles, count) for _ in range(3)), at_target[part])
            _fwd_kernel[(triton.cdiv(count, tile.m) * tiles,)](
                *(*operands, rows.bias, rows.inv_temperature[part], rows.target[part]),
                *statistics,
                None if store is None else store.exps[part],
                None if store is None else store.highest[:, part],
                *(count, vocab, width, rows.weight.stride(0), tiles),
                *((0, 0, 0) if store is None else (store.columns // tile.n, n, store.columns)),
                *(rows.logit_scale, rows.softcap),
                **flags,
                KEEP=0 if store is None else gpu.kept_scale(rows.dtype),
            )
            _merge_kernel[(triton.cdiv(count, MERGE[1]),)](
                *(*statistics, logprob[part], lse[part], entropy[part], count, tiles),
                *MERGE,
            )
    return tuple(gpu.scatter(x, rows.index, p.target.shape) for x in (logprob, lse, entropy))


def _fill(
    rows: gpu.Rows,
    slopes: gpu.Slopes,
    kept: gpu.Kept | None,
    first: int,
    gradient: Tensor,
    sums: Tensor | None,
) -> None:
    """See gpu.Fill."""
    n, columns = gradient.shape
    stride = gradient.stride(0)
    new = rows.inv_temperature.new_empty
    of_rows = (rows.inv_temperature, rows.target, *slopes)
    if kept is None:
        tile = _tile(rows)
        operands, flags = _operands(rows, tile)
        blocks, tiles = triton.cdiv(n, tile.m), triton.cdiv(columns, tile.n)
        partial = None if sums is None else new(blocks, stride)
        _bwd_kernel[(blocks * tiles,)](
            *(*operands, rows.bias, *of_rows, gradient, partial),
            *(n, *rows.weight.shape, rows.weight.stride(0), tiles, first // tile.n, stride),
            *(rows.logit_scale, rows.softcap),
            **flags,
            SUMS=sums is not None,
        )
    else:
        blocks, tiles = triton.cdiv(n, KEPT_ROWS), triton.cdiv(columns, gpu.STRIPE)
        partial = None if sums is None else new(blocks, stride)
        _bwd_kept_kernel[(blocks * tiles,)](
            *(kept.exps, kept.highest, *of_rows, gradient, partial),
            *(n, rows.weight.shape[0], tiles, first, stride, kept.columns, rows.softcap),
            M=KEPT_ROWS,
            STRIPE=gpu.STRIPE,
            KEPT=gpu.kept_scale(rows.dtype),
            SOFTCAP=rows.softcap != 0,
            SUMS=sums is not None,
        )
    if sums is not None and partial is not None:
        torch.sum(partial[:, :columns], 0, out=sums)


def backward(
    p: Problem, kept: Tensor, upstream: Upstream, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    return gpu.backward(p, kept, upstream, needed, _fill)
