"""linear_logprob against eager PyTorch, torch.compile and the fused losses of others.

Each variant is `f(hidden [N, H], weight [V, H], target [N], entropy) -> {"logprob": [N], ...}` in
nats, 0 where the target is -100, with "entropy" where it is asked for and on offer. The gradient is
that of the sum of the log-probs, and entropies: of hidden and weight, or, where the weight is
frozen as under LoRA, of hidden alone. The gate is accuracy.py.
"""

import itertools
from functools import cache, partial

import torch
import torch.nn.functional as F

from fastrl.bench import accuracy
from fastrl.bench.accuracy import IGNORE
from fastrl.bench.race import BOTH, FORWARD, Race, Variant, Work
from fastrl.kernels import linear_logprob, native

TRL_CHUNK = 32768  # what TRL's trainers pass
EVERYTHING_MB = 2.0**20


def ours(hidden, weight, target, entropy, workspace_mb=None, **options):
    if workspace_mb is not None:
        options["workspace_mb"] = workspace_mb
    out = linear_logprob(hidden, weight, target, entropy=entropy, **options)
    return {name: value for name, value in out._asdict().items() if value is not None}


inplace = partial(ours, inplace_backward=True)  # as our trainer calls it


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
    """Their sum: only then does it compute its gradients once."""
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options)
    return {"logprob": -loss}


def cce(hidden, weight, target, entropy):
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden.is_cuda else "torch_compile"
    return {"logprob": -linear_cross_entropy(hidden, weight, target, reduction="none", impl=impl)}


def liger(hidden, weight, target, entropy):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, spread = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, target, temperature=1.0, ignore_index=IGNORE, return_entropy=True
    )
    return {"logprob": -nll} | ({"entropy": spread} if entropy else {})


def trl_chunked(hidden, weight, target, entropy):
    """As TRL's trainers call it where it scores ignored rows too."""
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


# Bytes beyond inputs and gradients for each of the N V logits, at most: forward and backward,
# without and with entropy. Only to skip what would not fit; the benchmark measures what is true.
BYTES_PER_LOGIT = {
    "eager": (14, 30),
    "torch.compile": (10, 14),
    "F.linear_cross_entropy": (12, 12),
    "cut-cross-entropy": (10, 10),
}


def point(n, h, v, dtype="bfloat16", ignored=0.0, entropy=False):
    return {"N": n, "H": h, "V": v, "dtype": dtype, "ignored": ignored, "entropy": entropy}


TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 16384)
WIDTHS, VOCABS = (896, 2048, 4096), (32000, 128256, 151936, 256000)
DTYPES = ("bfloat16", "float32")
PEERS = [(252, 128, 507), (1530, 2048, 32256), (2169, 896, 151936), (1937, 3584, 152064)]


