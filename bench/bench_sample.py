"""linear_sample against linear_logprob's forward and eager PyTorch.

The floor is linear_logprob's forward of as many tokens: the same product, the same statistics.
"""

from functools import partial

import torch

from fastrl.bench.race import FORWARD, Race, Variant, Verdict, Work, within
from fastrl.kernels import linear_logprob, linear_sample, native

SETTINGS = {
    "fastrl": {},
    "fastrl greedy": {"temperature": 0.0},
    "fastrl top-k 50": {"top_k": 50},
    "fastrl top-p 0.9": {"top_p": 0.9},
    "fastrl top-k 100, top-p 0.9, min-p 0.05": {"top_k": 100, "top_p": 0.9, "min_p": 0.05},
}
DRAWS, WORDS = 4096, 64  # of the gate on what has random numbers of its own


def ours(settings, hidden, weight, impl="auto"):
    rows = torch.arange(len(hidden), device=hidden.device)
    options = {"seeds": rows, "positions": torch.zeros_like(rows), **settings}
    return linear_sample(hidden, weight, impl=impl, **options).token


def floor(hidden, weight):
    target = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return linear_logprob(hidden, weight, target).logprob


def eager(hidden, weight):
    p = torch.softmax((hidden @ weight.T).float(), -1)
    return torch.multinomial(p, 1).squeeze(-1)


def eager_top_k(hidden, weight):
    values, index = (hidden @ weight.T).float().topk(50)
    return index.gather(1, torch.multinomial(torch.softmax(values, -1), 1)).squeeze(-1)


def eager_top_p(hidden, weight):
    values, index = (hidden @ weight.T).float().sort(descending=True)
    p = values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= 0.9, 0.0)
    return index.gather(1, torch.multinomial(p, 1)).squeeze(-1)


# What truncation each peer's distribution has.
TRUNCATED = {eager: {}, eager_top_k: {"top_k": 50}, eager_top_p: {"top_p": 0.9}}


class Sample(Race):
    op = "sample"
    about = "a token per row from hidden [M, H] and lm-head [V, H]"
    modes = (FORWARD,)
    defaults = {"M": 16, "H": 896, "V": 151936, "dtype": "bfloat16"}
    grids = {
        "quick": [{"M": 16, "V": 32000}],
        "default": [{"M": 1}, {"M": 16}, {"M": 64}],
        "full": [{"M": m, "dtype": d} for m in (1, 16, 256) for d in ("bfloat16", "float32")],
    }

    def variants(self, device):
        kernel = native.unavailable("cpu", device) is None
        mine = {n: Variant(partial(ours, s)) for n, s in SETTINGS.items()} if kernel else {}
        return {
            **mine,
            "fastrl linear_logprob": Variant(floor),
            "eager": Variant(eager, "eager"),
            "eager top-k 50": Variant(eager_top_k, "eager"),
            "eager top-p 0.9": Variant(eager_top_p, "eager"),
        }

    def draw(self, shape, device):
        g = torch.Generator().manual_seed(0)
        m, h, v, dtype = (shape[k] for k in ("M", "H", "V", "dtype"))
        hidden = torch.randn(m, h, generator=g).to(device, getattr(torch, dtype))
        weight = (2 * torch.randn(v, h, generator=g) / h**0.5).to(device, hidden.dtype)
        return hidden, weight

    def call(self, variant, inputs, mode):
        return torch.no_grad()(partial(variant.function, *inputs))

    @torch.no_grad()
    def gate(self, variant, inputs, shape):
        hidden, weight = inputs[0][:4], inputs[1]
        if variant.function is floor:
            zeros = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
            want = linear_logprob(hidden.double(), weight.double(), zeros, impl="reference").logprob
            gap = (variant.function(hidden, weight).double() - want).abs().max().item()
            return within({"logprob": gap}, 1e-4)
        if variant.ours:
            other = variant.function(hidden, weight) != variant.function(
                hidden, weight, impl="reference"
            )
            return within({"tokens unlike the reference's": other.sum().item()}, 0)
        return self.frequencies(variant, hidden[:1], weight[:WORDS])

    def frequencies(self, variant, row, weight) -> Verdict:
        """Total variation between a row's softmax, truncated, and how often its tokens come."""
        torch.manual_seed(0)
        p = (row.double() @ weight.double().T).softmax(-1).squeeze(0)
        order = p.argsort(descending=True)
        sorted_p = p[order]
        options = TRUNCATED[variant.function]
        sorted_p[options.get("top_k", len(p)) :] = 0
        sorted_p[sorted_p.cumsum(0) - sorted_p >= options.get("top_p", 2.0)] = 0
        p = torch.zeros_like(p).index_copy_(0, order, sorted_p / sorted_p.sum())
        tokens = variant.function(row.expand(DRAWS, -1), weight)
        seen = torch.bincount(tokens, minlength=len(p)).double() / DRAWS
        return within({"total variation": 0.5 * (seen - p).abs().sum().item()}, 0.08)

    def small(self, shape):
        return shape | {"M": min(shape["M"], 4), "V": min(shape["V"], 1024)}

    def work(self, shape, mode):
        m, h, v, dtype = (shape[k] for k in ("M", "H", "V", "dtype"))
        itemsize = 4 if dtype == "float32" else 2
        return Work(2.0 * m * h * v, float(itemsize * (m + v) * h), dtype)


RACE = Sample()
