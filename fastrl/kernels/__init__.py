"""The public functions of all ops."""

from fastrl.kernels.attention.layout import GroupLayout
from fastrl.kernels.attention.op import HAS as _ATTENTION
from fastrl.kernels.attention.op import shared_prefix_attention
from fastrl.kernels.layers.op import HAS as _LAYERS
from fastrl.kernels.layers.op import glu, rmsnorm, rope
from fastrl.kernels.logprob.op import HAS as _LOGPROB
from fastrl.kernels.logprob.op import linear_logprob, linear_sample, logprob_from_logits
from fastrl.kernels.logprob.reference import LogProbs, Samples
from fastrl.kernels.quant.blobs import weight_from_bitsandbytes
from fastrl.kernels.quant.op import HAS as _QUANT
from fastrl.kernels.quant.op import (
    dequantize,
    glu_quant,
    pool_score,
    quantize_rows,
    quantized_linear,
    rmsnorm_quant,
)
from fastrl.kernels.quant.schemes import quantize
from fastrl.kernels.quant.weight import QuantizedRows, QuantizedWeight
from fastrl.kernels.scan.op import HAS as _SCAN
from fastrl.kernels.scan.op import discounted_returns, gae, vtrace

# The implementations that each op has besides the reference.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("discounted_returns", "gae", "vtrace"), _SCAN),
    **_LOGPROB,
    "shared_prefix_attention": _ATTENTION,
    **dict.fromkeys(("rmsnorm", "rope", "glu"), _LAYERS),
    **_QUANT,
}

__all__ = [
    "IMPLEMENTATIONS",
    "GroupLayout",
    "LogProbs",
    "QuantizedRows",
    "QuantizedWeight",
    "Samples",
    "dequantize",
    "discounted_returns",
    "gae",
    "glu",
    "glu_quant",
    "linear_logprob",
    "linear_sample",
    "logprob_from_logits",
    "pool_score",
    "quantize",
    "quantize_rows",
    "quantized_linear",
    "rmsnorm",
    "rmsnorm_quant",
    "rope",
    "shared_prefix_attention",
    "vtrace",
    "weight_from_bitsandbytes",
]
