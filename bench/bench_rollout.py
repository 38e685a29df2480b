"""Rollouts against Hugging Face generate, replicated and with one prefill, OpenVINO and llama.cpp.

Three calls of each engine, and its head alone, tell what a step is made of: the prompt and a first
token; the whole; and a few tokens behind a prompt of one, where there is no prompt to attend to.

tiny: Qwen3 of 0.8M parameters, as in bench_trainer.py. 0.5b: the shape of Qwen2.5-0.5B, and 387m
the same with a vocabulary of 32000. All with random weights. The floor of a call is its products,
or the weights and what is cached, read once a step, in the model's dtype: what is in 8 bits may
pass it.
"""

import math
from functools import cache, partial

import torch

from fastrl.bench.llamacpp_peer import LlamaCpp
from fastrl.bench.openvino_peer import OpenVino
from fastrl.bench.race import Race, Variant, Verdict, Work, within
from fastrl.bench.rollout_models import MODELS, build, cached, weights
from fastrl.kernels import native
from fastrl.models import backbone, lm_head
from fastrl.rollout import RolloutEngine, SamplingParams, generation
from fastrl.rollout.cache import CHUNK
from fastrl.rollout.huggingface import HuggingFaceRows
from fastrl.rollout.request import Request

LARGE = {"model": "387m", "layers": 24, "prompts": 1}
FIRST, BARE, HEAD, WHOLE = "first token", "short prompt", "head", "generate"
GATE = {"layers": 2, "prompts": 2, "P": 40, "G": 3, "tokens": 8}
FEW = 16  # tokens behind the short prompt, and draws of the head
UNLIKE = "share of tokens unlike generate's"
# Engines that get the model in a format of their own: the peer, and the type of keys and values
# (OpenVINO) or of the weights (llama.cpp) where it is not the model's.
EXPORTED = {
    "OpenVINO": ("openvino", None),
    "OpenVINO, u8 cache": ("openvino", "u8"),
    "llama.cpp": ("llamacpp", None),
    "llama.cpp, Q8_0": ("llamacpp", "Q8_0"),
}


class Case:
    """A model, prompts of equal length, and how many tokens are sampled for each of their rows."""

    def __init__(self, model, prompts, group, tokens):
        self.model, self.prompts, self.group, self.tokens = model, prompts, group, tokens
        self.rows = len(prompts) * group
        self.engine = RolloutEngine(model, max_rows=self.rows)
        self.int8 = RolloutEngine(model, max_rows=self.rows, scheme="int8")

    @cache  # noqa: B019  a case lives as long as its process
    def exported(self, peer, kind):
        if peer == "llamacpp":
            sizes = len(self.prompts), self.group, len(self.prompts[0]), self.tokens
            return LlamaCpp(self.model, *sizes, kind)
        made = OpenVino(self.model, kind)
        made.generate([p[:1] for p in self.prompts], self.group, 2, 1.0)  # some is compiled by then
        return made


# A variant samples `tokens` for each row of some prompts; at a temperature of 0 the likeliest.
def fastrl(case, prompts, tokens, temperature=1.0):
    return sampled(case.engine, case, prompts, tokens, temperature)


def fastrl_int8(case, prompts, tokens, temperature=1.0):
    return sampled(case.int8, case, prompts, tokens, temperature)


def sampled(engine, case, prompts, tokens, temperature):
    sampling = SamplingParams(temperature, max_new_tokens=tokens, ignore_eos=True)
    return engine.generate(prompts, case.group, sampling).completion_ids


@torch.no_grad()
def prefill_once(case, prompts, tokens, temperature=1.0):
    rows = HuggingFaceRows(backbone(case.model), case.model.device)
    sampling = SamplingParams(temperature, max_new_tokens=tokens)
    request = Request(prompts, [tokens] * len(prompts), case.group, sampling, [])
    ending = generation.Ending([], None, case.group, None)
    head = lm_head(case.model)
    every = generation.generate(rows, head, request, ending, case.rows, 0, lambda *_: None)
    return every.tokens


def generate(case, prompts, tokens, temperature=1.0):
    ids = torch.tensor([p for p in prompts for _ in range(case.group)], device=case.model.device)
    out = case.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=temperature > 0,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        top_k=0,
    )
    return out[:, ids.shape[1] :]


def exported(case, prompts, tokens, temperature=1.0, **which):
    return case.exported(**which).generate(prompts, case.group, tokens, temperature)


