"""Attention of new tokens over a forest of cached segments, on a GPU: tables and launches.

`triton_decode.py` says how nodes lie in memory and how the work is cut.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastrl.kernels.attention import triton_decode
from fastrl.kernels.attention.library import WIDEST
from fastrl.kernels.attention.triton_decode import _decode_kernel, _merge_kernel, _write_kernel
from fastrl.kernels.attention.triton_launch import _on, padded

SPLIT = 256  # keys of a part; fixed, so that a row's bits do not depend on its batch
SHARED_ROWS = 64  # queries, over rows and heads, of a program on a shared node
MERGED = 16  # parts that are merged at once
KEYS = {64: 64, 128: 32, 256: 32}  # at once, by the padded head size


def warps(rows: int, wide: int, itemsize: int) -> int:
    """Of a program: so many that `rows` queries of `wide` numbers stay in their registers."""
    return 8 if rows >= SHARED_ROWS and (wide > 128 or itemsize == 4) else 4


class Segment(NamedTuple):
    """A node: keys and values `[layers, 2, Hkv, capacity, D]` of the positions from `start` on."""

    address: int
    start: int
    capacity: int
    shared: bool  # whether many rows may read it


class Visit(NamedTuple):
    """A row that reads the first `limit` keys of a segment; -1 for those up to its own."""

    row: int
    segment: int
    limit: int


class Table(NamedTuple):
    """Which rows read which segments, as the kernels take it.

    values is `[fields, size]` int64; items holds how many programs a head takes on shared segments
    and on others. Sizes are rounded up to powers of two, so that CUDA graphs fit for many steps.
    """

    values: Tensor
    items: tuple[int, int]

    @property
    def size(self) -> int:
        return self.values.shape[1]


def _rounded(count: int) -> int:
    return max(16, triton.next_power_of_2(count))


def _splits(keys: int) -> int:
    return -(-keys // SPLIT)


def table(
    segments: Sequence[Segment], chains: Sequence[Sequence[Visit]], share: int, rows: int
) -> Table:
    """The table, in host memory, of each row's visits in the order of their positions.

    A row's own key is written to the segment that it visits last, which no other row may read up to
    there. share is Hq / Hkv; rows, at least one for each chain, counts rows of padding too.
    """

    def keys(visit: Visit) -> int:
        return segments[visit.segment].capacity if visit.limit < 0 else visit.limit

    every = [visit for chain in chains for visit in chain]
    ends = [0, *accumulate(_splits(keys(visit)) for visit in every)]
    row_ends = list(accumulate(map(len, chains)))
    row_parts = [0, *(ends[n] for n in row_ends)] + [ends[-1]] * (rows - len(chains))
    order = sorted(range(len(every)), key=lambda i: every[i].segment)
    visits = [every[i] for i in order]

    def items(shared: bool) -> Iterator[tuple[int, int, int, int]]:
        first = 0
        for segment, readers in groupby(visits, key=lambda visit: visit.segment):
            count = len(list(readers))
            at_once = max(1, SHARED_ROWS // share) if shared else 1
            for begin in range(first, first + count, at_once):
                some = visits[begin : min(begin + at_once, first + count)]
                if segments[segment].shared == shared:
                    for split in range(_splits(max(map(keys, some)))):
                        yield segment, begin, len(some), split
            first += count

    shared, own = list(items(True)), list(items(False))
    padding = [-1] * (rows - len(chains))
    size = _rounded(max(len(segments), len(every), rows + 1, len(shared), len(own), ends[-1]))
    values = torch.zeros(triton_decode.FIELDS, size, dtype=torch.int64)
    for field, lines in (
        (triton_decode.NODE_BASE, zip(*(s[:3] for s in segments), strict=True)),
        (triton_decode.VISIT_ROW, [[v.row for v in visits], [v.limit for v in visits]]),
        (triton_decode.VISIT_PART, [[ends[i] for i in order]]),
        (triton_decode.ROW_NODE, [[c[-1].segment for c in chains] + padding, row_parts]),
        (triton_decode.SHARED, zip(*shared, strict=True)),
        (triton_decode.OWN, zip(*own, strict=True)),
    ):
        for k, line in enumerate(lines):
            values[field.value + k, : len(line)] = torch.tensor(line, dtype=torch.int64)
    return Table(values, (_rounded(len(shared)) if shared else 0, _rounded(len(own))))


class Workspace(NamedTuple):
    """Parts of at most `size` splits, before they are merged."""

    results: Tensor  # [size, Hq, D] float32
    tops: Tensor  # [size, Hq]
    totals: Tensor

    @classmethod
    def of(cls, size: int, heads: int, width: int, device: torch.device) -> "Workspace":
        shapes = ((size, heads, width), (size, heads), (size, heads))
        return cls(*(torch.empty(s, dtype=torch.float32, device=device) for s in shapes))


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    where: Table,
    workspace: Workspace,
    layer: int,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Writes each row's key and value to its segment and attends to all that the row sees.

    q `[M, Hq, D]`, k and v `[M, Hkv, D]` in bf16, fp16 or float32, each row contiguous; positions
    `[M]` int64; `where`'s values on the same device. softcap and window are 0 for none. Returns
    `[M, Hq, D]`. It waits for nothing and allocates nothing but that, so a CUDA graph can record
    it; later steps need new positions alone, until a row's last segment is full.
    """
    (rows, heads, width), kv_heads = q.shape, k.shape[1]
    if width > WIDEST:
        raise ValueError(f"q must have a head size D of at most {WIDEST}, got {width}")
    q, k, v = (x if x.stride()[1:] == (width, 1) else x.contiguous() for x in (q, k, v))
    wide, share = padded(width), heads // kv_heads
    out = q.new_empty(q.shape)
    values, size = where.values, where.size
    own_rows = max(16, triton.next_power_of_2(share))
    tiles = (
        (triton_decode.SHARED, max(SHARED_ROWS, own_rows), where.items[0]),
        (triton_decode.OWN, own_rows, where.items[1]),
    )
    with _on(q):
        _write_kernel[rows, kv_heads](
            *(k, v, values, positions, layer, size, k.stride(0), v.stride(0)),
            **{"D": width, "WIDTH": wide, "num_warps": 1},
        )
        for field, m, items in tiles:
            if items == 0:
                continue
            _decode_kernel[items, kv_heads](
                *(q, values, positions, *workspace, layer, size, q.stride(0)),
                *(scale, softcap or 1.0, window),
                **{"FIELD": field.value, "D": width, "WIDTH": wide, "SHARE": share, "M": m},
                **{"N": KEYS[max(64, wide)], "SPLIT": SPLIT, "SOFTCAP": softcap != 0},
                **{"WINDOW": window != 0, "WIDE": not q.is_cuda, "num_stages": 2},
                num_warps=warps(m, wide, q.itemsize),
            )
        _merge_kernel[rows, heads](
            *(*workspace, values, out, size),
            **{"D": width, "WIDTH": wide, "P": MERGED, "num_warps": 1},
        )
    return out
