"""Quantized reward models on disk: what `save_pretrained` writes and `from_pretrained` takes back.

    config.json            Hugging Face's, with a section quantization_config, quant_method "fastrl"
    quantized.safetensors  the weights as they are held, by the names of the float checkpoint;
                           a quantized one is several: NAME.weight.data, NAME.weight.scale, ...
    tokenizer files        where the model has one

Norms hold what they multiply by, Gemma's offset and smoothing included.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastrl.files import write_folder
from fastrl.kernels import QuantizedWeight
from fastrl.reward.backbone import Layer
from fastrl.reward.build import QUANTIZED, Plan, layer_norms, to
from fastrl.reward.checkpoint import METHOD, Checkpoint, RewardModelError
from fastrl.reward.linear import Linear

VERSION = 1
# Not a name under which Hugging Face would find it, warn that it knows no such method and go on
# with random weights.
FILE = "quantized.safetensors"


def section(plan: Plan, smooth: int | None) -> dict[str, Any]:
    """What config.json records; smooth is the number of tokens that smoothing was calibrated on."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "scheme": plan.scheme,
        "skip": list(plan.skip),
        "keep_bf16": list(plan.keep_bf16),
        "options": dict(plan.options),
        "smooth": smooth,
    }


def save(
    folder: Path, config: Any, recorded: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Any
) -> None:
    """Write a directory, whole or not at all.

    Raises `ValueError` where something is there already, and `WriteError` where writing fails.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"path={str(folder)!r} is not empty; give a directory that is, or a new one"
        )
    config = copy.deepcopy(config)
    config.quantization_config = recorded

    def fill(temporary: Path) -> None:
        config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        save_file(_apart(tensors), temporary / FILE)

    write_folder(folder, fill)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, no two in one memory, as safetensors asks: scales and code tables are shared."""
    seen, out = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        out[name] = tensor
    return out


def layer_tensors(layer: Layer) -> dict[str, Tensor]:
    """Everything that a layer holds, by the names of the float checkpoint."""
    prefix, out = f"model.layers.{layer.index}.", dict[str, Tensor]()
    for name, linear in layer.linears.items():
        if isinstance(linear.weight, QuantizedWeight):
            out |= linear.weight.state_dict(f"{prefix}{name}.weight.")
        else:
            out[f"{prefix}{name}.weight"] = linear.weight
        for part in ("bias", "input_scale", "output_scale"):
            value = getattr(linear, part)
            if value is not None:
                out[f"{prefix}{name}.{part}"] = value
    return out | {f"{prefix}{name}.weight": norm for name, norm in layer.norms.items()}


def check_section(checkpoint: Checkpoint, scheme: str | None, given: dict[str, bool]) -> str:
    """The scheme of a saved model; `given` says which other settings the caller asks for.

    Raises `RewardModelError` for a section of another version or without what it must have, and
    `ValueError` for settings that would change what is already quantized.
    """
    saved, source = checkpoint.saved or {}, checkpoint.source
    if saved.get("version") != VERSION:
        raise RewardModelError(
            f"{source}: quantization_config has version {saved.get('version')!r}, this fastrl "
            f"reads {VERSION}"
        )
    held = saved.get("scheme")
    if not isinstance(held, str) or not held:
        raise RewardModelError(f"{source}: quantization_config has scheme {held!r}, not a name")
    if scheme not in (None, held):
        raise ValueError(
            f"scheme={scheme!r}, but {source} is quantized already, as {held!r}; leave it out, or "
            "give the float checkpoint"
        )
    for name in (n for n, is_given in given.items() if is_given):
        raise ValueError(
            f"{name} has no use with {source}, which is quantized already; give the float "
            "checkpoint"
        )
    return held


def saved_layers(checkpoint: Checkpoint, scheme: str, device: torch.device) -> list[Layer]:
    """The layers as they were saved.

    Raises `RewardModelError` for tensors that are missing or do not fit the config or the scheme.
    """
    spec = checkpoint.spec
    linears: list[dict[str, Linear]] = [{} for _ in range(spec.layers)]
    found = set[str]()
    for name, shape in spec.linears().items():
        parts = checkpoint.parts(name)
        weight: Tensor | QuantizedWeight
        if "weight.data" in parts:
            weight = _weight(checkpoint, name, parts, shape)
            found.add(weight.scheme)
        else:
            weight = checkpoint.get(f"{name}.weight", shape)
        sizes = {"bias": shape[0], "input_scale": shape[1], "output_scale": shape[0]}
        others = (
            checkpoint.get(f"{name}.{part}", (size,)) if part in parts else None
            for part, size in sizes.items()
        )
        _, index, short = name.split(".", 2)
        linears[int(index)][short] = Linear(weight.to(device), *(to(x, device) for x in others))
    if not found <= set(scheme.split("+")) & set(QUANTIZED):
        raise RewardModelError(
            f"{checkpoint.source}: its weights are {', '.join(sorted(found))}, but its config says "
            f"{scheme!r}"
        )
    return [
        Layer(spec, i, some, {n: x.to(device) for n, x in layer_norms(checkpoint, i).items()})
        for i, some in enumerate(linears)
    ]


def _weight(
    checkpoint: Checkpoint, name: str, parts: dict[str, Tensor], shape: tuple[int, int]
) -> QuantizedWeight:
    try:
        weight = QuantizedWeight.from_state_dict(parts, "weight.")
    except (ValueError, TypeError) as error:  # a settings tensor may hold anything
        raise RewardModelError(f"{checkpoint.source}: 'model.{name}': {error}") from None
    if weight.shape != shape:
        raise RewardModelError(
            f"{checkpoint.source}: 'model.{name}.weight' stands for {weight.shape}, the config "
            f"asks for {shape}"
        )
    return weight
