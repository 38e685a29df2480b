"""linear_logprob with cuBLAS's products and csrc/cuda/logprob.cu's passes over their tiles.

A tile of logits is a float32 product of some rows with a stretch of the vocabulary; one pass folds
it into the rows' statistics, and in backward one pass turns it into the gradient of the logits.
The stretches depend on nothing but V. Which of its kernels cuBLAS takes may depend on the number
of rows, so a repeat gives the same bits, but a row in another batch may differ in its last ones;
`triton_kernels.py` has no such freedom.
"""

import torch
from torch import Tensor

from fastrl.kernels.logprob import gpu
from fastrl.kernels.logprob.library import Problem, Upstream
from fastrl.kernels.native import check, float_kind, module, pointer, stream

COLUMNS = 8192  # of the vocabulary in a tile
TILE_BYTES = 128 * 2**20


def _kept_args(kept: gpu.Kept | None, part: slice, dtype: torch.dtype):
    c = module()
    if kept is None:
        return c.kept_args(0, float_kind(dtype), 0, 0, 0, 1.0)
    return c.kept_args(
        pointer(kept.exps[part]),
        float_kind(dtype),
        kept.columns,
        pointer(kept.highest[:, part]),
        kept.highest.stride(0),
        gpu.kept_scale(dtype),
    )


def _tile_args(rows: gpu.Rows, part: slice, first: int, tile: Tensor):
    return module().tile_args(
        *(*tile.shape, first, pointer(tile), tile.stride(0), pointer(rows.bias)),
        *(pointer(rows.inv_temperature[part]), pointer(rows.target[part])),
        *(rows.logit_scale, rows.softcap),
    )


def _parts(n: int, columns: int):
    """Slices of the rows whose tiles of so many columns fit."""
    most = max(TILE_BYTES // (4 * columns), 1)
    return [slice(i, min(i + most, n)) for i in range(0, n, most)]


def _tiles(rows: gpu.Rows, columns: int) -> Tensor:
    """Room for a tile; its rows are a multiple of 16 bytes apart."""
    padded = -(-columns // gpu.COLUMNS) * gpu.COLUMNS
    most = max((p.stop - p.start for p in _parts(len(rows.target), padded)), default=0)
    return rows.inv_temperature.new_empty(most, padded)


def _multiply(rows: gpu.Rows, part: slice, first: int, tile: Tensor) -> None:
    hidden = rows.hidden[part].to(rows.dtype)
    weight = rows.weight[first : first + tile.shape[1]].to(rows.dtype)
    gpu.product(hidden, weight.T, out=tile)


def forward(p: Problem, kept: Tensor) -> tuple[Tensor, ...]:
    c, rows = module(), gpu.kept_rows(p)
    n, vocab = len(rows.target), rows.weight.shape[0]
    store = gpu.split_workspace(kept, rows)
    highest, total, weighted, at_target = rows.inv_temperature.new_empty(4, n)
    room = _tiles(rows, min(COLUMNS, vocab))
    with gpu.on(rows.hidden), gpu.full_precision():
        for part in _parts(n, room.shape[1]):
            count = part.stop - part.start
            running = (x[part] for x in (highest, total, weighted, at_target))
            running = [pointer(x) for x in running]
            for first in range(0, vocab, COLUMNS):
                tile = room[:count, : min(COLUMNS, vocab - first)]
                _multiply(rows, part, first, tile)
                args = c.linear_logprob_fold_args(
                    _tile_args(rows, part, first, tile),
                    _kept_args(store, part, rows.dtype),
                    *running,
                )
                code = c.linear_logprob_fold_cuda(args, stream(rows.hidden.device))
                check("linear_logprob", code)
    log_sum = total.log()
    results = (at_target - highest - log_sum, highest + log_sum, log_sum - weighted / total)
    return tuple(gpu.scatter(x, rows.index, p.target.shape) for x in results)


def _fill(
    rows: gpu.Rows,
    slopes: gpu.Slopes,
    kept: gpu.Kept | None,
    first: int,
    gradient: Tensor,
    sums: Tensor | None,
) -> None:
    """See gpu.Fill."""
    c, columns = module(), gradient.shape[1]
    in_place = gradient.dtype == torch.float32
    room = None if in_place else _tiles(rows, columns)
    if sums is not None:
        sums.zero_()
    for part in _parts(len(gradient), columns if room is None else room.shape[1]):
        out = gradient[part]
        tile = out if room is None else room[: len(out), :columns]
        if kept is None:
            _multiply(rows, part, first, tile)
        made = out if sums is None else tile  # sums are of what was not rounded yet
        args = c.linear_logprob_gradient_args(
            _tile_args(rows, part, first, tile),
            _kept_args(kept, part, rows.dtype),
            *(pointer(x[part]) for x in slopes),
            *(pointer(made), float_kind(made.dtype), made.stride(0)),
        )
        code = c.linear_logprob_gradient_cuda(args, stream(gradient.device))
        check("linear_logprob_bwd", code)
        if sums is not None:
            sums += tile.sum(0)
            if made is not out:
                out.copy_(made)


def backward(
    p: Problem, kept: Tensor, upstream: Upstream, needed: list[bool]
) -> tuple[Tensor | None, ...]:
    return gpu.backward(p, kept, upstream, needed, _fill)
