"""The public functions of all ops."""

from fastrl.kernels.attention.layout import GroupLayout
from fastrl.kernels.attention.op import HAS as _ATTENTION
from fastrl.kernels.attention.op import shared_prefix_attention
from fastrl.kernels.logprob.op import HAS as _LOGPROB
from fastrl.kernels.logprob.op import linear_logprob, linear_sample, logprob_from_logits
from fastrl.kernels.logprob.reference import LogProbs, Samples
from fastrl.kernels.scan.op import HAS as _SCAN
from fastrl.kernels.scan.op import discounted_returns, gae, vtrace

# The implementations that each op has besides the reference.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("discounted_returns", "gae", "vtrace"), _SCAN),
    **_LOGPROB,
    "shared_prefix_attention": _ATTENTION,
}

__all__ = [
    "IMPLEMENTATIONS",
    "GroupLayout",
    "LogProbs",
    "Samples",
    "discounted_returns",
    "gae",
    "linear_logprob",
    "linear_sample",
    "logprob_from_logits",
    "shared_prefix_attention",
    "vtrace",
]
