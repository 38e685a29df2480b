"""Advantages: our kernels against the loops that PPO trainers run.

Each token is 4 bytes of reward and of value read, of advantage and of return written.
"""

from functools import partial

import torch

from fastrl.bench.race import FORWARD, Race, Variant, Work, within
from fastrl.kernels import gae, native

GAMMA, LAM = 1.0, 0.95
BYTES_PER_TOKEN = 16


def inline_loop(rewards, values):
    """The loop that TRL's PPO trainer ran until 1.12, which verl and others still run."""
    following, reversed_advantages = 0.0, []
    length = rewards.shape[1]
    for t in reversed(range(length)):
        next_values = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        following = delta + GAMMA * LAM * following
        reversed_advantages.append(following)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def ours(impl, rewards, values):
    return gae(rewards, values, gamma=GAMMA, lam=LAM, impl=impl)


class Scan(Race):
    op = "scan"
    about = "gae on [B, T] float32"
    modes = (FORWARD,)
    defaults = {"B": 64, "T": 1024}
    grids = {
        "quick": [{"B": 64, "T": 1024}],
        "default": [{"B": 16, "T": 512}, {"B": 64, "T": 1024}, {"B": 512, "T": 2048}],
    }

    def variants(self, device):
        fast = [i for i in ("cpu", "cuda", "triton") if native.unavailable(i, device) is None]
        named = {"fastrl" if i == fast[0] else f"fastrl {i}": i for i in fast}
        return {
            **{name: Variant(partial(ours, impl)) for name, impl in named.items()},
            "inline loop": Variant(inline_loop, "eager"),
            "reference": Variant(partial(ours, "reference"), "eager"),
        }

    def draw(self, shape, device):
        g = torch.Generator().manual_seed(0)
        return torch.randn(2, shape["B"], shape["T"], generator=g).to(device).unbind()

    def call(self, variant, inputs, mode):
        return partial(variant.function, *inputs)

    def gate(self, variant, inputs, shape):
        rewards, values = (x.double() for x in inputs)
        truth = gae(rewards, values, gamma=GAMMA, lam=LAM, impl="reference")
        pairs = zip(("advantages", "returns"), variant.function(*inputs), truth, strict=True)
        return within({name: (x - y).abs().max().item() for name, x, y in pairs}, 1e-4)

    def work(self, shape, mode):
        tokens = shape["B"] * shape["T"]
        return Work(4.0 * tokens, float(BYTES_PER_TOKEN * tokens))


RACE = Scan()
