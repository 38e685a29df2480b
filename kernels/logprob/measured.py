"""Which implementation of linear_logprob "auto" takes on a GPU: what was measured, by shape.

Nothing has been measured yet: TABLE is empty and DEFAULT is a choice of properties, not of speed:
the Triton kernels give a row the same bits in any batch, which cuBLAS's tiles do not promise, and
never write logits to memory. `bench/bench_logprob_gpu.py --table` measures the rows and prints them
as they belong here; bench/gpu.sh runs it.

The number of tokens is no part of the choice, so that it cannot change a row's bits, and so that
torch.compile does not compile anew for every batch.
"""

from typing import NamedTuple

import torch


class Row(NamedTuple):
    dtype: str
    width: int
    vocab: int
    impl: str  # the faster of forward and backward together


DEFAULT = "triton"
TABLE: tuple[Row, ...] = ()  # say here which GPU, torch and triton the figures are of


def order(dtype: torch.dtype, width: int, vocab: int) -> tuple[str, ...]:
    """The implementations for a GPU, the one to take first: that of the nearest measured shape.

    Near is by the ratio of the products' sizes, among the rows of the same dtype.
    """

    def apart(row: Row) -> float:
        ratio = width * vocab / (row.width * row.vocab)
        return max(ratio, 1 / ratio)

    rows = [row for row in TABLE if f"torch.{row.dtype}" == str(dtype)]
    first = min(rows, key=apart).impl if rows else DEFAULT
    return first, "cuda" if first == "triton" else "triton"