class Logprob(Race):
    op = "logprob"
    about = "log-probs [N] from hidden [N, H] and lm-head [V, H]"
    defaults = {**point(2048, 896, 151936), "workspace_mb": None, "frozen": False}
    grids = {
        "quick": [point(128, 896, 32000)],
        "default": [
            point(16, 896, 151936),
            point(128, 896, 151936),
            point(512, 896, 32000, "float32"),
            point(512, 896, 32000, ignored=0.5, entropy=True),
        ],
        "small": [
            point(n, 896, 32000, d, i, e)
            for n, d, e, i in itertools.product((1, 16, 256), DTYPES, (False, True), (0.0, 0.5))
        ],
        "issue": [
            point(n, 896, 151936, d, i) for n in (16, 2048) for d in DTYPES for i in (0.0, 0.5)
        ],
        "frozen": [
            point(n, 896, 151936, d) | {"frozen": True} for n in (16, 256, 2048) for d in DTYPES
        ],
        "full": [
            point(n, h, v, d, i, e)
            for n, h, v, d, e, i in itertools.product(
                TOKENS, WIDTHS, VOCABS, DTYPES, (False, True), (0.0, 0.5, 0.9)
            )
        ],
        "peers": [point(*shape, d) for shape in PEERS for d in DTYPES],
    }
    cuda = [
        point(8192, 4096, 131072, entropy=True),
        point(8192, 4096, 131072, ignored=0.5, entropy=True),
        point(8192, 4096, 131072, ignored=0.9, entropy=True),
        point(2048, 896, 151936, entropy=True),
        point(16384, 2048, 128256, entropy=True),
        point(16, 4096, 151936, entropy=True),
        point(4096, 2048, 32000, "float16", entropy=True),
        point(2048, 896, 32000, "float32", entropy=True),
    ]

    def variants(self, device):
        found = {}
        if native.unavailable("cpu", device) is None:
            found["fastrl"] = Variant(ours)
            found["fastrl, in place"] = Variant(inplace, without=(FORWARD,))
        for impl in ("triton", "cuda") if device.type == "cuda" else ():
            if native.unavailable(impl, device) is None:
                found[f"fastrl {impl}"] = Variant(partial(ours, impl=impl, workspace_mb=0.0))
                kept = partial(ours, impl=impl, workspace_mb=EVERYTHING_MB)
                found[f"fastrl {impl}, workspace"] = Variant(kept)
        found["eager"] = Variant(eager, "eager")
        found["torch.compile"] = Variant(compiled, "compile", compiled=True)
        if hasattr(F, "linear_cross_entropy"):  # torch 2.13
            found["F.linear_cross_entropy"] = Variant(torch_lce, "torch")
            found["F.linear_cross_entropy chunked"] = Variant(torch_lce_chunked, "torch", slow=True)
        found["cut-cross-entropy"] = Variant(cce, "cce", compiled=True)
        found["TRL chunked"] = Variant(trl_chunked, "trl")
        if device.type == "cuda":
            found["Liger"] = Variant(liger, "liger")
        return found

    def draw(self, shape, device):
        """hidden, weight, target, entropy and workspace; logits have a deviation of 2."""
        g = torch.Generator().manual_seed(0)
        n, h, v, dtype = shape["N"], shape["H"], shape["V"], getattr(torch, shape["dtype"])
        hidden = torch.empty(n, h, dtype=dtype).normal_(generator=g).to(device)
        weight = torch.empty(v, h, dtype=dtype).normal_(std=2 / h**0.5, generator=g).to(device)
        target = torch.randint(v, (n,), generator=g)
        target[torch.randperm(n, generator=g)[: n - _counted(shape)]] = IGNORE
        inputs = (
            hidden.requires_grad_(),
            weight.requires_grad_(not shape["frozen"]),
            target.to(device),
        )
        return *inputs, shape["entropy"], shape["workspace_mb"]

    def call(self, variant, inputs, mode):
        *arguments, workspace_mb = inputs
        function = variant.function
        if function in (ours, inplace) and workspace_mb is not None:
            function = partial(function, workspace_mb=workspace_mb)

        def both():
            out = function(*arguments)
            loss = sum(out[name].sum() for name in ("logprob", "entropy") if name in out)
            wanted = [x for x in arguments[:2] if x.requires_grad]
            return out, *torch.autograd.grad(loss, wanted)

        return both if mode == BOTH else torch.no_grad()(partial(function, *arguments))

    def gate(self, variant, inputs, shape):
        hidden, weight, target, entropy, _ = inputs
        results = self.call(variant, inputs, BOTH)()
        # Some have no entropy; their gradients are of the log-probs alone.
        truth = _truth(hidden, weight, target, entropy and "entropy" in results[0])
        return truth.verdict(variant.ours, truth.errors(*results))

    def small(self, shape):
        return shape | {"N": min(shape["N"], 64), "V": min(shape["V"], 1024)}

    def bytes_needed(self, name, shape):
        n, h, v = shape["N"], shape["H"], shape["V"]
        tensors = 2 * (n + v) * h * (4 if shape["dtype"] == "float32" else 2)
        if name in BYTES_PER_LOGIT:
            return tensors + BYTES_PER_LOGIT[name][shape["entropy"]] * n * v
        # The chunked ones keep tiles of logits and gradients in float.
        chunked = 4 * (n + v) * h + 24 * min(n, 4096) * TRL_CHUNK
        return tensors + (2**28 if name.startswith("fastrl") else chunked)

    def work(self, shape, mode):
        """2NHV operations forward; the backward has two products of its own and computes the

        logits again, except for the share of them that the workspace keeps. Forward W and hidden
        are read once; with the backward twice, and each of their gradients is written once. With W
        frozen there is a product for the logits and one for hidden's gradient, and W is read once.
        """
        n, h, v = _counted(shape), shape["H"], shape["V"]
        room = 60.0 if shape["workspace_mb"] is None else shape["workspace_mb"]
        kept = min(1.0, room * 2**20 / (2.25 * n * v))
        both = mode == BOTH
        itemsize = 4 if shape["dtype"] == "float32" else 2
        if shape["frozen"]:
            products, numbers = (2, v + 2 * n) if both else (1, v + n)
        else:
            products, numbers = (4 - kept, 3 * (v + n)) if both else (1, v + n)
        return Work(2.0 * n * h * v * products, float(numbers * h * itemsize), shape["dtype"])


def _counted(shape) -> int:
    """How many of the tokens are not ignored, at least one."""
    return shape["N"] - min(round(shape["N"] * shape["ignored"]), shape["N"] - 1)


@cache
def _truth(hidden, weight, target, entropy):
    """Computed once for all variants of a shape."""
    return accuracy.truth(hidden, weight, target, entropy)


RACE = Logprob()
