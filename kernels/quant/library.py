"""The torch operators of this family: schemas, fakes, call of an implementation.

An implementation is a module beside this one with functions of the operators' names, which take
the operators' arguments but `impl` and return their results, or write them to `out`. None has a
gradient.
"""

import torch
from torch import Tensor

from fastrl.kernels.operators import by_last, define
from fastrl.kernels.quant.weight import QuantizedWeight

MODULES = {  # of each implementation
    **{"reference": "plain", "cpu": "cpu", "scaled": "scaled"},
    **{"triton": "triton_launch", "cuda": "cuda"},
}

_WEIGHT = (
    "Tensor data, Tensor scale, Tensor? absmax, Tensor? code, Tensor? nested_absmax, "
    "Tensor? nested_code, Tensor? nested_offset, str scheme, int rows, int columns, int block, "
    "str compute"
)
_SCHEMAS = {
    "quantize_rows": "(Tensor x, str impl) -> (Tensor, Tensor)",
    "rmsnorm_quant": (
        "(Tensor x, Tensor weight, Tensor? residual, float eps, float weight_offset, str impl)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "glu_quant": "(Tensor gate, Tensor up, str activation, str impl) -> (Tensor, Tensor)",
    "pool_score": (
        "(Tensor hidden, Tensor last, Tensor norm_weight, Tensor head, Tensor? bias, float eps, "
        "float weight_offset, str impl) -> Tensor"
    ),
    "quantized_linear": (
        f"(Tensor x, Tensor? x_scale, Tensor? bias, {_WEIGHT}, Tensor(a!) out, str impl) -> ()"
    ),
    "dequantize": f"(ScalarType dtype, {_WEIGHT}, str impl) -> Tensor",
}


def rows_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten int8 rows and scales for x [..., K]."""
    data = x.new_empty(x.shape, dtype=torch.int8)
    return data, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_rmsnorm_quant(x, weight, residual, eps, weight_offset, impl):
    return *rows_like(x), x.new_empty(0 if residual is None else x.shape)


def _fake_dequantize(dtype, *weight):
    w = QuantizedWeight(*weight[:-1])
    return w.data.new_empty(w.shape, dtype=dtype)


_FAKES = {
    "quantize_rows": lambda x, impl: rows_like(x),
    "rmsnorm_quant": _fake_rmsnorm_quant,
    "glu_quant": lambda gate, up, activation, impl: rows_like(gate),
    "pool_score": lambda hidden, last, norm_weight, head, *_: hidden.new_empty(
        (len(last), len(head)), dtype=torch.float32
    ),
    "quantized_linear": lambda *_: None,
    "dequantize": _fake_dequantize,
}

for _name, _schema in _SCHEMAS.items():
    define(_name, _schema, by_last(_name, "fastrl.kernels.quant", MODULES), _FAKES[_name])
