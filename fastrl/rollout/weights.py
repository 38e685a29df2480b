"""When the weights that rollouts were sampled from have changed."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fastrl.kernels import native
from fastrl.models.adapters import adapter_state


class Fingerprint(NamedTuple):
    """Changes with every in-place write to a parameter that autograd sees (`versions`), with writes
    to all of some parameters on a CPU (`glimpse`), and with every move of one and whenever adapters
    are switched, scaled, disabled or merged (`places`)."""

    places: tuple
    versions: tuple[int, ...]
    glimpse: int


def version(parameter: Tensor) -> tuple[int, int]:
    """Its address, and how often it was written to in place, as far as autograd sees that."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def fingerprint(model: nn.Module) -> Fingerprint:
    """Of the parameters on this rank, and of peft's adapters."""
    local = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    addresses = tuple(version(p)[0] for p in local)
    versions = tuple(version(p)[1] for p in local)
    return Fingerprint((addresses, adapter_state(model)), versions, glimpse(local))


def glimpse(parameters: Sequence[Tensor]) -> int:
    """A hash of a few numbers of each that is on a CPU: PyTorch's fused optimizers write past
    autograd. 0 without the native extension."""
    if native.why_missing:
        return 0
    seen = [p for p in parameters if p.device.type == "cpu" and _readable(p)]
    return native.module().glimpse([p.data_ptr() for p in seen], [p.nbytes for p in seen])


def _readable(p: Tensor) -> bool:
    """Whether all its bytes are at its address: a wrapper of other tensors has none there."""
    if not p.is_contiguous() or p.data_ptr() == 0:
        return False
    return p.untyped_storage().nbytes() >= p.storage_offset() * p.itemsize + p.nbytes


class WeightVersion:
    """Counts the changes of a model's weights, from 0.

    In-place writes to parameters and moves of them are noticed, on a CPU also those of PyTorch's
    fused optimizers, and adapters that are switched, scaled, disabled or merged. Other writes past
    autograd, such as to a part of `parameter.data`, need `changed`.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._seen = fingerprint(model)
        self._version = 0

    def current(self) -> int:
        """The version of the weights as they are now."""
        now = fingerprint(self._model)
        if now != self._seen:
            self._seen = now
            self._version += 1
        return self._version

    def changed(self) -> None:
        """Note that the weights were updated."""
        self._seen = fingerprint(self._model)
        self._version += 1

    def places(self) -> tuple:
        """What a decoder is made for, as it was when last looked at: all but numbers in place."""
        return self._seen.places
