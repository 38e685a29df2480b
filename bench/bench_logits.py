"""logprob_from_logits against eager PyTorch, torch.compile and TRL's selective_log_softmax.

The floor is memory: the logits read once forward; read and a gradient written once backward.
"""

from functools import cache, partial

import torch

from fastrl.bench.race import BOTH, Race, Variant, Work, relative, within
from fastrl.kernels import logprob_from_logits, native


def ours(logits, target):
    return logprob_from_logits(logits, target).logprob


def inplace(logits, target):
    return logprob_from_logits(logits, target, inplace_backward=True).logprob


def eager(logits, target):
    return logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


@cache
def _compiled():
    return torch.compile(eager)


def compiled(logits, target):
    return _compiled()(logits, target)


def trl(logits, target):
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, target)


class Logits(Race):
    op = "logits"
    about = "log-probs [N] of targets from logits [N, V]"
    defaults = {"N": 512, "V": 32000, "dtype": "float32"}
    grids = {
        "quick": [{"N": 512, "V": 32000, "dtype": "bfloat16"}],
        "default": [
            {"N": 512, "V": 32000, "dtype": "float32"},
            {"N": 512, "V": 32000, "dtype": "bfloat16"},
            {"N": 512, "V": 151936, "dtype": "bfloat16"},
        ],
        "full": [
            {"N": n, "V": v, "dtype": dtype}
            for n, v in ((512, 32000), (1024, 151936), (2048, 151936))
            for dtype in ("float32", "bfloat16")
        ],
    }

    def variants(self, device):
        kernel = native.unavailable("cpu", device) is None
        mine = {"fastrl": Variant(ours), "fastrl, in place": Variant(inplace)} if kernel else {}
        return {
            **mine,
            "eager": Variant(eager, "eager"),
            "torch.compile": Variant(compiled, "compile", compiled=True),
            "TRL": Variant(trl, "trl"),
        }

    def draw(self, shape, device):
        g = torch.Generator().manual_seed(0)
        dtype = getattr(torch, shape["dtype"])
        logits = torch.randn(shape["N"], shape["V"], generator=g, dtype=dtype).to(device)
        return logits, torch.randint(shape["V"], (shape["N"],), generator=g).to(device)

    def before(self, variant, inputs, mode):
        logits, target = inputs
        spoilt = variant.function is inplace and mode == BOTH
        return logits.clone() if spoilt else logits, target

    def call(self, variant, inputs, mode):
        logits, target = inputs
        if mode == BOTH:
            leaf = logits.detach().requires_grad_()
            return lambda: torch.autograd.grad(variant.function(leaf, target).sum(), leaf)
        return torch.no_grad()(partial(variant.function, logits, target))

    def gate(self, variant, inputs, shape):
        logits, target = inputs[0][:3], inputs[1][:3]
        exact = logits.double().requires_grad_()
        want = eager(exact, target)
        wanted = torch.autograd.grad(want.sum(), exact)[0]
        leaf = logits.clone().requires_grad_()
        got = variant.function(leaf, target)
        errors = {"logprob": (got.double() - want).abs().max().item()}
        errors["grad"] = relative(torch.autograd.grad(got.sum(), leaf)[0], wanted)
        rounds = 1e-4 if variant.ours or shape["dtype"] == "float32" else 0.1
        rounding = 1e-5 if shape["dtype"] == "float32" else 0.01
        return within(errors, {"logprob": rounds, "grad": rounding})

    def small(self, shape):
        return shape | {"N": 4, "V": min(shape["V"], 1024)}

    def bytes_needed(self, name, shape):
        return 14.0 * shape["N"] * shape["V"]

    def work(self, shape, mode):
        itemsize = 4 if shape["dtype"] == "float32" else 2
        passes = 3 if mode == BOTH else 1
        logits = float(shape["N"] * shape["V"])
        return Work(4.0 * passes * logits, passes * itemsize * logits)


RACE = Logits()
