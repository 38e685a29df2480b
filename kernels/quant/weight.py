"""Quantized tensors as they are stored: fields, layouts, and moving them about."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

# The products each scheme can be taken in, its default first.
COMPUTE = {"int8": ("int8",), "nf4": ("int8", "bf16"), "int4": ("int8", "bf16"), "fp8": ("fp8",)}
PAD = 64  # int8 rows are stored in whole cache lines, which are also the rows of an AMX tile
LONGEST = 131071  # of a row of int8: its products with another's sum to less than 2^31
NESTED_BLOCK = 256  # absmaxes that share one of their own


class QuantizedRows(NamedTuple):
    """Rows in int8, each with its scale: x ~ data * scale[..., None]."""

    data: Tensor  # int8 [..., K]
    scale: Tensor  # float32 [...]; NaN where the row held a NaN or an infinity


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight ``[N, K]`` as :func:`quantize` stores it.

    ``data`` holds, by scheme:

    * int8: int8 ``[N, K rounded up to 64]``, 0 behind K.
    * nf4: uint8 ``[ceil(N K / 2)]``: indices into ``code`` of the flattened weight, two to a byte,
      the first in the high half; element i has ``absmax[i // block]``. (2305.14314)
    * int4: the same with rows padded to whole groups: element (n, k) has ``absmax[n, k // block]``,
      and ``code`` is -8 to 7.
    * fp8: float8_e4m3fn ``[N, K]``.

    ``scale`` is float32 ``[N]``: of the stored rows (int8, fp8), or of the int8 rows that 4-bit
    ones are unpacked to. Nested: ``absmax`` is uint8, and absmax i stands for
    ``nested_code[absmax[i]] * nested_absmax[i // 256] + nested_offset``.
    """

    data: Tensor
    scale: Tensor
    absmax: Tensor | None
    code: Tensor | None
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    scheme: str
    rows: int
    columns: int
    block: int
    compute: str

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight that this stands for."""
        return self.rows, self.columns

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def arguments(self) -> tuple:
        """The fields in order, as the operators take them."""
        return (
            *(self.data, self.scale, self.absmax, self.code),
            *(self.nested_absmax, self.nested_code, self.nested_offset),
            *(self.scheme, self.rows, self.columns, self.block, self.compute),
        )

    def tensors(self) -> dict[str, Tensor]:
        return {n: t for n in NAMES if isinstance(t := getattr(self, n), Tensor)}

    def to(self, device: torch.device | str) -> Self:
        """The same on another device; dtypes are what they are."""
        return replace(self, **{n: t.to(device) for n, t in self.tensors().items()})

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Tensors alone, for safetensors; the settings are JSON in a uint8 tensor, ``config``."""
        settings = {n: v for n, v in zip(NAMES, self.arguments, strict=True) if n in SETTINGS}
        config = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
        return {prefix + n: t for n, t in {**self.tensors(), "config": config}.items()}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> Self:
        """What ``state_dict(prefix)`` wrote. Raises ValueError naming what is missing or wrong."""
        for name in ("config", "data", "scale"):
            if prefix + name not in tensors:
                raise ValueError(f"state dict has no {prefix + name!r} of a quantized weight")
        values: dict[str, Any] = {n: tensors.get(prefix + n) for n in NAMES if n not in SETTINGS}
        settings = json.loads(bytes(tensors[prefix + "config"].tolist()))
        if sorted(settings) != sorted(SETTINGS):
            raise ValueError(f"{prefix}config must name {', '.join(SETTINGS)}, got {settings}")
        weight = cls(**values, **settings)
        weight.check(prefix or "weight")
        return weight

    def check(self, name: str) -> None:
        """ValueError, naming ``name``, unless dtypes and shapes are those of the scheme."""
        if self.scheme not in COMPUTE:
            raise ValueError(f"{name}: {unknown_scheme(self.scheme)}")
        if self.compute not in COMPUTE[self.scheme]:
            raise ValueError(f"{name}: {unknown_compute(self.scheme, self.compute)}")
        rows, columns = self.shape
        check_width(name, columns)
        wanted = {"data": self._data_like(), "scale": ((rows,), torch.float32)}
        if self.scheme in ("nf4", "int4"):
            if self.block < 1:
                raise ValueError(f"{name}: block={self.block} must be at least 1")
            count = rows * columns
            blocks: tuple[int, ...] = (-(-count // self.block),)
            if self.scheme == "int4":
                blocks = (rows, -(-columns // self.block))
            nested = self.nested_absmax is not None
            wanted["code"] = ((16,), torch.float32)
            wanted["absmax"] = (blocks, torch.uint8 if nested else torch.float32)
            if nested:
                wanted["nested_absmax"] = ((-(-blocks[0] // NESTED_BLOCK),), torch.float32)
                wanted["nested_code"] = ((256,), torch.float32)
                wanted["nested_offset"] = ((), torch.float32)
        found = self.tensors()
        if extra := sorted(set(found) - set(wanted)):
            raise ValueError(f"{name}: scheme {self.scheme} has no {', '.join(extra)}")
        for field, (shape, dtype) in wanted.items():
            if field not in found:
                raise ValueError(f"{name}: {field} is missing, {dtype} {shape}")
            tensor = found[field]
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name}: {field} must be {dtype} {shape} for a weight [{rows}, {columns}], "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
            if tensor.dtype == torch.float32 and not tensor.isfinite().all():
                raise ValueError(f"{name}: {field} holds NaN or infinite values")

    def _data_like(self) -> tuple[tuple[int, ...], torch.dtype]:
        rows, columns = self.shape
        if self.scheme == "int8":
            return (rows, -(-columns // PAD) * PAD), torch.int8
        if self.scheme == "fp8":
            return (rows, columns), torch.float8_e4m3fn
        if self.scheme == "nf4":
            return (-(-rows * columns // 2),), torch.uint8
        return (rows, -(-columns // self.block) * self.block // 2), torch.uint8


NAMES = tuple(f.name for f in fields(QuantizedWeight))
SETTINGS = ("scheme", "rows", "columns", "block", "compute")


def unknown_scheme(scheme: str) -> str:
    return f"scheme={scheme!r} is unknown; use one of {', '.join(COMPUTE)}"


def unknown_compute(scheme: str, compute: str) -> str:
    return f"compute={compute!r} is not for scheme {scheme}; use {' or '.join(COMPUTE[scheme])}"


def check_width(name: str, columns: int) -> None:
    if not 1 <= columns <= LONGEST:
        raise ValueError(
            f"{name} has rows of {columns} elements; they must be of 1 to {LONGEST}, "
            "so that sums of int8 products fit in 32 bits"
        )
