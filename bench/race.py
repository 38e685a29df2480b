"""What a race is: an op, shapes, variants that do it, the gate they pass before they are timed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

Shape = dict[str, Any]
FORWARD, BOTH = "forward", "both"


@dataclass(frozen=True)
class Variant:
    """A way to do an op. ``peer`` is its name in peers.py; ours have ``fastrl``.

    What is ``compiled`` is so at the first call at full size, which is not part of its memory. What
    is ``costly`` (compiled, or very slow) runs on a CPU only where its peer is asked for by name.
    It is not timed in the modes that it is ``without``. A peer that does not do a shape raises
    NotImplementedError with the reason there.
    """

    function: Callable[..., Any]
    peer: str = "fastrl"
    compiled: bool = False
    slow: bool = False
    without: tuple[str, ...] = ()

    @property
    def costly(self) -> bool:
        return self.compiled or self.slow

    @property
    def ours(self) -> bool:
        return self.peer == "fastrl"


@dataclass(frozen=True)
class Verdict:
    """How far a variant is from the truth, by result, and what is wrong with it, if anything."""

    errors: dict[str, float] = field(default_factory=dict)
    wrong: str | None = None


class Work(NamedTuple):
    """What a call cannot do without: operations of a dtype, and bytes to and from memory."""

    operations: float
    bytes: float
    dtype: str = "float32"


def within(errors: Mapping[str, float], limit: float | Mapping[str, float]) -> Verdict:
    """The verdict on ``errors``, of which none may be above ``limit`` (or its own limit)."""
    for name, error in errors.items():
        most = limit if isinstance(limit, (int, float)) else limit[name]
        if not error <= most:  # a NaN is wrong too
            return Verdict(dict(errors), f"{name} is off by {error:.2g}, more than {most:.2g}")
    return Verdict(dict(errors))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The relative error of ``got`` in the 2-norm."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


class Race(ABC):
    """One op's race. A module `bench_<op>.py` has one as ``RACE``, and OPS its name.

    A shape is a dict with the keys of ``defaults``; those it leaves out have their values there.
    ``grids`` names lists of shapes, of which "default" and "quick" must be; ``cuda`` is what takes
    the place of "default" on a GPU, where that differs.
    """

    op: str
    about: str
    defaults: Shape
    grids: dict[str, list[Shape]]
    cuda: list[Shape] | None = None
    modes: tuple[str, ...] = (FORWARD, BOTH)
    # Parts by name, and the variant that adds each to the one before; the first is the start.
    ladder: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def variants(self, device: torch.device) -> dict[str, Variant]:
        """All there are for ``device`` by name, ours first, whether or not they are installed."""

    @abstractmethod
    def draw(self, shape: Shape, device: torch.device) -> Any:
        """The inputs at a shape, the same in every process."""

    @abstractmethod
    def call(self, variant: Variant, inputs: Any, mode: str) -> Callable[[], Any]:
        """What is timed; whatever it returns is dropped after the clock has stopped."""

    @abstractmethod
    def gate(self, variant: Variant, inputs: Any, shape: Shape) -> Verdict:
        """Whether ``variant`` may be timed: a wrong kernel has no speed."""

    @abstractmethod
    def work(self, shape: Shape, mode: str) -> Work:
        """What the call has to compute and to move."""

    def before(self, variant: Variant, inputs: Any, mode: str) -> Any:
        """Inputs of one call where a call spoils them; its time does not count."""
        return inputs

    def figures(
        self, variant: Variant, inputs: Any, shape: Shape, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """What follows from a variant's best ``seconds`` by mode, or was counted, by column."""
        return {}

    def small(self, shape: Shape) -> Shape:
        """A shape of the same kind whose call loads what is loaded once, before memory is taken."""
        return shape

    def bytes_needed(self, name: str, shape: Shape) -> float:
        """At least so much memory, so that what would not fit is left out."""
        return 0.0

    def complete(self, shape: Shape) -> Shape:
        """``shape`` with the defaults of what it leaves out; ValueError for an unknown key."""
        for key in shape:
            if key not in self.defaults:
                raise ValueError(
                    f"{self.op}: shape has {key!r}; it may have {', '.join(self.defaults)}"
                )
        return {**self.defaults, **shape}

    def shapes(self, grid: str, device: torch.device) -> list[Shape]:
        """The shapes of a grid; ValueError where the op has no such grid."""
        if grid not in self.grids:
            raise ValueError(f"{self.op} has no grid {grid!r}; it has {', '.join(self.grids)}")
        on_gpu = grid == "default" and device.type == "cuda" and self.cuda is not None
        return [self.complete(s) for s in (self.cuda if on_gpu else self.grids[grid]) or ()]


def describe(shape: Shape) -> str:
    """A shape in one line: numbers with their names, words alone, what is off left out."""
    parts = []
    for key, value in shape.items():
        if isinstance(value, str):
            parts.append(value)
        elif value is True:
            parts.append(key)
        elif value is not False and value is not None and (value or len(key) == 1):
            parts.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return " ".join(parts)
