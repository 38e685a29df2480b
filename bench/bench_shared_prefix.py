"""Training on a group with its prompt computed once, against the batch that repeats it.

Log-probs of G completions of C tokens behind a prompt of P, forward and backward, through a model
of Qwen2.5-0.5B's shape with random weights: `group_logprobs` against `completion_logprobs` with the
model's own sdpa attention. The vocabulary shrinks with the layers, so that the lm-head, which costs
both the same, keeps the share it has in the whole model. The bar is the ratio of tokens that go
through the layers, G(P + C) / (P + GC).
"""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fastrl.bench.race import BOTH, Race, Variant, Work, within
from fastrl.models import completion_logprobs, group_logprobs

LAYERS, VOCABULARY = 24, 151936
WIDTH, INNER, HEADS, KV_HEADS = 896, 4864, 14, 2


def shared(model, batch):
    return group_logprobs(model, batch, inplace_backward=True).logprob


def replicated(model, batch):
    return completion_logprobs(model, *batch, inplace_backward=True).logprob


class SharedPrefix(Race):
    op = "shared_prefix"
    about = "log-probs of a group through a model's layers, forward and backward"
    modes = (BOTH,)
    defaults = {"layers": 2, "P": 256, "C": 64, "G": 8, "dtype": "bfloat16"}
    grids = {
        "quick": [{"layers": 1, "P": 64, "C": 32}],
        "default": [{}],
        "issue": [
            {"layers": 4, "P": 512, "C": 128, "G": 8},
            {"layers": 4, "P": 64, "C": 32, "G": 8},
            {"layers": 4, "P": 1024, "C": 256, "G": 4},
        ],
    }

    def variants(self, device):
        return {"fastrl": Variant(shared), "replicated prompt": Variant(replicated, "hf")}

    def draw(self, shape, device):
        config = Qwen2Config(
            vocab_size=_vocabulary(shape),
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=shape["layers"],
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(device, getattr(torch, shape["dtype"])).train()
        g = torch.Generator().manual_seed(0)
        prompt = torch.randint(config.vocab_size, (shape["P"],), generator=g).tolist()
        ids = torch.randint(config.vocab_size, (shape["G"], shape["C"]), generator=g).to(device)
        return model, ([prompt] * shape["G"], ids, torch.ones_like(ids, dtype=torch.bool))

    def before(self, variant, inputs, mode):
        """Gradients are there, as in a trainer after its first step, and zero."""
        model, batch = inputs
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        return model, batch

    def call(self, variant, inputs, mode):
        return lambda: variant.function(*inputs).sum().backward()

    @torch.no_grad()
    def gate(self, variant, inputs, shape):
        """The log-probs of the batch that repeats its prompt, in float32, to what dtypes round."""
        model, batch = inputs
        got = variant.function(model, batch)
        dtype = model.dtype
        want = replicated(model.float(), batch)
        model.to(dtype)  # the parameters were of this dtype, so nothing is lost
        limit = 1e-3 if dtype == torch.float32 else 0.1
        return within({"logprobs": (got - want).abs().max().item()}, limit)

    def small(self, shape):
        return shape | {"layers": 1, "P": 4, "C": 4, "G": 2}

    def work(self, shape, mode):
        """Products of the layers over P + GC tokens and of the lm-head over GC, three times."""
        p, c, g, layers = (shape[k] for k in ("P", "C", "G", "layers"))
        head = WIDTH // HEADS
        each = WIDTH * head * 2 * (HEADS + KV_HEADS) + 3 * WIDTH * INNER
        lm = WIDTH * _vocabulary(shape)
        products = (p + g * c) * layers * each + g * c * lm
        itemsize = 4 if shape["dtype"] == "float32" else 2
        return Work(6.0 * products, 3.0 * itemsize * (layers * each + lm), shape["dtype"])


def _vocabulary(shape) -> int:
    return max(64, VOCABULARY * shape["layers"] // LAYERS)


RACE = SharedPrefix()
