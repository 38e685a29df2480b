"""The plain PyTorch truth for log-probabilities and sampling."""

from typing import NamedTuple

import torch
from torch import Tensor


class LogProbs(NamedTuple):
    """Per-token statistics of a softmax over the vocabulary, in nats.

    `entropy` is None unless asked for.
    """

    logprob: Tensor
    lse: Tensor
    entropy: Tensor | None


class Samples(NamedTuple):
    """Sampled tokens with their log-prob, under the distribution sampled from and untruncated."""

    token: Tensor
    logprob: Tensor
    untruncated_logprob: Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def project(hidden, weight, bias=None, softcap=None, logit_scale=1.0) -> Tensor:
    """`softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`, unrounded."""
    logits = _wide(hidden) @ _wide(weight).to(_wide(hidden).dtype).T
    if bias is not None:
        logits = logits + _wide(bias)
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _per_row(value, like: Tensor) -> Tensor | float:
    return (
        _wide(value).unsqueeze(-1)
        if isinstance(value, Tensor) and value.dim() == like.dim() - 1
        else value
    )


def logprob_from_logits(logits, target, *, temperature=1.0, entropy=False) -> LogProbs:
    logits = _wide(logits) / _per_row(temperature, logits)
    lse = torch.logsumexp(logits, dim=-1)
    single = target.dim() == logits.dim() - 1
    index = target.unsqueeze(-1) if single else target
    logprob = logits.gather(-1, index) - lse.unsqueeze(-1)
    spread = None
    if entropy:
        p = torch.exp(logits - lse.unsqueeze(-1))
        # A logit of -inf has p = 0; it must not reach the product, nor the product's gradient.
        spread = lse - (p * logits.masked_fill(p == 0, 0.0)).sum(-1)
    return LogProbs(logprob.squeeze(-1) if single else logprob, lse, spread)


def linear_logprob(
    hidden,
    weight,
    target,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    ignore_index=-100,
    entropy=False,
) -> LogProbs:
    keep = target != ignore_index
    # Zeroed before the product, so that a NaN in an ignored row reaches neither the output nor a
    # gradient.
    hidden = torch.where(keep.unsqueeze(-1), hidden, torch.zeros_like(hidden))
    logits = project(hidden, weight, bias, softcap, logit_scale)
    if isinstance(temperature, Tensor):
        temperature = torch.where(keep, temperature, torch.ones_like(temperature))
    out = logprob_from_logits(
        logits, target.where(keep, 0), temperature=temperature, entropy=entropy
    )
    return LogProbs(*(None if x is None else torch.where(keep, x, 0.0) for x in out))


GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def splitmix64(x: Tensor) -> Tensor:
    """The SplitMix64 finaliser on int64 (wrapping), the random function behind every sample."""

    def shift(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (x ^ shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shift(x, 31)


def gumbel(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Gumbel noise `[M, V]` float32, a pure function of (seed, position, vocabulary entry)."""
    stream = splitmix64(seeds + (positions + 1) * GOLDEN)
    entry = torch.arange(1, vocab + 1, device=seeds.device)
    bits = (splitmix64(stream.unsqueeze(-1) + entry * GOLDEN) >> 32) & 0xFFFFFFFF
    # Small uniforms become the large Gumbels that win an argmax: keep float32's resolution near
    # zero.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Logits with all but the kept tokens at -inf: top-k, then top-p of the rest, then min-p."""
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p
        drop[..., 0] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
    if min_p > 0.0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), float("-inf"))
    return logits


def linear_sample(
    hidden,
    weight,
    *,
    seeds,
    positions,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    bias=None,
    softcap=None,
    logit_scale=1.0,
) -> Samples:
    logits = project(hidden, weight, bias, softcap, logit_scale)
    if temperature == 0:
        token = logits.argmax(-1)
        full = logprob_from_logits(logits, token).logprob
        return Samples(token, torch.zeros_like(full), full)
    logits = logits / temperature
    kept = truncate(logits, top_k, top_p, min_p)
    token = (kept + gumbel(seeds, positions, logits.shape[-1])).argmax(-1)
    full = logprob_from_logits(logits, token).logprob
    drawn = full if kept is logits else logprob_from_logits(kept, token).logprob
    return Samples(token, drawn, full)
