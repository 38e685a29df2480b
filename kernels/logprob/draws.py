"""torch.ops.fastrl.linear_sample: schema, fake, and the call of an implementation.

An implementation is a module named in `library.MODULES` with `sample(draws) -> (token, logprob,
untruncated_logprob)`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.logprob.library import implementation
from fastrl.kernels.operators import define


class Draws(NamedTuple):
    """The op's inputs, in its schema's order."""

    hidden: Tensor  # [M, H]
    weight: Tensor  # [V, H]
    seeds: Tensor  # [M] int64
    positions: Tensor  # [M] int64
    bias: Tensor | None  # [V]
    temperature: float  # 0 is greedy
    top_k: int  # 0 for all
    top_p: float
    min_p: float
    softcap: float  # 0 for none
    logit_scale: float
    impl: str


def _run(*arguments):
    d = Draws(*arguments)
    return implementation(d.impl).sample(d)


def _fake(*arguments):
    d = Draws(*arguments)
    statistics = (d.seeds.new_empty(d.seeds.shape, dtype=torch.float32) for _ in range(2))
    return d.seeds.new_empty(d.seeds.shape), *statistics


define(
    "linear_sample",
    "(Tensor hidden, Tensor weight, Tensor seeds, Tensor positions, Tensor? bias, "
    "float temperature, int top_k, float top_p, float min_p, float softcap, float logit_scale, "
    "str impl) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