def draws(case, engine):
    """A few draws from the head for each row."""
    width, rows = case.model.config.hidden_size, torch.arange(case.rows, device=case.model.device)
    hidden = torch.ones(case.rows, width, dtype=case.model.dtype, device=case.model.device)
    for _ in range(min(FEW, case.tokens)):
        engine.sample(hidden, SamplingParams(), seeds=rows, positions=rows)


class Rollout(Race):
    op = "rollout"
    about = "new tokens of G completions for each of a few prompts of P tokens"
    modes = (FIRST, BARE, HEAD, WHOLE)
    defaults = {
        "model": "tiny",
        "layers": 4,
        "prompts": 16,
        "P": 9,
        "G": 8,
        "tokens": 32,
        "dtype": "float32",
    }
    grids = {
        "quick": [{}],
        "default": [
            {},
            {"model": "387m", "layers": 4, "prompts": 1, "P": 256, "G": 16, "tokens": 16},
        ],
        "issue": [
            LARGE | {"P": 1024, "G": 16, "tokens": 64},
            LARGE | {"P": 4096, "G": 32, "tokens": 33},
            LARGE | {"model": "0.5b", "P": 512, "G": 16, "tokens": 64},
        ],
        "coarse": [LARGE | {"P": p, "G": g, "tokens": 32} for p in (64, 1024) for g in (1, 4, 32)],
        "full": [  # needs 32 GB and a day
            LARGE | {"P": p, "G": g, "tokens": n}
            for p in (64, 512, 1024, 4096)
            for g in (1, 4, 8, 16, 32)
            for n in (32, 128)
        ],
    }

    def variants(self, device):
        in_int8 = native.unavailable("cpu", device) is None
        found = {
            "fastrl": Variant(fastrl),
            **({"fastrl, int8": Variant(fastrl_int8)} if in_int8 else {}),
            "HF, one prefill": Variant(prefill_once, "hf"),
            "HF generate": Variant(generate, "hf", without=(BARE, HEAD)),
        }
        others = {
            name: Variant(partial(exported, peer=peer, kind=k), peer, slow=True, without=(HEAD,))
            for name, (peer, k) in EXPORTED.items()
        }
        return found | (others if device.type == "cpu" else {})

    def draw(self, shape, device):
        model = build(shape).to(device)
        g = torch.Generator().manual_seed(0)
        top = min(1000, model.config.vocab_size)
        prompts = torch.randint(3, top, (shape["prompts"], shape["P"]), generator=g).tolist()
        return Case(model, prompts, shape["G"], shape["tokens"])

    def call(self, variant, inputs, mode):
        if mode == HEAD:
            return partial(draws, inputs, self.engine(variant, inputs))
        prompts = [p[:1] for p in inputs.prompts] if mode == BARE else inputs.prompts
        return partial(variant.function, inputs, prompts, self.tokens(mode, inputs.tokens))

    def engine(self, variant, inputs):
        return inputs.int8 if variant.function is fastrl_int8 else inputs.engine

    def tokens(self, mode, whole):
        """How many tokens of each row a mode samples, where a rollout has `whole`."""
        return {FIRST: 1, WHOLE: whole}.get(mode, min(FEW, whole))

    def before(self, variant, inputs, mode):
        """What is done once is not timed: compared, quantized, written to a file, compiled."""
        if isinstance(variant.function, partial):  # of exported
            inputs.exported(**variant.function.keywords)
        elif variant.ours:
            self.engine(variant, inputs).prefill([0])
        return inputs

    def gate(self, variant, inputs, shape):
        """On a small case: greedy tokens are generate's (float32), or hidden states agree.

        Of llama.cpp logits do, where its weights are not the model's float32; int8 products count
        as another dtype. OpenVINO gives no logits: what it gets of a bf16 model, in float32, is
        compared as a float32 model is.
        """
        few = {"prompts": min(GATE["prompts"], shape["prompts"])}  # one is another path than many
        if variant.peer == "openvino":
            few["dtype"] = "float32"
        case = self.draw(shape | GATE | few, inputs.model.device)
        keywords = getattr(variant.function, "keywords", {})
        quantized = keywords.get("kind") == "Q8_0" or variant.function is fastrl_int8
        if case.model.dtype == torch.float32 and not quantized:
            want = generate(case, case.prompts, case.tokens, temperature=0)
            got = variant.function(case, case.prompts, case.tokens, temperature=0)
            return within({UNLIKE: (got.to(want.device) != want).float().mean().item()}, 0)
        ids = torch.tensor(case.prompts[:1], device=case.model.device)
        if variant.ours:
            what, got = "hidden", self.engine(variant, case).prefill(case.prompts[0]).hidden
            with torch.no_grad():
                want = backbone(case.model)(ids, use_cache=False).last_hidden_state[0, -1]
        elif variant.peer == "llamacpp":
            what = "logits"
            got = case.exported(**variant.function.keywords).logits(case.prompts[0])
            with torch.no_grad():
                want = case.model(ids).logits[0, -1]
        else:
            return Verdict()  # Hugging Face's own forward is what ours is held to
        off = (got.float() - want.float()).abs().max() / want.abs().max()
        return within({what: off.item()}, 1e-1 if variant.function is fastrl_int8 else 5e-2)

    def figures(self, variant, inputs, shape, seconds):
        """Milliseconds of the prompt and of a step, and what a step is made of; its bytes.

        attention is to the prompt: a step's time less that of one behind a prompt of one token.
        products is what remains without the head. GB/s counts what a step cannot do without, the
        weights, the prompt's keys and values once, and half of the completions'.
        """
        if FIRST not in seconds or WHOLE not in seconds:
            return {}
        tokens = shape["tokens"]
        step = (seconds[WHOLE] - seconds[FIRST]) / (tokens - 1)
        bare, head = (seconds.get(m, 0.0) / self.tokens(m, tokens) for m in (BARE, HEAD))
        found = {"prefill": seconds[FIRST] - head} if head else {}
        found["step"] = step
        if bare:
            found |= {"attention": step - bare, "products": bare - head}
        if head:
            found["head"] = head
        layers, top, size = weights(shape)
        size = 1 if variant.function is fastrl_int8 else size
        read = (layers + top) * size + cached(shape) * self.positions(shape)
        found = {f"{name} ms": 1e3 * value for name, value in found.items()}
        if variant.peer != "openvino":  # what it reports changes with when it is asked
            found["KV MB"] = self.held(variant, inputs, shape) / 2**20
        return found | {"GB/s": read / step / 1e9}

    def positions(self, shape):
        """How many tokens' keys and values a step reads on average, if each is read once."""
        return shape["prompts"] * (shape["P"] + shape["G"] * shape["tokens"] / 2)

    def held(self, variant, inputs, shape):
        """Bytes of keys and values at the end; the last token has none."""
        steps = shape["tokens"] - 1
        if variant.peer == "llamacpp":
            return inputs.exported(**variant.function.keywords).held
        if variant.ours:  # in nodes of CHUNK positions
            held = len(inputs.prompts) * shape["P"] + inputs.rows * CHUNK * math.ceil(steps / CHUNK)
        else:
            held = inputs.rows * (shape["P"] + steps)
        return held * cached(shape)

    def bytes_needed(self, name, shape):
        layers, top, size = weights(shape)
        rows, model = shape["prompts"] * shape["G"], (layers + top) * size
        both = rows * (shape["P"] + shape["tokens"]) * cached(shape)
        if name == "HF generate":  # the widest activations of all prompts at once
            wide = 4 * MODELS[shape["model"]][2]["intermediate_size"] * size
            return model + 2 * both + rows * shape["P"] * wide
        return 3.0 * model if name in EXPORTED else model + 2 * both

    def small(self, shape):
        return shape | {"prompts": 1, "P": 4, "G": 2, "tokens": 2, "layers": 1}

    def work(self, shape, mode):
        layers, top, size = weights(shape)
        count, tokens = shape["prompts"], self.tokens(mode, shape["tokens"])
        rows, prompt = count * shape["G"], 1 if mode == BARE else shape["P"]
        steps = 0 if mode == HEAD else tokens - 1
        through = steps * rows + (0 if mode == HEAD else count * prompt)
        keys = count * prompt * (prompt + 1) / 2 + steps * rows * (prompt + tokens / 2)
        sizes = MODELS[shape["model"]][2]
        pair = 4 * shape["layers"] * sizes["num_attention_heads"] * sizes["head_dim"]
        moved = tokens * top * size
        if mode != HEAD:
            read = self.positions(shape | {"P": prompt, "tokens": tokens}) * cached(shape)
            moved += tokens * layers * size + steps * read
        operations = 2 * (through * layers + tokens * rows * top) + (mode != HEAD) * pair * keys
        return Work(float(operations), float(moved), shape["dtype"])


RACE = Rollout()
