"""The public functions of all ops."""

from fastrl.kernels.logprob.op import linear_logprob, linear_sample, logprob_from_logits
from fastrl.kernels.logprob.reference import LogProbs, Samples
from fastrl.kernels.scan.op import discounted_returns, gae, vtrace

__all__ = [
    "LogProbs",
    "Samples",
    "discounted_returns",
    "gae",
    "linear_logprob",
    "linear_sample",
    "logprob_from_logits",
    "vtrace",
]
