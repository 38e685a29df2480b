"""Checks of arguments that ops of several families have; ValueError names the one that is off."""

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what kernels read and write
ACTIVATIONS = ("silu", "gelu_tanh")


def check_alike(
    op: str, tensors: Mapping[str, Tensor], floats: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """All are [..., K], of one shape, dtype and device: those of the first."""
    (first, x), *others = tensors.items()
    if x.dtype not in floats:
        raise ValueError(f"{op}: {first} must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{op}: {first} must be [..., K], got a scalar")
    for name, other in others:
        if (other.dtype, other.shape, other.device) != (x.dtype, x.shape, x.device):
            raise ValueError(
                f"{op}: {name} must be like {first}, {x.dtype} {tuple(x.shape)} on {x.device}, "
                f"got {other.dtype} {tuple(other.shape)} on {other.device}"
            )


def check_activation(op: str, activation: str) -> None:
    """It is one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}"
        )
