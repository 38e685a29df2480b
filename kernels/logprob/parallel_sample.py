"""linear_sample on several processes that hold a slice of the vocabulary each.

The noise of an entry is a function of the entry in the whole vocabulary, so the best perturbed
logit of all slices is that of one process. Each rank draws on its own, and all gather the winners
with their slices' logsumexps. Truncation is by a lowest logit kept, the same on all ranks: of
top-k from every rank's k highest, of top-p from a bisection over the sums that all hold, of min-p
from the highest logit. All sums are in float64 and the order of the ranks, so all hold the same.
"""

import struct
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from fastrl.kernels.logprob.parallel import alike, check_group, gather, is_dtensor
from fastrl.kernels.logprob.reference import GOLDEN, Samples, gumbel, project, splitmix64

HELD_BYTES = 128 * 2**20  # of a slice's logits, where truncation needs them
_LOWEST = float("-inf")


def _signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def _unsplitmix64(x: Tensor) -> Tensor:
    """The inverse of splitmix64."""

    def unshift(x: Tensor, bits: int) -> Tensor:
        for _ in range(2):  # each time `bits` more of the high ones are right
            x = y ^ ((x >> bits) & ((1 << (64 - bits)) - 1))
        return x

    for bits, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, None)):
        y = x
        x = unshift(x, bits)
        if factor is not None:
            x = x * _signed(pow(factor, -1, 2**64))
    return x


def from_entry(seeds: Tensor, positions: Tensor, first: Tensor) -> Tensor:
    """Seeds of which entry v has the noise that entry `first + v` has of `seeds`."""
    place = (positions + 1) * GOLDEN
    return _unsplitmix64(splitmix64(seeds + place) + first * GOLDEN) - place


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def over_vocabulary(
    local: Callable[..., Samples],
    group: "dist.ProcessGroup",
    hidden: Tensor,
    weight: Tensor,
    *,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    impl: str,
    **head: Any,
) -> Samples:
    """`local`, which is linear_sample, with a slice of `weight` on each rank of `group`."""
    check_group(group)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", head["bias"])):
        if is_dtensor(x):
            raise ValueError(f"{name} is a DTensor; with tp_group pass {name}.to_local()")
    said = {
        "the rows of hidden": len(hidden),
        "hidden's H": hidden.shape[1],
        "the bytes of hidden's dtype": hidden.element_size(),
        "the sum of seeds": int(seeds.sum()),
        "the sum of positions": int(positions.sum()),
        "top_k": top_k,
        "temperature (its bits)": _bits(float(temperature)),
        "top_p (its bits)": _bits(float(top_p)),
        "min_p (its bits)": _bits(float(min_p)),
    }
    values = torch.tensor([*said.values(), weight.shape[0]], device=hidden.device)
    sizes = alike(tuple(said), values, group)[:, -1]
    rank = dist.get_rank(group)
    first = sizes[:rank].sum()
    mine = from_entry(seeds, positions, first)
    if temperature == 0 or (top_k == 0 and top_p == 1.0 and min_p == 0.0):
        noise = {"seeds": mine, "positions": positions, "temperature": temperature}
        drawn = local(hidden, weight, impl=impl, **noise, **head)
        z = _logit(hidden, weight, drawn.token, **head) / (temperature or 1.0)
        score = z
        if temperature:
            score = z + gumbel(from_entry(mine, positions, drawn.token), positions, 1)[:, 0]
        # Nothing of a slice whose best logit is -inf has a share in the whole.
        lse = torch.where(z == _LOWEST, z, z - drawn.untruncated_logprob)
        token, full = _winner(score, first + drawn.token, (z, lse), group)
        full = full.to(drawn.logprob.dtype)
        return Samples(token, full if temperature else torch.zeros_like(full), full)
    rows = max(1, HELD_BYTES // (4 * int(sizes.max())))
    weight = weight if weight.dtype == torch.float64 else weight.float()
    parts = []
    for some, noise, at in zip(*(x.split(rows) for x in (hidden, mine, positions)), strict=True):
        logits = project(some, weight, **head) / temperature
        kept = _truncate(logits, top_k, top_p, min_p, group)
        perturbed = kept + gumbel(noise, at, logits.shape[1])
        token = perturbed.argmax(-1, keepdim=True)
        score, z = (x.gather(1, token)[:, 0].double() for x in (perturbed, logits))
        sums = (x.double().logsumexp(-1) for x in (kept, logits))
        parts.append(_winner(score, first + token[:, 0], (z, *sums), group))
    token, drawn_from, full = (torch.cat(x) for x in zip(*parts, strict=True))
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return Samples(token, drawn_from.to(dtype), full.to(dtype))


def _logit(hidden, weight, token, *, bias, softcap, logit_scale) -> Tensor:
    """Each row's logit of one entry, in float64."""
    z = (hidden.double() * weight[token].double()).sum(-1)
    z = (z if bias is None else z + bias[token].double()) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _winner(score: Tensor, token: Tensor, statistics: tuple[Tensor, ...], group):
    """The token of the best score, the first one's if equal, and its log-probs.

    statistics are the logit at the rank's own token and a logsumexp for each log-prob, float64.
    """
    found = torch.stack([score, *statistics])
    scores, logits, *sums = torch.stack(gather(found, group)).transpose(0, 1)
    best = scores.argmax(0, keepdim=True)
    tokens = torch.stack(gather(token, group))
    logprobs = (logits.gather(0, best)[0] - x.logsumexp(0) for x in sums)
    return tokens.gather(0, best)[0], *logprobs


# ---- truncation: logits [M, V_r] of the slices ---------------------------------------------------


def _truncate(logits: Tensor, top_k: int, top_p: float, min_p: float, group) -> Tensor:
    """As reference.truncate of the whole vocabulary, this rank's slice of it."""
    if top_k:
        mine = logits.topk(min(top_k, logits.shape[1])).values
        mine = pad(mine, (0, top_k - mine.shape[1]), value=_LOWEST)
        lowest = torch.cat(gather(mine, group), 1).topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, _LOWEST)
    if top_p < 1.0:
        logits = _nucleus(logits, top_p, group)
    if min_p > 0.0:
        p = torch.exp(logits - _highest(logits, group))
        logits = logits.masked_fill(p < min_p, _LOWEST)
    return logits


