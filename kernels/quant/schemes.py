"""quantize: a weight into one of the schemes, in plain PyTorch, as it happens once per weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.kernels.checks import FLOATS
from fastrl.kernels.quant import reference
from fastrl.kernels.quant.weight import (
    COMPUTE,
    NESTED_BLOCK,
    PAD,
    QuantizedWeight,
    check_width,
    unknown_compute,
    unknown_scheme,
)

BLOCKS = {"nf4": (32, 64, 128, 256, 512, 1024, 2048, 4096), "int4": (32, 64, 128)}
# 16 quantiles of a normal distribution, scaled to [-1, 1], with an exact 0. (2305.14314)
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def dynamic_code() -> Tensor:
    """The 256 values that nested absmaxes take: decades, each twice as fine as the one below.

    (1511.04561: a sign, the decade in unary, the rest a linear fraction of [0.1, 1].)
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += [10.0 ** (i - 6) * middles, -(10.0 ** (i - 6)) * middles]
    return torch.cat(values).sort().values


def quantize(
    weight: Tensor,
    scheme: str = "int8",
    *,
    compute: str | None = None,
    block: int = 64,
    nested: bool = False,
    group: int = 64,
    name: str = "weight",
) -> QuantizedWeight:
    """A weight ``[N, K]`` in 8 or 4 bits, for :func:`quantized_linear`.

    * ``"int8"``: q = rint(w / s_n), s_n = max_k |w| / 127.
    * ``"nf4"``: the nearest of 16 normal quantiles in blocks of ``block`` elements of the flattened
      weight; ``nested`` stores the blocks' absmaxes in 8 bits: 4.5 or 4.13 bits a weight in blocks
      of 64. The format of bitsandbytes. (2305.14314)
    * ``"int4"``: q = rint(w / s) in -7 to 7, s = max |w| / 7 of each ``group`` of a row.
    * ``"fp8"``: e4m3 of w / s_n, s_n = max_k |w| / 448.

    ``compute`` says in what the products are taken. ``"int8"`` (the default but for fp8) makes
    integer rows of 4-bit weights, a panel at a time, with one scale a row: that adds at most
    max_k |w| / 254 to an element's error, about a tenth of what the 4 bits cost. ``"bf16"``
    rounds the weights and the activations to bf16 instead.

    ``weight`` is float32, bfloat16 or float16; K is at most 131071. Raises ValueError for a NaN or
    an infinity in it, naming ``name``, and for settings that do not exist.
    """
    if scheme not in COMPUTE:
        raise ValueError(f"quantize: {unknown_scheme(scheme)}")
    compute = compute or COMPUTE[scheme][0]
    if compute not in COMPUTE[scheme]:
        raise ValueError(f"quantize: {unknown_compute(scheme, compute)}")
    for option, value in (("block", block), ("group", group)):
        of = "nf4" if option == "block" else "int4"
        if value != 64 and scheme != of:
            raise ValueError(f"quantize: {option}={value} is for scheme {of}, not {scheme}")
        if value not in BLOCKS[of]:
            raise ValueError(f"quantize: {option}={value} must be one of {BLOCKS[of]}")
    if nested and scheme != "nf4":
        raise ValueError(f"quantize: nested=True is for scheme nf4, not {scheme}")
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be [N, K] in float32, bfloat16 or float16, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    check_width(name, weight.shape[1])
    wide = weight.detach().float()
    if bad := int((~wide.isfinite()).sum()):
        raise ValueError(f"{name} holds {bad} NaN or infinite values; it cannot be quantized")

    def stored(data, scale, absmax=None, code=None, nesting=(None, None, None), block=0):
        return QuantizedWeight(
            data, scale, absmax, code, *nesting, scheme, *weight.shape, block, compute
        )

    if scheme == "int8":
        rows = reference.quantize_rows(wide)
        return stored(F.pad(rows.data, (0, -weight.shape[1] % PAD)), rows.scale)
    if scheme == "fp8":
        return stored(*reference.fp8_rows(wide))
    if scheme == "nf4":
        data, absmax, code = _nf4(wide.flatten(), block)
        nesting = (None, None, None)
        if nested:
            absmax, nesting = _nest(absmax)
        result = stored(data, wide[:, 0], absmax, code, nesting, block)
    else:
        result = stored(*_int4(wide, group), block=group)
    return with_row_scales(result)


def with_row_scales(w: QuantizedWeight) -> QuantizedWeight:
    """A 4-bit weight whose ``scale`` is that of the int8 rows it is unpacked to."""
    scale = reference.row_scale(reference.dequantize(w), 127.0)
    arguments = dict(zip(w.__dataclass_fields__, w.arguments, strict=True))
    return QuantizedWeight(**{**arguments, "scale": scale})


def _nibbles(indices: Tensor) -> Tensor:
    """Two 4-bit indices to a byte, the first in the high half; 7, NF4's 0, fills an odd end."""
    indices = F.pad(indices, (0, indices.shape[-1] % 2), value=7).to(torch.uint8)
    return indices[..., ::2] << 4 | indices[..., 1::2]


def _nearest(flat: Tensor, block: int, code: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into ``code`` and the absmax of each block of ``flat``."""
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / absmax.clamp_min(1e-38)).unsqueeze(-1)).clamp(-1, 1)
    middles = (code[:-1] + code[1:]) / 2
    return torch.bucketize(scaled.flatten()[: len(flat)], middles), absmax


def _nf4(flat: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    code = torch.tensor(NF4, device=flat.device)
    indices, absmax = _nearest(flat, block, code)
    return _nibbles(indices), absmax, code


def _nest(absmax: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    offset = absmax.mean()
    code = dynamic_code().to(absmax.device)
    indices, each = _nearest(absmax - offset, NESTED_BLOCK, code)
    return indices.to(torch.uint8), (each, code, offset)


def _int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    padded = F.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    scale = reference.row_scale(padded, 7.0)
    steps = (padded * (1.0 / scale).unsqueeze(-1)).round().clamp(-7, 7)
    code = torch.arange(-8.0, 8.0, device=weight.device)
    return _nibbles((steps + 8).flatten(1)), weight[:, 0], scale, code
