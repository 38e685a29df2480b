"""What adapters from peft add to a model's layers, and when that changes."""

from typing import NamedTuple

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


class LowRank(NamedTuple):
    """Adds `scaling * b(a(x))` to what a linear layer returns; a `[r, in]`, b `[out, r]`."""

    a: nn.Linear
    b: nn.Linear
    scaling: float


def low_rank(layer: nn.Module) -> tuple[nn.Module, list[LowRank]]:
    """The layer below peft's, and what that adds to it in eval mode, in this order.

    Nothing where adapters are disabled, or merged into the layer's weight. A layer that is none of
    LoRA's for `nn.Linear` is returned as it is. Raises `ValueError` for active adapters that
    compute something else (DoRA and other variants).
    """
    if type(layer) is not lora.Linear:
        return layer, []
    base, found = layer.base_layer, []
    # Disabled and merged: the layer's own forward takes them out of the weight, in place.
    active = [] if layer.disable_adapters or layer.merged else layer.active_adapters
    for name in active:
        if name not in layer.lora_A:
            continue
        a, b = layer.lora_A[name], layer.lora_B[name]
        variant = layer.lora_variant.get(name)
        if variant is not None or type(a) is not nn.Linear or type(b) is not nn.Linear:
            kind = type(b if variant is None else variant).__name__
            raise ValueError(f"its adapter {name!r} is no plain LoRA but a {kind}")
        found.append(LowRank(a, b, layer.scaling[name]))
    return base, found


def adapter_state(model: nn.Module) -> tuple:
    """Differs after adapters were switched, scaled, disabled, merged or unmerged."""
    return tuple(
        (
            module.disable_adapters,
            tuple(module.active_adapters),
            tuple(module.merged_adapters),
            tuple(module.scaling.items()) if isinstance(module, lora.LoraLayer) else (),
        )
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )
