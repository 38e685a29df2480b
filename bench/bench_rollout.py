"""Rollouts: the native decoder against Hugging Face generate, replicated and with one prefill.

tiny: Qwen3 of 0.8M parameters, float32, as in bench_trainer.py. 0.5b: the shape of Qwen2.5-0.5B
with random bf16 weights. The floor of a call is its products, and the weights read once a step.
"""

from functools import cache, partial

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fastrl.bench.race import Race, Variant, Verdict, Work, within
from fastrl.models import backbone, lm_head
from fastrl.rollout import RolloutEngine, SamplingParams, generation
from fastrl.rollout.huggingface import HuggingFaceRows
from fastrl.rollout.request import Request

COMMON = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "tie_word_embeddings": True}
TINY = {
    "vocab_size": 17,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "max_position_embeddings": 128,
}
HALF_B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def build(name, layers):
    """A model of a name in shapes, with random weights."""
    torch.manual_seed(0)
    depth = {"num_hidden_layers": layers, **COMMON}
    if name == "tiny":
        return Qwen3ForCausalLM(Qwen3Config(**TINY | depth)).eval()
    if name == "0.5b":
        return Qwen2ForCausalLM(Qwen2Config(**HALF_B | depth)).bfloat16().eval()
    raise ValueError(f"model={name!r} is not one of tiny, 0.5b")


def weights(name, layers):
    """Parameters of the layers and of the lm-head, their bytes each, their dtype."""
    model = TINY if name == "tiny" else HALF_B
    width, heads = model["hidden_size"], model["num_attention_heads"]
    head = model.get("head_dim", width // heads)
    attention = width * head * 2 * (heads + model["num_key_value_heads"])
    each = attention + 3 * width * model["intermediate_size"]
    itemsize, dtype = (4, "float32") if name == "tiny" else (2, "bfloat16")
    return layers * each, width * model["vocab_size"], itemsize, dtype


class Case:
    """A model, prompts of equal length, and the variants of `tokens` new tokens for each row."""

    def __init__(self, model, prompts, group, tokens):
        self.model, self.prompts, self.group, self.tokens = model, prompts, group, tokens
        self.engine = RolloutEngine(model, max_rows=len(prompts) * group)
        self.ids = torch.tensor([p for p in prompts for _ in range(group)], device=model.device)

    def fastrl(self, temperature=1.0):
        sampling = SamplingParams(temperature, max_new_tokens=self.tokens, ignore_eos=True)
        return self.engine.generate(self.prompts, self.group, sampling).completion_ids

    @torch.no_grad()
    def prefill_once(self, temperature=1.0):
        rows = HuggingFaceRows(backbone(self.model), self.ids.device)
        sampling = SamplingParams(temperature, max_new_tokens=self.tokens)
        limits = [self.tokens] * len(self.prompts)
        request = Request(self.prompts, limits, self.group, sampling, [])
        ending = generation.Ending([], None, self.group, None)
        return generation.generate(
            rows, lm_head(self.model), request, ending, len(self.ids), 0, lambda *_: None
        ).tokens

    def generate(self, temperature=1.0):
        out = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            do_sample=temperature > 0,
            min_new_tokens=self.tokens,
            max_new_tokens=self.tokens,
            top_k=0,
        )
        return out[:, self.ids.shape[1] :]

    @cache  # noqa: B019  a case lives as long as its process
    def greedy(self):
        return self.generate(temperature=0)


class Rollout(Race):
    op = "rollout"
    about = "new tokens of G completions for each of a few prompts of P tokens"
    modes = ("generate",)
    defaults = {
        "model": "tiny",
        "layers": 4,
        "prompts": 16,
        "P": 9,
        "G": 8,
        "tokens": 32,
    }
    grids = {
        "quick": [{}],
        "default": [
            {},
            {"model": "0.5b", "layers": 4, "prompts": 1, "P": 256, "G": 16, "tokens": 16},
        ],
        "issue": [{"model": "0.5b", "layers": 24, "prompts": 1, "P": 512, "G": 16, "tokens": 64}],
    }

    def variants(self, device):
        return {
            "fastrl": Variant(Case.fastrl),
            "HF, one prefill": Variant(Case.prefill_once, "hf"),
            "HF generate": Variant(Case.generate, "hf"),
        }

    def draw(self, shape, device):
        model = build(shape["model"], shape["layers"]).to(device)
        g = torch.Generator().manual_seed(0)
        top = min(1000, model.config.vocab_size)
        prompts = torch.randint(3, top, (shape["prompts"], shape["P"]), generator=g).tolist()
        return Case(model, prompts, shape["G"], shape["tokens"])

    def call(self, variant, inputs, mode):
        return partial(variant.function, inputs)

    def gate(self, variant, inputs, shape):
        """Greedy tokens are those of generate (float32), or the hidden states agree (bf16)."""
        if inputs.model.dtype == torch.float32:
            other = variant.function(inputs, temperature=0).to(inputs.ids.device)
            return within({"tokens unlike generate's": (other != inputs.greedy()).sum().item()}, 0)
        if not variant.ours:
            return Verdict()  # Hugging Face's own forward is what ours is held to
        got = inputs.engine.prefill(inputs.prompts[0]).hidden.float()
        with torch.no_grad():
            want = backbone(inputs.model)(inputs.ids[:1], use_cache=False).last_hidden_state[0, -1]
        gap = (got - want.float()).abs().max() / want.float().abs().max()
        return within({"hidden": gap.item()}, 5e-2)

    def small(self, shape):
        return shape | {"prompts": 1, "P": 4, "G": 2, "tokens": 2, "layers": 1}

    def work(self, shape, mode):
        layers, head, itemsize, dtype = weights(shape["model"], shape["layers"])
        rows, steps = shape["prompts"] * shape["G"], shape["tokens"]
        products = shape["prompts"] * shape["P"] * layers + steps * rows * (layers + head)
        return Work(2.0 * products, float(steps * (layers + head) * itemsize), dtype)


RACE = Rollout()
