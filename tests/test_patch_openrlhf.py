"""`fastrl.patch("openrlhf")` on OpenRLHF's own modules; it is no part of the dev install.

They import flash-attn and vLLM, which need a GPU: where these are missing, empty ones stand in
while OpenRLHF is imported, and it takes its own path without them.
"""

import importlib.util
import math
import sys
import types
import warnings

import pytest
import torch

import fastrl
from fastrl.integrations import PatchError
from fastrl.kernels import native

HAS_KERNELS = native.unavailable("cpu", torch.device("cpu")) is None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="without kernels OpenRLHF keeps its own")


STAND_INS = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
    "vllm": ("SamplingParams",),
    "vllm.inputs": ("TokensPrompt",),
    "vllm.utils": ("random_uuid",),
}


@pytest.fixture(scope="module")
def rlhf():
    for package in ("openrlhf", "deepspeed", "ray", "aiohttp", "pylatexenc"):
        pytest.importorskip(package)
    absent = [n for n in STAND_INS if importlib.util.find_spec(n.split(".")[0]) is None]
    for name in absent:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.util.spec_from_loader(name, None)
        vars(sys.modules[name]).update(dict.fromkeys(STAND_INS[name]))
    try:
        from openrlhf.models import actor, utils
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
    finally:
        for name in absent:
            del sys.modules[name]
    return types.SimpleNamespace(actor=actor, utils=utils, maker=RemoteExperienceMaker)


@pytest.fixture
def patched(rlhf):
    with fastrl.patch("openrlhf") as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs as without fastrl")
        yield patch


def test_what_is_replaced(rlhf, patched):
    assert rlhf.actor.log_probs_from_logits is rlhf.utils.log_probs_from_logits
    assert rlhf.actor.compute_entropy is rlhf.utils.compute_entropy
    before = patched.replaced["openrlhf.models.actor.compute_entropy"].original
    patched.undo()
    assert rlhf.actor.compute_entropy is rlhf.utils.compute_entropy is before


def test_a_renamed_function_raises(rlhf, monkeypatch):
    monkeypatch.delattr(rlhf.maker, "get_advantages_and_returns")
    with pytest.raises(PatchError, match="get_advantages_and_returns is not in openrlhf"):
        fastrl.patch("openrlhf")


@needs_kernels
def test_logits_by_hand(rlhf, patched):
    logits = torch.tensor([[[1.0, 2.0, 1.0], [5.0, 5.0, 5.0]]]).log().requires_grad_()
    held = logits * 1.0
    got = rlhf.utils.log_probs_from_logits(held, torch.tensor([[1, 2]]))
    assert got[0].tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 3)], abs=1e-6)
    got[0, 0].backward()
    assert logits.grad[0, 0].tolist() == pytest.approx([-0.25, 0.5, -0.25], abs=1e-6)
    assert torch.equal(held, logits)
    hot = rlhf.utils.log_probs_from_logits(held, torch.tensor([[1, 2]]), temperature=0.5)  # 1, 4, 1
    assert hot[0].tolist() == pytest.approx([math.log(4 / 6), math.log(1 / 3)], abs=1e-6)
    entropy = rlhf.utils.compute_entropy(logits)[0]
    assert entropy.tolist() == pytest.approx([1.5 * math.log(2), math.log(3)], abs=1e-6)


@needs_kernels
def test_advantages_and_returns(rlhf, patched):
    g = torch.Generator().manual_seed(0)
    values, rewards = torch.randn(2, 5, 13, generator=g)
    mask = torch.rand(5, 13, generator=g) > 0.3
    maker = "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker"
    for name, arguments in (
        ("get_advantages_and_returns", (values, rewards, mask, 0.99, 0.9)),
        ("get_advantages_and_returns", (values, rewards, None, 1.0, 0.95)),
        ("get_cumulative_returns", (rewards, mask, 0.9)),
    ):
        want = patched.replaced[f"{maker}.{name}"].original(None, *arguments)
        got = getattr(rlhf.maker, name)(None, *arguments)
        for a, b in zip(
            want if isinstance(want, tuple) else (want,),
            got if isinstance(got, tuple) else (got,),
            strict=True,
        ):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5)
