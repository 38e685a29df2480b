"""Linear layers in int8 for the native decoder: copies of their weights that follow them."""

from typing import Any

import torch

from fastrl.kernels.native import module, pointer
from fastrl.kernels.quant.cpu import Int8Rows
from fastrl.kernels.quant.weight import PAD, check_width
from fastrl.rollout.weights import glimpse, version


class Int8Linears:
    """Weights of linear layers in int8, a byte each and eight a row beside the model's own.

    The copies stay where they are and hold no numbers before `refresh`.
    """

    def __init__(self) -> None:
        self._layers: dict[str, Any] = {}
        self._rows: dict[str, Int8Rows] = {}
        self._seen: dict[str, Any] = {}  # versions of the weights that were quantized

    def copy(self, layer: Any, name: str) -> Int8Rows:
        """What the `weight` `[N, K]` of a layer will be quantized to.

        Raises `ValueError` for rows too long for int8.
        """
        n, k = layer.weight.shape
        check_width(f"{name}.weight", k)
        data = torch.zeros(n, -(-k // PAD) * PAD, dtype=torch.int8)
        module().use_huge_pages(pointer(data), data.numel())
        self._layers[name] = layer
        self._rows[name] = Int8Rows(data, torch.zeros(n), torch.zeros(n, dtype=torch.int32))
        return self._rows[name]

    @torch.no_grad()
    def refresh(self, everything: bool) -> None:
        """Quantize the weights that are trained or were written to, or `everything`.

        Raises `ValueError` for a weight that holds NaN or infinite values.
        """
        for name, layer in self._layers.items():
            now = version(layer.weight), glimpse([layer.weight])
            if everything or layer.weight.requires_grad or now != self._seen.get(name):
                self._seen.pop(name, None)
                if bad := self._rows[name].fill(layer.weight.detach()):
                    raise ValueError(
                        f"{name}.weight holds NaN or infinite values in {bad} rows; it cannot be "
                        "quantized"
                    )
                self._seen[name] = now

    @property
    def nbytes(self) -> int:
        """Of the copies."""
        return sum(t.nbytes for rows in self._rows.values() for t in rows)
