"""The operators of library.py in Triton: how the kernels beside this are launched."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastrl.kernels.layers.triton_kernels import (
    _glu_bwd_kernel,
    _glu_kernel,
    _rmsnorm_bwd_kernel,
    _rmsnorm_kernel,
    _rope_bwd_kernel,
    _rope_kernel,
)


class Tile(NamedTuple):
    """Rows and columns at once, and how a program is compiled."""

    rows: int
    columns: int
    warps: int


# Chosen by registers and shared memory, not measured. A thread has 8 elements of a tile, which is
# one load of 16 bytes in bf16.
ELEMENTS = 1024  # of a tile, at least
WIDEST = 8192  # of the rows that a tile holds whole; the others are walked in pieces, twice
WIDER = {"forward": Tile(1, 4096, 16), "backward": Tile(16, 128, 8)}
AHEAD = 16384  # bytes of a tile up to which the next one is loaded while this one is computed
WARPS = 8192  # of all programs of a backward that sums over rows: two rounds of a large GPU
LEAST_ROWS = 8  # of such a program, so that partial sums stay few beside the rows
BLOCK, BLOCK_WARPS = 1024, 4  # of a gated activation


def tile(kernel: str, width: int) -> Tile:
    """Of "forward" or "backward"; depends on nothing else, so that bits do not either."""
    if width > WIDEST:
        return WIDER[kernel]
    columns = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // columns)
    return Tile(rows, columns, min(rows * columns // 256, 32))


def rows_of_program(rows: int, width: int, wants_weight: bool) -> int:
    """In a backward: by the shape alone, so that sums over rows keep their order."""
    at_once, columns, warps = tile("backward", width)
    if not wants_weight or width > columns:
        return at_once
    each = max(LEAST_ROWS, triton.cdiv(rows, WARPS // warps))
    return at_once * triton.cdiv(each, at_once)


def row_settings(kernel: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """The constants of a norm's kernel."""
    rows, columns, warps = tile(kernel, width)
    settings = {"K": width, "R": rows, "COLUMNS": columns, "num_warps": warps}
    if kernel == "backward":
        ahead = width <= columns and rows * columns * dtype.itemsize <= AHEAD
        settings["STAGES"] = 2 if ahead else 1
    return settings


def head_settings(heads: int, width: int) -> dict[str, int]:
    """The constants of a rotation's kernel; ValueError for heads that no tile holds."""
    if width > WIDEST:
        raise ValueError(
            f"rope: x must have a head size D of at most {WIDEST} for impl='triton', "
            f"got {width}; impl='reference' takes any"
        )
    rows, columns, warps = tile("backward", width)
    return {"HEADS": heads, "D": width, "R": rows, "HALF": columns // 2, "num_warps": warps}


def _on(tensor: Tensor):
    """Launches inside go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _rows(x: Tensor | None) -> Tensor | None:
    """Contiguous from a multiple of 16 bytes on: how Triton loads decides the order of sums."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def rmsnorm(x, weight, residual, eps, weight_offset) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, residual = map(_rows, (x, weight, residual))
    y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    h = x.new_empty(0 if residual is None else x.shape)
    rows, settings = inverse.numel(), row_settings("forward", x.shape[-1], x.dtype)
    if rows:
        with _on(x):
            _rmsnorm_kernel[(triton.cdiv(rows, settings["R"]),)](
                *(x, residual, weight, None if residual is None else h, y, inverse),
                *(rows, eps, weight_offset),
                **settings,
            )
    return y, h, inverse


def _partial_sums(like: Tensor, rows: int, width: int, wants_weight: bool):
    """Rows of a program, how many there are, and where each leaves its sum over rows, if any."""
    each = rows_of_program(rows, width, wants_weight)
    programs = triton.cdiv(rows, each)
    shape = (programs, width)
    return each, programs, like.new_empty(shape, dtype=torch.float32) if wants_weight else None


def rmsnorm_bwd(h, weight, inverse, grad_y, grad_h, weight_offset, wants_weight):
    h, weight, grad_y, grad_h = map(_rows, (h, weight, grad_y, grad_h))
    grad = torch.empty_like(h)
    rows, width = inverse.numel(), h.shape[-1]
    each, programs, partials = _partial_sums(h, rows, width, wants_weight)
    if rows:
        with _on(h):
            _rmsnorm_bwd_kernel[(programs,)](
                *(h, weight, inverse.contiguous(), grad_y, grad_h, grad, partials),
                *(rows, each, weight_offset),
                **row_settings("backward", width, h.dtype),
            )
    return grad, weight.new_empty(0) if partials is None else partials.sum(0).to(weight.dtype)


def rope(x, cos, sin, norm_weight, eps, weight_offset) -> Tensor:
    x, norm_weight = map(_rows, (x, norm_weight))
    y = torch.empty_like(x)
    tokens, heads, width = x.shape
    settings = head_settings(heads, width)
    if x.numel():
        with _on(x):
            _rope_kernel[(triton.cdiv(tokens * heads, settings["R"]),)](
                *(x, _rows(cos.float()), _rows(sin.float()), norm_weight, y),
                *(tokens * heads, eps, weight_offset),
                **settings,
            )
    return y


def rope_bwd(x, cos, sin, norm_weight, eps, weight_offset, grad_y, wants_weight):
    x, norm_weight, grad_y = map(_rows, (x, norm_weight, grad_y))
    grad = torch.empty_like(grad_y)
    tokens, heads, width = x.shape
    each, programs, partials = _partial_sums(x, tokens * heads, width, wants_weight)
    if x.numel():
        with _on(x):
            _rope_bwd_kernel[(programs,)](
                *(x, _rows(cos.float()), _rows(sin.float()), norm_weight, grad_y, grad, partials),
                *(tokens * heads, each, eps, weight_offset),
                **head_settings(heads, width),
            )
    return grad, x.new_empty(0) if partials is None else partials.sum(0).to(norm_weight.dtype)


def glu(gate, up, activation) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    y, count = torch.empty_like(gate), gate.numel()
    if count:
        with _on(gate):
            _glu_kernel[(triton.cdiv(count, BLOCK),)](
                *(gate, up, y, count),
                **{"GELU": activation == "gelu_tanh", "BLOCK": BLOCK, "num_warps": BLOCK_WARPS},
            )
    return y


def glu_bwd(gate, up, activation, grad) -> tuple[Tensor, Tensor]:
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    to_gate, to_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    if count:
        with _on(gate):
            _glu_bwd_kernel[(triton.cdiv(count, BLOCK),)](
                *(gate, up, grad, to_gate, to_up, count),
                **{"GELU": activation == "gelu_tanh", "BLOCK": BLOCK, "num_warps": BLOCK_WARPS},
            )
    return to_gate, to_up