def _highest(logits: Tensor, group) -> Tensor:
    return torch.stack(gather(logits.amax(1, keepdim=True), group)).amax(0)


def _sum(x: Tensor, group) -> Tensor:
    return torch.stack(gather(x, group)).sum(0)


def _nucleus(logits: Tensor, top_p: float, group) -> Tensor:
    """Entry v is kept where those before it, higher ones and equal ones of a lower index, have
    less than top_p of the probability."""
    highest = _highest(logits, group)
    ordered = logits.sort(descending=True).values
    before = pad(torch.exp((ordered - highest).double()).cumsum(1), (1, 0))
    limit = top_p * _sum(before[:, -1:], group)
    falling = -ordered

    def above(x: Tensor) -> Tensor:
        """What all entries of logits above x sum up to."""
        return _sum(before.gather(1, torch.searchsorted(falling, -x)), group)

    # Floats in their order are these integers; `below` has top_p or more above it, `cut` less.
    below, cut = _key(torch.full_like(highest, _LOWEST)), _key(highest)
    for _ in range(64 if logits.dtype == torch.float64 else 32):
        middle = (below & cut) + ((below ^ cut) >> 1)  # their mean, and no overflow
        fits = above(_from_key(middle, logits.dtype)) < limit
        below, cut = torch.where(fits, below, middle), torch.where(fits, middle, cut)
    lowest = _from_key(cut, logits.dtype)
    equal = logits == lowest
    counts = gather(equal.sum(1, keepdim=True), group)
    earlier = sum(counts[: dist.get_rank(group)], torch.zeros_like(counts[0]))
    place = earlier + equal.cumsum(1) - 1
    room = above(lowest) + place * torch.exp((lowest - highest).double()) < limit
    return logits.masked_fill((logits < lowest) | (equal & ~room), _LOWEST)


_WORDS = {torch.float32: (torch.int32, 2**31), torch.float64: (torch.int64, 2**63)}


def _key(x: Tensor) -> Tensor:
    word, sign = _WORDS[x.dtype]
    bits = x.view(word).long()
    return torch.where(bits >= 0, bits, -(bits & (sign - 1)))


def _from_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    word, sign = _WORDS[dtype]
    return torch.where(key >= 0, key, -key | -sign).to(word).view(dtype)
