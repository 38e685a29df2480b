"""Weights that bitsandbytes quantized, read from the tensors of a state dict."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.kernels.quant.schemes import BLOCKS, NF4, with_row_scales
from fastrl.kernels.quant.weight import NESTED_BLOCK, PAD, QuantizedWeight, check_width

_STATE = ".quant_state.bitsandbytes__"


def weight_from_bitsandbytes(
    tensors: Mapping[str, Tensor], name: str = "weight", *, compute: str = "int8"
) -> QuantizedWeight:
    """One layer of a bitsandbytes state dict: ``Linear4bit`` (NF4, plain or nested) or LLM.int8.

    ``tensors[name]`` is the packed weight. NF4 needs ``name.absmax``, ``name.quant_map`` and
    ``name.quant_state.bitsandbytes__nf4`` beside it, and when nested ``name.nested_absmax`` and
    ``name.nested_quant_map``; int8 needs ``SCB``, row absmaxes, in place of the name's last part
    (``up_proj.weight`` -> ``up_proj.SCB``). Nothing is quantized again: dequantized values are
    bitsandbytes' own, bit for bit; LLM.int8's outlier columns are not kept apart.

    ``compute`` is that of :func:`quantize`. Raises ValueError naming the tensor that is missing,
    has a wrong shape or dtype, holds NaN, or is a code table of another format (FP4).
    """
    found = _get(tensors, name)
    if found.dtype == torch.int8:
        if compute != "int8":
            raise ValueError(f"{name}: compute={compute!r} is not for scheme int8; use int8")
        return _int8(found, tensors, name)
    return _nf4(found, tensors, name, compute)


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"state dict has no {name!r}")
    return tensors[name]


def _int8(data: Tensor, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
    if data.dim() != 2:
        raise ValueError(f"{name} must be [N, K], got {tuple(data.shape)}")
    check_width(name, data.shape[1])
    key = name.removesuffix("weight") + "SCB"
    absmax = _get(tensors, key)
    if absmax.shape != data.shape[:1]:
        raise ValueError(
            f"{key} must be [{data.shape[0]}], a number for each row of {name} "
            f"{tuple(data.shape)}, got {tuple(absmax.shape)}"
        )
    scale = absmax.float() / 127
    padded = F.pad(data, (0, -data.shape[1] % PAD))
    none = (None,) * 5
    weight = QuantizedWeight(padded, scale, *none, "int8", *data.shape, 0, "int8")
    weight.check(name)
    return weight


def _settings(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    if name + _STATE + "nf4" not in tensors:
        others = [k.removeprefix(name + _STATE) for k in tensors if k.startswith(name + _STATE)]
        hint = f"; it is {others[0]}, and only nf4 is read" if others else ""
        raise ValueError(f"state dict has no {name + _STATE + 'nf4'!r}{hint}")
    key = name + _STATE + "nf4"
    try:
        settings = json.loads(bytes(tensors[key].tolist()))
        _rows, _columns = settings["shape"]
        if settings["quant_type"] != "nf4":
            raise ValueError(f"quant_type is {settings['quant_type']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{key} must be JSON with quant_type nf4, a blocksize and a shape [N, K]: {error!r}"
        ) from error
    if settings.get("blocksize") not in BLOCKS["nf4"]:
        raise ValueError(f"{key}: blocksize={settings.get('blocksize')} is not of {BLOCKS['nf4']}")
    return settings


def _nf4(found: Tensor, tensors: Mapping[str, Tensor], name: str, compute: str) -> QuantizedWeight:
    settings = _settings(tensors, name)
    rows, columns = settings["shape"]
    check_width(name, columns)
    # The bytes may be stored as another dtype of theirs (quant_storage).
    data = found.contiguous().flatten().view(torch.uint8)
    code = _get(tensors, name + ".quant_map").float()
    if code.shape != (16,) or not torch.allclose(code.cpu(), torch.tensor(NF4), atol=1e-6):
        raise ValueError(f"{name}.quant_map must be the 16 values of NF4, got {code.tolist()}")
    nesting: tuple = (None, None, None)
    if "nested_offset" in settings:
        if settings.get("nested_blocksize") != NESTED_BLOCK:
            raise ValueError(
                f"{name}: nested_blocksize={settings.get('nested_blocksize')} "
                f"must be {NESTED_BLOCK}"
            )
        offset = torch.tensor(settings["nested_offset"], device=data.device, dtype=torch.float32)
        keys = (name + ".nested_absmax", name + ".nested_quant_map")
        nesting = (*(_get(tensors, key).float() for key in keys), offset)
    weight = QuantizedWeight(
        data,
        torch.ones(rows, device=data.device),
        _get(tensors, name + ".absmax"),
        code,
        *nesting,
        "nf4",
        rows,
        columns,
        settings["blocksize"],
        compute,
    )
    weight.check(name)
    return with_row_scales(weight)
