"""When the weights that rollouts were sampled from have changed."""

from torch import nn


def fingerprint(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes with every in-place write to a parameter that autograd sees, and with every move."""
    local = (getattr(p, "_local_tensor", p) for p in model.parameters())
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in local)


class WeightVersion:
    """Counts the changes of a model's weights, from 0.

    In-place writes to parameters and moves of them are noticed; writes past autograd, such as to
    `parameter.data`, need `changed`.
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

    def addresses(self) -> list[int]:
        """Where the parameters lay when they were last looked at."""
        return [address for address, _ in self._seen]
