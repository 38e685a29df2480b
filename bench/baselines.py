"""The ways to get log-probabilities from an lm-head that bench_logprob.py compares.

Each is `f(hidden [N, H], weight [V, H], target [N], entropy) -> {"logprob": [N], ...}` in nats, 0
where the target is -100, with "entropy" where it is asked for and on offer. The chunked
`F.linear_cross_entropy` returns their sum: only then does it compute its gradients once.
"""

import importlib.metadata
import importlib.util
from functools import cache

import torch
import torch.nn.functional as F

IGNORE = -100
TRL_CHUNK = 32768  # what TRL's trainers pass


def ours(hidden, weight, target, entropy, **options):
    from fastrl.kernels import linear_logprob

    out = linear_logprob(hidden, weight, target, entropy=entropy, impl="cpu", **options)
    return {name: value for name, value in out._asdict().items() if value is not None}


def eager(hidden, weight, target, entropy):
    """All rows go through the head, as in a trainer that masks afterwards."""
    logprobs = F.linear(hidden, weight).float().log_softmax(-1)
    ignored = target == IGNORE
    chosen = logprobs.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    out = {"logprob": chosen.masked_fill(ignored, 0.0)}
    if entropy:
        spread = -(logprobs.exp() * logprobs).sum(-1)
        out["entropy"] = spread.masked_fill(ignored, 0.0)
    return out


@cache
def _compiled_eager():
    return torch.compile(eager)


def compiled(hidden, weight, target, entropy):
    return _compiled_eager()(hidden, weight, target, entropy)


def torch_lce(hidden, weight, target, entropy):
    return {"logprob": -F.linear_cross_entropy(hidden, weight, target, reduction="none")}


def torch_lce_chunked(hidden, weight, target, entropy):
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options)
    return {"logprob": -loss}


def cce(hidden, weight, target, entropy):
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(hidden, weight, target, reduction="none", impl="torch_compile")
    return {"logprob": -losses}


def trl_chunked(hidden, weight, target, entropy):
    """As TRL's trainers call it on a CPU, where it scores ignored rows too."""
    try:
        from trl.kernels import ChunkedLogProbFunction as Chunked
    except ImportError:
        from trl.trainer.utils import _ChunkedLogProbFunction as Chunked
    names = ("entropy",) if entropy else ()
    logprob, spread, *_ = Chunked.apply(
        hidden, weight, None, target.clamp(min=0), 1.0, TRL_CHUNK, None, 1.0, names
    )
    out = {"logprob": logprob, "entropy": spread}
    return {k: x.masked_fill(target == IGNORE, 0.0) for k, x in out.items() if x is not None}


OURS = "fastrl"
VARIANTS = {
    OURS: ours,
    "eager": eager,
    "torch.compile": compiled,
    "F.linear_cross_entropy": torch_lce,
    "F.linear_cross_entropy chunked": torch_lce_chunked,
    "cut-cross-entropy": cce,
    "TRL chunked": trl_chunked,
}
NO_ENTROPY = ("F.linear_cross_entropy", "F.linear_cross_entropy chunked", "cut-cross-entropy")
COMPILED = ("torch.compile", "cut-cross-entropy")

# Bytes beyond inputs and gradients for each of the N V logits, at most: forward, with the backward,
# and both with entropy. Only to skip what would not fit; the benchmark measures what is true.
_BYTES_PER_LOGIT = {
    "eager": (10, 14, 18, 30),
    "torch.compile": (8, 10, 10, 14),
    "F.linear_cross_entropy": (8, 12, 8, 12),
    "cut-cross-entropy": (8, 10, 8, 10),
}


def counted(tokens: int, ignored: float) -> int:
    """How many of the tokens are not ignored, at least one."""
    return tokens - min(round(tokens * ignored), tokens - 1)


def missing(name: str) -> str | None:
    """Why a variant cannot run here, or None."""
    if name == OURS:
        from fastrl.kernels import native

        return native.unavailable("cpu", torch.device("cpu"))
    if name.startswith("F.linear_cross_entropy") and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)"
    if name == "F.linear_cross_entropy chunked" and not hasattr(
        torch.nn, "LinearCrossEntropyOptions"
    ):
        return f"torch {torch.__version__} has no LinearCrossEntropyOptions"
    package = {"cut-cross-entropy": "cut_cross_entropy", "TRL chunked": "trl"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        return f"not installed: pip install {package.replace('_', '-')}"
    return None


def versions() -> dict[str, str | None]:
    def of(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {p: of(p) for p in ("fastrl", "torch", "cut-cross-entropy", "trl", "triton")}


def bytes_needed(name, tokens, width, vocab, itemsize, backward, entropy) -> int:
    """An upper bound of the memory for inputs, gradients and everything else of a call."""
    tensors = (tokens + vocab) * width * itemsize * (2 if backward else 1)
    # The chunked ones keep tiles of logits and gradients in float.
    chunked = 4 * (tokens + vocab) * width * backward + 24 * min(tokens, 4096) * TRL_CHUNK
    logits = _BYTES_PER_LOGIT.get(name)
    if logits is None:
        return tensors + (chunked if name != OURS else 2**28)
    return tensors + logits[2 * entropy + backward] * tokens * vocab
