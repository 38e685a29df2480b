"""The gate before any timing of linear_logprob: errors against float64, on a sample.

Everything is a relative error in the 2-norm. Log-probs, logsumexps, entropies and rows of
grad_hidden are compared for 32 tokens, for which all V logits are computed in float64. Rows of
grad_weight are compared for 32 vocabulary entries, half of them targets, and depend on all tokens:
there the logits of these entries are float64, and the logsumexp and entropy of all tokens come from
float32 logits that are summed in float64, whose independent errors average out over V. `own` is how
far these are from the float64 ones where both are known.
"""

from dataclasses import dataclass

import torch

from fastrl.bench.race import Verdict

IGNORE = -100
SAMPLE = 32
BLOCK = 2048  # vocabulary entries at a time
PEERS_LIMIT = 0.1  # a variant that is further off than any rounding is wrong


@dataclass
class Truth:
    """float64 results of a sample, and the errors of the same arithmetic in the inputs' dtype.

    The reference computes in float32 and rounds gradients to the inputs' dtype, as
    `impl="reference"` does.
    """

    rows: torch.Tensor
    words: torch.Tensor
    ignored: torch.Tensor
    values: dict[str, torch.Tensor]
    reference: dict[str, float]
    own: float

    def errors(self, out: dict, grad_hidden, grad_weight=None) -> dict[str, float]:
        """Of each result, and of `ignored` rows, whose results and gradients have to be 0."""
        got = {"grad_hidden": grad_hidden[self.rows]}
        if grad_weight is not None:
            got["grad_weight"] = grad_weight[self.words]
        for name, value in out.items():
            if value.dim():
                got[name] = value.detach()[self.rows]
            else:
                got[f"sum of {name}"] = value.detach()
        errors = {name: _error(value, self.values[name]) for name, value in got.items()}
        if len(self.ignored):
            per_token = [v.detach() for v in (*out.values(), grad_hidden) if v.dim()]
            errors["ignored"] = max(v[self.ignored].abs().max().item() for v in per_token)
        return errors

    def verdict(self, ours: bool, errors: dict[str, float]) -> Verdict:
        """Ours may have twice the error of the reference, others what no rounding explains."""
        for name, error in errors.items():
            limit = PEERS_LIMIT
            if ours:
                limit = 0.0 if name == "ignored" else 2 * self.reference[name] + 2e-7
            if not error <= limit:
                return Verdict(errors, f"{name} is off by {error:.2g}, more than {limit:.2g}")
        return Verdict(errors)


def _error(got, want) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def _blocks(weight):
    return [slice(v, v + BLOCK) for v in range(0, len(weight), BLOCK)]


def _of_rows(hidden, weight, target, entropy, dtype):
    """Everything that depends on single tokens, computed in ``dtype``."""
    h = hidden.to(dtype)
    z = torch.cat([h @ weight[b].to(dtype).T for b in _blocks(weight)], dim=1)
    lse = torch.logsumexp(z, -1)
    p = torch.exp(z - lse.unsqueeze(-1))
    spread = lse - (p * z).sum(-1)
    logprob = z.gather(-1, target.unsqueeze(-1)).squeeze(-1) - lse
    grad = _grad_logits(z, lse, spread, entropy)
    grad.scatter_add_(1, target.unsqueeze(-1), torch.ones_like(lse).unsqueeze(-1))
    grad_hidden = sum(grad[:, b] @ weight[b].to(dtype) for b in _blocks(weight))
    return {"logprob": logprob, "lse": lse, "entropy": spread, "grad_hidden": grad_hidden}


def _grad_logits(z, lse, spread, entropy):
    """Of sum(logprob), and sum(entropy) if asked for, without the target's 1."""
    log_p = z - lse.unsqueeze(-1)
    return -log_p.exp() * (1 + (log_p + spread.unsqueeze(-1) if entropy else 0))


def _of_words(hidden, weight, target, words, lse, spread, entropy, dtype):
    """Rows ``words`` of grad_weight, computed in ``dtype`` from known lse and entropy."""
    h = hidden.to(dtype)
    grad = _grad_logits(h @ weight[words].to(dtype).T, lse.to(dtype), spread.to(dtype), entropy)
    grad += (target.unsqueeze(-1) == words).to(dtype)
    return grad.T @ h


@torch.no_grad()
def statistics(hidden, weight, target):
    """lse and entropy of all tokens that are not ignored: float32 logits, float64 sums."""
    hidden = hidden[target != IGNORE]
    h = hidden.float()
    top = h.new_full((len(hidden),), -torch.inf)
    total = torch.zeros_like(top, dtype=torch.float64)
    weighted = torch.zeros_like(total)
    for block in _blocks(weight):
        z = h @ weight[block].float().T
        above = torch.maximum(top, z.amax(-1))
        e = torch.exp(z - above.unsqueeze(-1))
        shrink = torch.exp((top - above).double())
        total = total * shrink + e.sum(-1, dtype=torch.float64)
        weighted = weighted * shrink + e.mul_(z).sum(-1, dtype=torch.float64)
        top = above
    lse = top.double() + total.log()
    return lse, lse - weighted / total


@torch.no_grad()
def truth(hidden, weight, target, entropy: bool, known=None) -> Truth:
    """Of `logprob.sum()`, plus `entropy.sum()` if asked for; ``known`` are the `statistics`."""
    g = torch.Generator().manual_seed(1)
    kept = torch.nonzero(target != IGNORE).squeeze(-1)
    at = torch.randperm(len(kept), generator=g)[:SAMPLE].to(kept.device)
    rows, h, t = kept[at], hidden[kept], target[kept]
    some = torch.randint(len(weight), (SAMPLE // 2,), generator=g).to(t.device)
    words = torch.cat([t[at[: SAMPLE // 2]], some]).unique()
    lse, spread = known or statistics(hidden, weight, target)
    results = []
    for dtype in (torch.float64, torch.float32):
        of = _of_rows(h[at], weight, t[at], entropy, dtype)
        of["grad_weight"] = _of_words(h, weight, t, words, lse, spread, entropy, dtype)
        results.append(of)
    exact, reference = results
    for name in ("grad_hidden", "grad_weight"):
        reference[name] = reference[name].to(hidden.dtype)
    errors = {name: _error(reference[name], value) for name, value in exact.items()}
    own = max(_error(lse[at], exact["lse"]), _error(spread[at], exact["entropy"]))
    target_logits = torch.cat(
        [
            (a.double() * weight[b].double()).sum(-1)
            for a, b in zip(h.split(BLOCK), t.split(BLOCK), strict=True)
        ]
    )
    exact["sum of logprob"] = (target_logits - lse).sum()
    ignored = torch.nonzero(target == IGNORE).squeeze(-1)
    return Truth(rows, words, ignored, exact, errors, own)
