"""Reward models from what bitsandbytes saved."""

import json

import pytest
import torch
from reward_models import pairs, tiny
from safetensors.torch import save_file

from fastrl.kernels import quantize
from fastrl.reward import Checkpoint, QuantizedRewardModel, RewardModelError

PROMPTS, COMPLETIONS = pairs()
UP = "model.layers.1.mlp.up_proj.weight"


def blobs(scheme, nested=False):
    """The state dict that bitsandbytes would save of `tiny`, and its config."""
    model, out = tiny(), {}
    linears = QuantizedRewardModel.from_pretrained(Checkpoint.of(model), "float32").layers
    quantized = {f"layers.{y.index}.{n}" for y in linears for n in y.linears}
    for name, tensor in model.state_dict().items():
        if name.removeprefix("model.").removesuffix(".weight") not in quantized:
            out[name] = tensor
            continue
        w = quantize(tensor, scheme, **({"nested": nested} if scheme == "nf4" else {}))
        if scheme == "int8":
            out[name] = w.data[:, : tensor.shape[1]].clone()
            out[name.replace("weight", "SCB")] = w.scale * 127
            continue
        out |= {name: w.data.view(-1, 1), f"{name}.absmax": w.absmax, f"{name}.quant_map": w.code}
        state = {"quant_type": "nf4", "blocksize": w.block, "shape": list(tensor.shape)}
        if nested:
            out[f"{name}.nested_absmax"] = w.nested_absmax
            out[f"{name}.nested_quant_map"] = w.nested_code
            state |= {"nested_offset": w.nested_offset.item(), "nested_blocksize": 256}
        text = json.dumps(state).encode()
        out[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return out, model.config


@pytest.mark.parametrize(
    ("scheme", "options"), [("int8", {}), ("nf4", {}), ("nf4", {"nested": True})]
)
def test_from_bitsandbytes(tmp_path, scheme, options):
    tensors, config = blobs(scheme, **options)
    got = QuantizedRewardModel.from_bitsandbytes(tensors, config=config)
    assert got.scheme == scheme
    want = QuantizedRewardModel.from_pretrained(Checkpoint.of(tiny()), scheme, **options)
    found, exact = (m.score(PROMPTS, COMPLETIONS) for m in (got, want))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    config.save_pretrained(tmp_path)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    again = QuantizedRewardModel.from_bitsandbytes(tmp_path)
    assert torch.equal(again.score(PROMPTS, COMPLETIONS), found)
    with pytest.raises(RewardModelError, match=r"use QuantizedRewardModel\.from_bitsandbytes"):
        QuantizedRewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({UP: torch.zeros(7, 1, dtype=torch.uint8)}, f"{UP}: data must be torch.uint8"),
        ({f"{UP}.quant_map": torch.linspace(-1, 1, 16)}, "quant_map must be the 16 values of NF4"),
        ({f"{UP}.absmax": torch.ones(3)}, f"{UP}: absmax must be"),
        ({"score.weight": torch.zeros(24, 1, dtype=torch.uint8)}, "its score head left out"),
        ({"score.weight": torch.zeros(1, 48, dtype=torch.uint8)}, "'score.weight' is torch.uint8"),
    ],
)
def test_bad_blobs_are_named(change, message):
    tensors, config = blobs("nf4")
    with pytest.raises(RewardModelError, match=message):
        QuantizedRewardModel.from_bitsandbytes(tensors | change, config=config)


def test_bitsandbytes_needs_what_it_needs():
    tensors, config = blobs("nf4")
    with pytest.raises(ValueError, match="a state dict, which needs the model's config"):
        QuantizedRewardModel.from_bitsandbytes(tensors)
    config.intermediate_size = 102
    with pytest.raises(RewardModelError, match=r"stands for \(100, 48\), the config asks for"):
        QuantizedRewardModel.from_bitsandbytes(tensors, config=config)
    with pytest.raises(RewardModelError, match="bitsandbytes quantized none of its layers"):
        QuantizedRewardModel.from_bitsandbytes(dict(tiny().state_dict()), config=tiny().config)
