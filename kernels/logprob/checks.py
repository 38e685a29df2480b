"""What the arguments of log-probabilities and sampling must be; each raises ValueError."""

import torch
from torch import Tensor

from fastrl.kernels.checks import FLOATS


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [V, H], got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must end in weight's H={weight.shape[1]}, got shape {tuple(hidden.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} is on {tensor.device} and hidden on {hidden.device}; they must be on one"
            )
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V]=[{weight.shape[0]}], got shape {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive, or None for no cap")


def check_target(target: Tensor, rows: torch.Size, name: str) -> None:
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {target.dtype}")
    if target.shape != rows:
        raise ValueError(f"{name} must have shape {tuple(rows)}, got {tuple(target.shape)}")


def check_temperature(temperature: float | Tensor, rows: torch.Size) -> None:
    if isinstance(temperature, Tensor):
        if temperature.dim() and temperature.shape != rows:
            raise ValueError(
                f"temperature must be a number or a tensor of shape {tuple(rows)}, "
                f"got shape {tuple(temperature.shape)}"
            )
    elif not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")


def check_inplace(logits: Tensor, chosen: str) -> None:
    if chosen == "reference":
        raise ValueError("inplace_backward=True needs a kernel; impl='reference' has none")
    if not logits.is_contiguous():
        raise ValueError(
            f"inplace_backward=True needs contiguous logits, got strides {logits.stride()} "
            f"for shape {tuple(logits.shape)}"
        )


def check_kernel(tensors: dict[str, Tensor], temperature: float | Tensor = 1.0) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16 for a kernel, got {tensor.dtype}; "
                "impl='reference' takes float64"
            )
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise ValueError(
            "temperature requires a gradient, which only impl='reference' gives; detach it"
        )


def check_draws(
    hidden: Tensor,
    weight: Tensor,
    seeds: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    softcap: float | None,
) -> None:
    """Raise ValueError for tensors of `linear_sample` that do not fit."""
    check_linear(hidden, weight, bias, softcap)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [M, H], got shape {tuple(hidden.shape)}")
    check_target(seeds, hidden.shape[:-1], "seeds")
    check_target(positions, hidden.shape[:-1], "positions")
