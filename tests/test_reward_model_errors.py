"""What QuantizedRewardModel refuses, by name: tensors, arguments, pairs, models."""

import copy
import json

import pytest
import torch
from reward_models import tiny
from test_reward_model import load
from transformers import AutoModelForCausalLM

from fastrl.reward import Checkpoint, QuantizedRewardModel, RewardModelError


def changed(**tensors):
    """A checkpoint of `tiny` with some tensors replaced, or left out (None)."""
    model = tiny()
    state = {n: t.clone() for n, t in model.state_dict().items()} | tensors
    return Checkpoint(model.config, {n: t for n, t in state.items() if t is not None}, "here")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"score.weight": None}, "here is a reward model without its score head.*'score.weight'"),
        ({"score.weight": torch.ones(2, 48)}, r"'score.weight' has shape \(2, 48\).*\(1, 48\)"),
        ({"score.weight": torch.ones(1, 48).to(torch.uint8)}, "'score.weight' is torch.uint8"),
        ({UP: None}, f"tensor '{UP}' is missing"),
        ({UP: torch.ones(3, 48)}, rf"'{UP}' has shape \(3, 48\), the config asks for \(100, 48\)"),
        ({UP: torch.full((100, 48), torch.nan)}, f"'{UP}' holds 4800 values that are NaN"),
        ({"model.norm.weight": torch.full((48,), torch.inf)}, "'model.norm.weight' holds 48"),
        ({"score.bias": torch.ones(1)}, "'score.bias' has no place in a qwen3 reward model"),
        ({UP.replace("weight", "lora_A"): torch.ones(1)}, "has no place in a qwen3"),
    ],
)
def test_bad_tensors_are_named(tensors, message):
    with pytest.raises(RewardModelError, match=message):
        QuantizedRewardModel.from_pretrained(changed(**tensors), "int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int3"}, "scheme='int3' is unknown; use one of int8, nf4, int4, fp8"),
        ({"keep_bf16": ("down",)}, "keep_bf16: 'down' matches no linear layer"),
        ({"keep_bf16": ("mlp.down_prj",)}, r"did you mean 'mlp.down_proj'"),
        ({"skip": ()}, "skip must contain 'score'"),
        ({"scheme": "bf16", "group": 64}, "'bf16' quantizes nothing and takes no group"),
        ({"scheme": "bf16", "keep_bf16": ("mlp",)}, "keep_bf16 has no use with scheme='bf16'"),
        ({"scheme": "float32", "smooth": ["1"]}, "smooth has no use with scheme='float32'"),
        ({"smooth": []}, "smooth must be a sequence of at least one"),
        ({"smooth": ["1"]}, r"smooth\[0\]: it is text, but the reward model has no tokenizer"),
        ({"batch_tokens": 0}, "batch_tokens=0 must be at least 1"),
        ({"activations": "fp16"}, "activations='fp16' is unknown; use one of bf16, float32"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(tiny(), **({"scheme": "int8"} | arguments))


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ("1", ["1"], "must be lists"),
        ([[3]], [], "must be of one length, got 1 and 0"),
        ([[3]], ["1"], "pair 0: prompt and completion must both be texts"),
        (["1"], ["1"], "pair 0: it is text, but the reward model has no tokenizer"),
        ([[3], []], [[3], []], "pair 1: it has no token at all"),
        ([[151]], [[3]], r"pair 0: it holds token 151; the model's vocabulary is \[0, 151\)"),
        ([[3]], [[-1]], "pair 0: it holds token -1"),
        ([[3] * 1024], [[3]], "pair 0: it has 1025 tokens, more than the model's context of 1024"),
    ],
)
def test_bad_pairs_are_named(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        load(tiny()).score(prompts, completions)


def test_activations_that_overflow_are_an_error():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e25)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e25)
    for scheme in ("float32", "int8"):
        with pytest.raises(
            RewardModelError, match="pair 0 is not finite; activations overflow in layer 1"
        ):
            load(model, scheme).score([[5, 6]], [[7]])


def test_other_models_are_refused(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny().config)
    model.save_pretrained(tmp_path / "lm")
    with pytest.raises(RewardModelError, match=r"is a language model.*not a reward model"):
        QuantizedRewardModel.from_pretrained(tmp_path / "lm")
    config = copy.deepcopy(tiny().config)
    config.model_type = "bloom"
    with pytest.raises(RewardModelError, match="backbone 'bloom' is not known; use one of gemma2"):
        Checkpoint(config, {"score.weight": torch.ones(1, 48)}, "here")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "empty", "holds no config.json"),
        (tmp_path / "nowhere", "is not a directory"),
    ):
        with pytest.raises(RewardModelError, match=message):
            QuantizedRewardModel.from_pretrained(path)
    (tmp_path / "empty" / "config.json").write_text(json.dumps(tiny().config.to_dict()))
    with pytest.raises(RewardModelError, match=r"holds no \*.safetensors"):
        QuantizedRewardModel.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RewardModelError, match="does not open"):
        QuantizedRewardModel.from_pretrained(tmp_path / "empty")
