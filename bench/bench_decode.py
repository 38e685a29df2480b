"""The decoder's prefill of a prompt and one step of a group behind it, against Hugging Face's.

Both without the lm-head, which bench_sample.py races. The floor of a step is reading the layers'
weights.
"""

from functools import partial

import torch

from fastrl.bench.bench_rollout import build, weights
from fastrl.bench.race import Race, Variant, Work, relative, within
from fastrl.kernels import native
from fastrl.models import backbone
from fastrl.rollout.decoder import Decoder
from fastrl.rollout.native import NativeRows

PREFILL, STEP = "prefill", "step"


class Native:
    """Our decoder: the prompt is there once for all rows."""

    def __init__(self, model, prompt, group):
        self.decoder, self.prompt = Decoder(model), prompt
        self.rows = NativeRows(self.decoder, 0)
        self.rows.add([prompt], [group])
        self.hidden = self.rows.hidden[0]

    def prefill(self):
        return self.decoder.prefill([self.prompt], 0)

    def step(self, tokens):
        self.rows.step(tokens)
        return self.rows.hidden


class HuggingFace:
    """Its cache has the prompt once for each row; the token of a step is taken back after it."""

    def __init__(self, model, prompt, group):
        self.model = backbone(model)
        self.ids = torch.tensor([prompt], device=model.device)
        out = self.model(self.ids, use_cache=True)
        self.hidden, self.cache = out.last_hidden_state[0, -1], out.past_key_values
        self.cache.batch_repeat_interleave(group)

    def prefill(self):
        return self.model(self.ids, use_cache=True)

    def step(self, tokens):
        out = self.model(tokens[:, None], past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)
        return out.last_hidden_state[:, -1]


class Case:
    """A model, a prompt, and each variant's state behind that prompt, made when it is wanted."""

    def __init__(self, model, prompt, group):
        self.model, self.prompt, self.group = model, prompt, group
        self.tokens = torch.full((group,), 3, device=model.device)
        self.states = {}

    def state(self, kind):
        if kind not in self.states:
            self.states[kind] = kind(self.model, self.prompt, self.group)
        return self.states[kind]


class Decode(Race):
    op = "decode"
    about = "prefill of P tokens; a step of G rows behind them, without the lm-head"
    modes = (PREFILL, STEP)
    defaults = {"model": "0.5b", "layers": 4, "P": 256, "G": 16, "dtype": "bfloat16"}
    grids = {
        "quick": [{"layers": 2, "P": 128, "G": 8}],
        "default": [{}, {"model": "tiny", "P": 9, "G": 128, "dtype": "float32"}],
        "issue": [{"layers": 24, "P": 512}],
    }

    def variants(self, device):
        kernel = native.unavailable("cpu", device) is None
        mine = {"fastrl": Variant(Native)} if kernel else {}
        return {**mine, "Hugging Face": Variant(HuggingFace, "hf")}

    @torch.no_grad()
    def draw(self, shape, device):
        model = build(shape).to(device)
        g = torch.Generator().manual_seed(0)
        top = min(1000, model.config.vocab_size)
        return Case(model, torch.randint(3, top, (shape["P"],), generator=g).tolist(), shape["G"])

    @torch.no_grad()
    def before(self, variant, inputs, mode):
        return inputs.state(variant.function), inputs.tokens

    def call(self, variant, inputs, mode):
        state, tokens = inputs
        run = state.prefill if mode == PREFILL else partial(state.step, tokens)
        return torch.no_grad()(run)

    @torch.no_grad()
    def gate(self, variant, inputs, shape):
        """Hidden states after the prompt and after a token more, against Hugging Face's."""
        model = backbone(inputs.model)
        ids = torch.tensor([[*inputs.prompt, 3]], device=inputs.model.device)
        want = model(ids, use_cache=False).last_hidden_state[0, -2:]
        state = variant.function(inputs.model, inputs.prompt, inputs.group)
        got = {PREFILL: state.hidden, STEP: state.step(inputs.tokens)[-1]}
        limit = 1e-5 if inputs.model.dtype == torch.float32 else 5e-2
        return within(
            {m: relative(x, w) for (m, x), w in zip(got.items(), want, strict=True)}, limit
        )

    def small(self, shape):
        return shape | {"layers": 1, "P": 4, "G": 2}

    def work(self, shape, mode):
        layers, _, size = weights(shape)
        tokens = shape["P"] if mode == PREFILL else shape["G"]
        return Work(2.0 * tokens * layers, float(layers * size), shape["dtype"])


RACE = Decode()
