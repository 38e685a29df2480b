"""shared_prefix_attention in Triton: how the kernels beside this are launched.

The layout stays on the device: no launch waits for it, and a CUDA graph can record all of them. So
its contents are checked only where they lie in the host's memory.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastrl.kernels.attention.library import WIDEST, Problem
from fastrl.kernels.attention.triton_backward import _bwd_keys_kernel, _bwd_queries_kernel
from fastrl.kernels.attention.triton_kernels import _fwd_kernel


class Tile(NamedTuple):
    """Queries and keys at once, and how a program is compiled."""

    m: int
    n: int
    warps: int
    stages: int


# Of each kernel by the padded head size. bf16 and fp16 on Hopper, whose wgmma wants 64 rows, and
# elsewhere, in the 99 kB that small GPUs have; float32 everywhere, which never becomes TF32.
HOPPER = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
    "queries": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    "keys": {64: Tile(64, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
}
AMPERE = {
    "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
    "queries": {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
    "keys": {64: Tile(32, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
}
FLOAT = {
    "forward": {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    "queries": {64: Tile(32, 32, 8, 2), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    "keys": {64: Tile(32, 32, 8, 2), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}


def padded(width: int) -> int:
    """A head size, as tiles hold it."""
    return max(16, triton.next_power_of_2(width))


def tile(kernel: str, dtype: torch.dtype, width: int, hopper: bool = True) -> Tile:
    """Depends on nothing else, so that bits do not either."""
    table = FLOAT if dtype == torch.float32 else HOPPER if hopper else AMPERE
    return table[kernel][max(64, padded(width))]


def _is_large(device: torch.device) -> bool:
    """Hopper's or its successor's 227 kB of shared memory; in the interpreter too."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def _rows(x: Tensor) -> Tensor:
    """[T, H, D] with the elements of a row side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _on(tensor: Tensor):
    """Launches inside go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class _Launch(NamedTuple):
    """What every kernel is given besides its tensors."""

    inputs: tuple[Tensor, ...]  # q, k, v, offsets, groups
    scalars: tuple[int | float, ...]
    flags: dict[str, int | bool]
    programs: int

    @classmethod
    def of(cls, p: Problem, kernel: str) -> "_Launch":
        width, share = p.q.shape[2], p.q.shape[1] // p.k.shape[1]
        if width > WIDEST:
            raise ValueError(
                f"q must have a head size D of at most {WIDEST} for impl='triton', got {width}; "
                "impl='reference' takes any"
            )
        if not p.offsets.is_cuda:
            p.layout.check(len(p.q))
        q, k, v = map(_rows, (p.q, p.k, p.v))
        m, n, warps, stages = tile(kernel, q.dtype, width, _is_large(q.device))
        segments, count = len(p.offsets) - 1, len(p.groups) - 1
        strides = (s for x in (q, k, v) for s in x.stride()[:2])
        flags = {
            **{"D": width, "WIDTH": padded(width), "SHARE": share, "M": m, "N": n},
            **{"SOFTCAP": p.softcap != 0, "WINDOW": p.window != 0, "WIDE": not q.is_cuda},
            **{"num_warps": warps, "num_stages": stages},
        }
        rows = len(q) * (1 if kernel == "keys" else share)
        return cls(
            (q, k, v, p.offsets.contiguous(), p.groups.contiguous()),
            (segments, count, *strides, p.scale, p.softcap or 1.0, p.window),
            flags,
            rows // (n if kernel == "keys" else m) + segments,
        )

    @property
    def grid(self) -> tuple[int, int]:
        return self.programs, self.inputs[1].shape[1]


def _epsilon(rest: Tensor, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if rest.numel() else 0.0


def forward(p: Problem, out: Tensor, lse: Tensor, rest: Tensor) -> None:
    launch = _Launch.of(p, "forward")
    if len(p.q) == 0:
        return
    with _on(p.q):
        _fwd_kernel[launch.grid](
            *(*launch.inputs, out, rest, lse, *launch.scalars),
            **launch.flags,
            EPSILON=_epsilon(rest, out.dtype),
        )


def backward(
    p: Problem,
    out: Tensor,
    lse: Tensor,
    rest: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = tuple(x.new_empty(x.shape) for x in (p.q, p.k, p.v))
    by_queries, by_keys = (_Launch.of(p, kernel) for kernel in ("queries", "keys"))
    if len(p.q) == 0:
        return gradients
    out, lse, rest, grad_out = (x.contiguous() for x in (out, lse, rest, grad_out))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = torch.empty_like(lse)
    positions = p.layout.positions(len(p.q)).to(torch.int32) if p.window else None
    with _on(p.q):
        _bwd_queries_kernel[by_queries.grid](
            *(*by_queries.inputs, out, rest, lse, grad_out, grad_lse, delta, gradients[0]),
            *by_queries.scalars,
            **by_queries.flags,
            EPSILON=_epsilon(rest, out.dtype),
        )
        q, k, v, *layout = by_keys.inputs
        _bwd_keys_kernel[by_keys.grid](
            *(q, k, v, *layout, lse, grad_out, delta, positions, *gradients[1:]),
            *by_keys.scalars,
            **by_keys.flags,
        )
    return gradients
