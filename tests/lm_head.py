"""What the tests of the lm-head's ops share."""

import pytest
import torch

from fastrl.kernels import native

IMPLS = [i for i in ("reference", "cpu") if native.unavailable(i, torch.device("cpu")) is None]
every_impl = pytest.mark.parametrize("impl", IMPLS)
needs_cpu = pytest.mark.skipif("cpu" not in IMPLS, reason=f"no cpu kernels: {native.why_missing}")


def problem(n=17, h=32, v=151, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64)
    weight = torch.randn(v, h, generator=g, dtype=torch.float64)
    target = torch.randint(v, (n,), generator=g)
    return hidden.to(dtype), weight.to(dtype), target
