"""Whole scoring of groups of completions, part by part, against Hugging Face on the same texts.

A sequence classifier of Qwen2.5-0.5B's shape with random weights scores G completions of about C
tokens behind each of some prompts of P. Hugging Face runs them right-padded in one batch, in bf16
and in float32. Ours adds one part at a time: unpadded (prompts repeated, all tokens in the last
layer), shared prompt, last layer (the pooled tokens alone), int8, and bf16 between its layers. The
floor counts the products of the tokens that are left, with the prompt once.
"""

from functools import partial

import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from fastrl.bench.race import FORWARD, Race, Variant, Work, within
from fastrl.reward import Checkpoint, QuantizedRewardModel
from fastrl.reward.pairs import Pair, pack

ALL = 1 << 30  # tokens: one batch


def build(layers, vocabulary=4096):
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        num_labels=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2ForSequenceClassification(config).eval()


def draw(prompt, completion, group, spread):
    """Pairs of one group; lengths of completions differ by up to `spread` either way."""
    g = torch.Generator().manual_seed(0)

    def ids(n):
        return tuple(torch.randint(1, 4096, (n,), generator=g).tolist())

    shared = ids(prompt)
    factors = torch.rand(group, generator=g).mul(2).sub(1).mul(spread).add(1).tolist()
    return [Pair(shared, ids(max(1, round(completion * f)))) for f in factors]


@torch.inference_mode()
def hugging_face(model, pairs):
    rows = [torch.tensor(p.prompt + p.completion) for p in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return model(ids, attention_mask=ids != 0).logits[:, 0].float()


@torch.no_grad()
def ours(model, pairs, *, share_prompts=True, last_layer="pooled"):
    out = torch.empty(len(pairs))
    for rows, batch in pack(pairs, ALL, share_prompts=share_prompts):
        out[rows] = model.run(batch, last_layer=last_layer)[:, 0]
    return out


class Models:
    """The same weights in each form, made when it is wanted."""

    def __init__(self, layers):
        self.float32 = build(layers)
        self.made = {}

    def get(self, scheme):
        if scheme not in self.made:
            if scheme == "half":
                half = Qwen2ForSequenceClassification(self.float32.config).eval()
                half.load_state_dict(self.float32.state_dict())
                self.made[scheme] = half.to(torch.bfloat16)
            else:
                weights, *wide = scheme.split(", ")
                source = self.float32 if weights == "float32" else self.get("half")
                self.made[scheme] = QuantizedRewardModel.from_pretrained(
                    Checkpoint.of(source), weights, activations="float32" if wide else None
                )
        return self.made[scheme]


def replicated(models, pairs):
    return hugging_face(models.float32, pairs)


def halved(models, pairs):
    return hugging_face(models.get("half"), pairs)


def part(models, pairs, scheme="float32", **options):
    return ours(models.get(scheme), pairs, **options)


class Score(Race):
    op = "score"
    about = "G completions of about C tokens behind a prompt of P, scored by a reward model"
    modes = (FORWARD,)
    defaults = {"layers": 4, "P": 512, "C": 256, "G": 8, "spread": 0.0}
    grids = {
        "quick": [{"layers": 1, "P": 128, "C": 64, "G": 4}],
        "default": [{"layers": 2, "P": 256, "C": 128}],
        # --against hf: with it come the parts one at a time, and how their factors multiply up.
        "ablation": [{"layers": 24, "spread": 0.5}],
        # --no-memory; a quarter of an hour on two quiet cores.
        "issue": [
            {"layers": 24, "P": p, "C": c, "G": g, "spread": spread}
            for p, c in ((128, 128), (512, 256))
            for g in (1, 4, 8, 16)
            for spread in (0.0, 0.5)
        ],
    }

    ladder = {
        "HF float32": "HF float32",
        "unpadded": "fastrl, prompts apart",
        "shared prompt": "fastrl, all of the last layer",
        "last layer": "fastrl float32",
        "int8": "fastrl int8, float32 between",
        "bf16 between": "fastrl int8",
    }

    def variants(self, device):
        if device.type != "cpu":
            raise ValueError("score races on a CPU")
        return {
            "fastrl int8": Variant(partial(part, scheme="int8")),
            "fastrl int8, float32 between": Variant(partial(part, scheme="int8, float32 between")),
            "fastrl float32": Variant(part),
            "fastrl, all of the last layer": Variant(partial(part, last_layer="all"), slow=True),
            "fastrl, prompts apart": Variant(
                partial(part, last_layer="all", share_prompts=False), slow=True
            ),
            "HF float32": Variant(replicated, "hf"),
            "HF bf16": Variant(halved, "hf", slow=True),
        }

    def draw(self, shape, device):
        pairs = draw(shape["P"], shape["C"], shape["G"], shape["spread"])
        return Models(shape["layers"]), pairs

    def call(self, variant, inputs, mode):
        return partial(variant.function, *inputs)

    def gate(self, variant, inputs, shape):
        """All score alike, to what their dtypes round; on shorter texts."""
        models, pairs = inputs[0], draw(64, 32, 4, 0.5)
        want = replicated(models, pairs)
        gap = (variant.function(models, pairs) - want).square().mean().sqrt() / want.abs().max()
        return within({"scores": gap.item()}, 0.1)

    def small(self, shape):
        return shape | {"layers": 1, "P": 16, "C": 8, "G": 2}

    def bytes_needed(self, name, shape):
        return 4.0 * 3 * shape["layers"] * 15e6

    def work(self, shape, mode):
        pairs = draw(shape["P"], shape["C"], shape["G"], shape["spread"])
        tokens = shape["P"] + sum(len(p.completion) for p in pairs)
        each = 896 * (2 * 896 + 2 * 128) + 3 * 896 * 4864
        return Work(2.0 * tokens * each * shape["layers"], each * shape["layers"], "int8")


RACE = Score()
