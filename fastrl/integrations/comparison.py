"""Whether a replacement computes what the original does: values and gradients of one batch."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from inspect import BoundArguments
from typing import Any

import torch
from torch import Tensor

# Largest difference, as a share of the largest magnitude: of values (at least 1) and of gradients.
# 16 bits are wide, as the originals round logits to them before the logsumexp.
VALUES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GRADIENTS = {torch.float64: 1e-3, torch.float32: 1e-3}
# Of gradients in 16 bits the norm of the difference, as a share of the norm: the originals' own
# were seen to be off by up to 0.13 (bf16, four layers), and what is wrong is off by about 1.
NORMS = {torch.float16: 0.1, torch.bfloat16: 0.3}
PIECE = 2**20  # elements compared at once


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


@dataclass(frozen=True)
class Answer:
    """What a function gave: its outputs without their graph, and gradients through them."""

    outputs: list[Any]
    differentiable: list[bool]
    gradients: dict[str, Tensor | None]

    @classmethod
    def of(cls, result: Any, leaves: dict[str, Tensor]) -> "Answer":
        """The outputs of a function that returns one or a tuple of them.

        Gradients of `leaves` are of all outputs together, weighted from element to element.
        """
        outputs = list(result) if isinstance(result, tuple | list) else [result]
        through = [isinstance(x, Tensor) and x.requires_grad for x in outputs]
        wanted = [(x, i) for i, x in enumerate(outputs) if through[i]] if leaves else []
        gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if wanted:
            gradients = torch.autograd.grad(
                [x for x, _ in wanted],
                list(leaves.values()),
                [_upstream(x, i) for x, i in wanted],
                allow_unused=True,
            )
        return cls(
            [x.detach() if isinstance(x, Tensor) else x for x in outputs],
            through,
            dict(zip(leaves, gradients, strict=True)),
        )


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

    def run(function: Callable[..., Any]) -> Answer:
        fresh = {
            k: (v.detach().clone() if copy else v.detach()).requires_grad_(
                v.requires_grad and torch.is_grad_enabled()
            )
            for k, v in tensors.items()
        }
        leaves = {k: v for k, v in fresh.items() if v.requires_grad}
        return Answer.of(call.answer(function, **fresh, **changed), leaves)

    ours = run(call.ours)  # first: it may decline
    mask = None if where is None else tensors[where] != 0
    compare(call.name, run(original or call.original), ours, narrowest(tensors.values()), mask)


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


def compare(
    name: str, want: Answer, got: Answer, dtype: torch.dtype, mask: Tensor | None = None
) -> None:
    """Raise `PatchError` where answers differ by more than `dtype` explains.

    With `mask`, outputs count where it is true.
    """
    if len(want.outputs) != len(got.outputs):
        raise PatchError(f"{name} returns {len(want.outputs)} values, fastrl's {len(got.outputs)}")
    several = len(want.outputs) > 1
    for i, (a, b) in enumerate(zip(want.outputs, got.outputs, strict=True)):
        what = f"output {i}" if several else "output"
        if (a is None) != (b is None):
            raise PatchError(f"{name}: {what} is None on one side alone")
        if a is None:
            continue
        if a.shape != b.shape:
            raise PatchError(f"{name}: {what} is {tuple(a.shape)}, fastrl's {tuple(b.shape)}")
        if want.differentiable[i] != got.differentiable[i]:
            have = ("has none", "has one")
            raise PatchError(
                f"{name}: a gradient through {what}: the original {have[want.differentiable[i]]}, "
                f"fastrl's {have[got.differentiable[i]]}"
            )
        if mask is not None:
            a, b = a[mask], b[mask]
        if a.dtype == torch.bool:
            share = (a != b).double().mean().item() if a.numel() else 0.0
            # A tie of two logits that one side rounded may fall either way.
            _check(name, what, share, max(5 * VALUES[dtype], 1.0 / max(a.numel(), 1)), dtype)
        else:
            _check_close(name, what, a, b, VALUES[dtype], 1.0, dtype)
    for leaf, a in want.gradients.items():
        b = got.gradients[leaf]
        if a is None and b is None:
            continue
        zeros = torch.zeros((), device=(a if a is not None else b).device)  # type: ignore[union-attr]
        a, b = torch.broadcast_tensors(zeros if a is None else a, zeros if b is None else b)
        if dtype in NORMS:
            _check_norm(name, f"gradient of {leaf}, in norm,", a, b, NORMS[dtype], dtype)
        else:
            _check_close(name, f"gradient of {leaf}", a, b, GRADIENTS[dtype], 0.0, dtype)


def _upstream(output: Tensor, seed: int) -> Tensor:
    steps = torch.arange(output.numel(), device=output.device, dtype=torch.float32)
    return torch.cos(steps + seed).view(output.shape).to(output.dtype)


def _pieces(want: Tensor, got: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What is finite in `want`, and the same of `got`, in float64.

    In pieces: a gradient of an embedding in float64 would be the largest tensor of the step.
    """
    for a, b in zip(want.flatten().split(PIECE), got.flatten().split(PIECE), strict=True):
        finite = torch.isfinite(a)
        if finite.any():
            yield a[finite].double(), b[finite].double()


def _check_close(
    name: str,
    what: str,
    want: Tensor,
    got: Tensor,
    tolerance: float,
    floor: float,
    dtype: torch.dtype,
) -> None:
    gaps, scales = [0.0], [floor]
    for a, b in _pieces(want, got):
        gaps.append((a - b).abs().max().item())
        scales.append(a.abs().max().item())
    gap = torch.tensor(gaps).max().item()  # NaN if there is one
    _check(name, what, gap, tolerance * max(scales), dtype)


def _check_norm(
    name: str, what: str, want: Tensor, got: Tensor, tolerance: float, dtype: torch.dtype
) -> None:
    squares = [(((a - b) ** 2).sum().item(), (a**2).sum().item()) for a, b in _pieces(want, got)]
    gap, scale = (math.sqrt(sum(column)) for column in zip((0.0, 0.0), *squares, strict=True))
    _check(name, what, gap, tolerance * scale, dtype)


def _check(name: str, what: str, gap: float, allowed: float, dtype: torch.dtype) -> None:
    if not gap <= allowed:
        raise PatchError(
            f"{name}: fastrl's {what} differs from the original's by {gap:.3g} on this batch of "
            f"{dtype} (allowed {allowed:.3g}); undo() the patch, and please report it"
        )
