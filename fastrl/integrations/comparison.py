"""Whether a replacement computes what the original does: values and gradients of one batch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import BoundArguments
from typing import Any

import torch
from torch import Tensor

# Largest difference, as a share of the largest magnitude: of values (at least 1) and of gradients.
# 16 bits are wide, as the originals round logits to them before the logsumexp.
VALUES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GRADIENTS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class PatchError(RuntimeError):
    """A name that moved, a signature that changed, or a replacement that computes something else.

    It names the function, and for numbers by how much they differ and what is allowed.
    """


@dataclass(frozen=True)
class Call:
    """A call of a replaced function, with both of those who could answer it."""

    name: str
    original: Callable[..., Any]
    ours: Callable[..., Any]
    bound: BoundArguments

    def answer(self, function: Callable[..., Any], **changed: Any) -> Any:
        """What a function says to these arguments, some of them changed."""
        names = (*self.bound.arguments, *changed)
        arguments = BoundArguments(
            self.bound.signature, {n: (self.bound.arguments | changed)[n] for n in names}
        )
        return function(*arguments.args, **arguments.kwargs)


def compare_tensors(
    call: Call,
    *,
    original: Callable[..., Any] | None = None,
    where: str | None = None,
    copy: bool = False,
    **changed: Any,
) -> None:
    """Compare values and, for arguments that require them, gradients of a function of tensors.

    `original` stands in for one that cannot run here; outputs count where the argument `where` is
    nonzero; with `copy` each side gets tensors of its own, for originals that write into them;
    `changed` arguments are given to both. Raises `PatchError`.
    """
    tensors = {k: v for k, v in call.bound.arguments.items() if isinstance(v, Tensor)}
    changed = {k: v for k, v in changed.items() if k in call.bound.arguments}

    def run(function: Callable[..., Any]) -> tuple[list[Any], dict[str, Tensor]]:
        fresh = {
            k: (v.detach().clone() if copy else v.detach()).requires_grad_(
                v.requires_grad and torch.is_grad_enabled()
            )
            for k, v in tensors.items()
        }
        leaves = {k: v for k, v in fresh.items() if v.requires_grad}
        return outputs_of(call.answer(function, **fresh, **changed)), leaves

    want, theirs = run(original or call.original)
    got, ours = run(call.ours)
    mask = None if where is None else tensors[where] != 0
    dtype = narrowest(tensors.values())
    compare_outputs(call.name, want, got, dtype, mask)
    compare_gradients(call.name, (want, theirs), (got, ours), dtype)


def outputs_of(result: Any) -> list[Any]:
    """The outputs of a function that returns one or a tuple of them."""
    return list(result) if isinstance(result, tuple | list) else [result]


def narrowest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that rounds most, of floating tensors and of autocast where it is on."""
    floats = [t for t in tensors if t.is_floating_point()]
    dtypes = {t.dtype for t in floats}
    dtypes |= {
        torch.get_autocast_dtype(t.device.type)
        for t in floats
        if torch.is_autocast_enabled(t.device.type)
    }
    return max(dtypes, key=lambda d: VALUES.get(d, 1.0), default=torch.float32)


def compare_outputs(
    name: str, want: list[Any], got: list[Any], dtype: torch.dtype, mask: Tensor | None = None
) -> None:
    """Raise `PatchError` where outputs differ by more than `dtype` explains."""
    if len(want) != len(got):
        raise PatchError(f"{name} returns {len(want)} values, fastrl's {len(got)}")
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        what = f"output {i}" if len(want) > 1 else "output"
        if (a is None) != (b is None):
            raise PatchError(f"{name}: {what} is None on one side alone")
        if a is None:
            continue
        if a.shape != b.shape:
            raise PatchError(f"{name}: {what} is {tuple(a.shape)}, fastrl's {tuple(b.shape)}")
        if mask is not None:
            a, b = a[mask], b[mask]
        if a.dtype == torch.bool:
            share = (a != b).double().mean().item() if a.numel() else 0.0
            # A tie of two logits that one side rounded may fall either way.
            allowed = max(5 * VALUES[dtype], 1.0 / max(a.numel(), 1))
            _check(name, what, share, allowed, dtype)
        else:
            _check_close(name, what, a, b, VALUES[dtype], 1.0, dtype)


def compare_gradients(
    name: str,
    want: tuple[list[Any], dict[str, Tensor]],
    got: tuple[list[Any], dict[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Raise `PatchError` where gradients of all differentiable outputs together differ.

    Each side is (outputs, leaves by name); the upstream gradient differs from element to element.
    """
    through = [i for i, a in enumerate(want[0]) if isinstance(a, Tensor) and a.requires_grad]
    if not through:
        return
    for i in through:
        if not got[0][i].requires_grad:
            raise PatchError(f"{name}: output {i} has a gradient, fastrl's has none")
    theirs, ours = (
        torch.autograd.grad(
            [outputs[i] for i in through],
            list(leaves.values()),
            [_upstream(outputs[i], i) for i in through],
            allow_unused=True,
        )
        for outputs, leaves in (want, got)
    )
    for leaf, a, b in zip(want[1], theirs, ours, strict=True):
        if a is None and b is None:
            continue
        a = torch.zeros_like(want[1][leaf]) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        _check_close(name, f"gradient of {leaf}", a, b, GRADIENTS[dtype], 0.0, dtype)


def _upstream(output: Tensor, seed: int) -> Tensor:
    steps = torch.arange(output.numel(), device=output.device, dtype=torch.float32)
    return torch.cos(steps + seed).view(output.shape).to(output.dtype)


def _check_close(
    name: str,
    what: str,
    want: Tensor,
    got: Tensor,
    tolerance: float,
    floor: float,
    dtype: torch.dtype,
) -> None:
    finite = torch.isfinite(want)
    want, got = want[finite].double(), got[finite].double()
    if not want.numel():
        return
    scale = max(want.abs().max().item(), floor)
    _check(name, what, (want - got).abs().max().item(), tolerance * scale, dtype)


def _check(name: str, what: str, gap: float, allowed: float, dtype: torch.dtype) -> None:
    if not gap <= allowed:
        raise PatchError(
            f"{name}: fastrl's {what} differs from the original's by {gap:.3g} on this batch of "
            f"{dtype} (allowed {allowed:.3g}); undo() the patch, and please report it"
        )
