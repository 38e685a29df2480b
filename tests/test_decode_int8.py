"""The native decoder with its projections in int8, against Hugging Face's forward with the same."""

from itertools import pairwise

import gpu_proof
import pytest
import torch
from families import FAMILIES, tiny_model
from test_decode import FREE, forward, prompts
from test_decode_lora import adapted
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fastrl import train
from fastrl.kernels import native, quantize
from fastrl.kernels.quant import reference
from fastrl.kernels.quant.cpu import Int8Rows
from fastrl.models import character_tokenizer
from fastrl.models.head import unwrap
from fastrl.rollout import RolloutEngine, SamplingParams
from fastrl.rollout.generation import row_seeds
from fastrl.train.tracking import read_jsonl

pytestmark = pytest.mark.skipif(bool(native.why_missing), reason=native.why_missing)


class Int8(nn.Module):
    """A linear layer whose rows, and those it is given, are rounded to int8 and back."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(reference.dequantize(quantize(layer.weight)).double())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.double())

    def forward(self, x):
        rows = reference.quantize_rows(x)
        rounded = rows.data.double() * rows.scale.double().unsqueeze(-1)
        return nn.functional.linear(rounded, self.weight, self.bias)


def rounded(model):
    """The same model in float64, with its projections (below adapters) in int8."""
    for name, module in list(unwrap(model).named_modules()):
        if type(module) is nn.Linear and name.endswith(("_proj", "base_layer")):
            parent, _, last = name.rpartition(".")
            setattr(unwrap(model).get_submodule(parent), last, Int8(module))
    return model.double()


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check_steps(model, same):
    """Rows that stepped, and the same prefilled, against the forward of a `same` rounded model."""
    texts = prompts(5, 1, 100)
    engine = RolloutEngine(model, scheme="int8")
    branches = [engine.prefill(ids).fork() for ids in texts for _ in range(3)]
    added = torch.tensor(prompts(*[40] * 9))
    for token in added.T:
        stepped = engine.step(branches, token)
    whole = [texts[i // 3] + row for i, row in enumerate(added.tolist())]
    prefilled = torch.stack([engine.prefill(ids).hidden for ids in whole])
    exact = torch.stack([forward(model, ids)[-1] for ids in whole])
    same = rounded(same)
    want = torch.stack([forward(same, ids)[-1] for ids in whole])
    lost = distance(want, exact)
    assert 1e-3 < lost < 0.1
    for got in (stepped, prefilled):
        if model.dtype == torch.float32:  # a number may be on the verge of two integers
            assert distance(got, want) < lost / 4
        else:  # keys, values and what leaves are rounded, and many are
            assert distance(got, exact) < 1.2 * lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_the_rounded_forward(family, dtype):
    model = tiny_model(family, dtype)
    same = tiny_model(family)
    same.load_state_dict(model.state_dict())
    check_steps(model, same)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_adapters_stay_in_floats(family):
    check_steps(adapted(family), adapted(family))


@pytest.mark.parametrize("sizes", [{"hidden_size": 70, "head_dim": 22}, {"intermediate_size": 230}])
def test_rows_that_fill_no_cache_line(sizes):
    check_steps(tiny_model("qwen3", **sizes), tiny_model("qwen3", **sizes))


def test_changed_weights_are_quantized_again():
    model = tiny_model("llama")
    engine = RolloutEngine(model, scheme="int8")
    (ids,) = prompts(30)

    def now():
        return RolloutEngine(model, scheme="int8").prefill(ids).hidden

    seen = [engine.prefill(ids).hidden]
    up, down = model.model.layers[1].mlp.up_proj, model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        up.weight.mul_(2)
    seen.append(engine.prefill(ids).hidden)
    assert torch.equal(seen[-1], now())
    down.weight.data = torch.randn_like(down.weight)  # moved, not written
    seen.append(engine.prefill(ids).hidden)
    assert torch.equal(seen[-1], now())
    up.weight.data.mul_(3)  # past autograd
    engine.weights_changed()
    seen.append(engine.prefill(ids).hidden)
    assert torch.equal(seen[-1], now())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # past autograd as well
    model(torch.tensor([ids])).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    seen.append(engine.prefill(ids).hidden)
    assert torch.equal(seen[-1], now())
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_frozen_weights_are_quantized_once(monkeypatch):
    model = adapted("qwen2")
    engine = RolloutEngine(model, scheme="int8")
    filled = []
    fill = Int8Rows.fill
    monkeypatch.setattr(Int8Rows, "fill", lambda r, w: filled.append(w) or fill(r, w))
    (ids,) = prompts(12)
    first = engine.prefill(ids).hidden
    once = len(filled)
    assert once == 3 * 7 + 1
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B" in name:
                p.mul_(2)
    assert not torch.equal(engine.prefill(ids).hidden, first)
    assert len(filled) == once
    with torch.no_grad():
        unwrap(model).model.layers[0].mlp.up_proj.base_layer.weight.mul_(2)
    engine.prefill(ids)
    assert len(filled) == once + 1
    for p in model.parameters():
        p.data.copy_(1.5 * p)  # past autograd
    engine.prefill(ids)
    assert len(filled) == 2 * once + 1


def test_a_head_that_lies_in_columns():
    model = tiny_model("llama", vocab_size=20000)
    sampling = SamplingParams(max_new_tokens=5, seed=9, **FREE)
    want = RolloutEngine(model, scheme="int8").generate([[3, 4]], 4, sampling)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().T.contiguous().T)
    got = RolloutEngine(model, scheme="int8").generate([[3, 4]], 4, sampling)
    assert got.logprobs.equal(want.logprobs)


def test_int8_nbytes_are_those_of_the_copies():
    model = tiny_model("qwen2")
    engine = RolloutEngine(model, scheme="int8")
    assert engine.int8_nbytes == 0
    engine.prefill([2])
    quantized = ("_proj", "lm_head")
    shapes = [m.weight.shape for n, m in model.named_modules() if n.endswith(quantized)]
    assert engine.int8_nbytes == sum(n * (-(-k // 64) * 64 + 8) for n, k in shapes)
    plain = RolloutEngine(model)
    plain.prefill([2])
    assert plain.int8_nbytes == 0


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("group_size", [1, 40])
def test_logprobs_are_of_what_was_sampled_from(family, group_size):
    model = tiny_model(family)
    sampling = SamplingParams(temperature=0.8, max_new_tokens=20, seed=3, **FREE)
    texts = prompts(4, 30)
    out = RolloutEngine(model, scheme="int8").generate(texts, group_size, sampling)
    same, head = rounded(tiny_model(family)), Int8(model.lm_head)
    softcap = model.config.to_dict().get("final_logit_softcapping")
    errors = []
    for i, ids in list(enumerate(out.completion_lists()))[:: max(1, group_size // 4)]:
        text = texts[i // group_size]
        logits = head(forward(same, text + ids)[len(text) - 1 : -1].float()).detach()
        logits = torch.tanh(logits / softcap) * softcap if softcap else logits
        want = (logits / 0.8).log_softmax(-1)[range(20), ids]
        errors.append((out.logprobs[i] - want).abs())
    errors = torch.stack(errors)
    # A number on the verge of two integers changes what comes after it, by little.
    assert errors.max() < 2e-2 and (errors < 1e-5).double().mean() > 0.5


def test_sampling_from_a_branch_is_what_generate_does():
    engine = RolloutEngine(tiny_model("qwen2"), scheme="int8")
    sampling = SamplingParams(max_new_tokens=5, seed=9, top_k=40, **FREE)
    (ids,) = prompts(12)
    want = engine.generate([ids], 4, sampling)
    root = engine.prefill(ids)
    branches, hidden = [root.fork() for _ in range(4)], root.hidden.repeat(4, 1)
    seeds = row_seeds(9, torch.arange(4))
    for i in range(5):
        drawn = engine.sample(hidden, sampling, seeds=seeds, positions=torch.full((4,), i))
        assert torch.equal(drawn.token, want.completion_ids[:, i])
        assert torch.equal(drawn.logprob, want.logprobs[:, i])
        hidden = engine.step(branches, drawn.token)
    for x, at, message in (
        (hidden, seeds[:3], r"seeds must have shape \(4,\), got \(3,\)"),
        (hidden[:, :40], seeds, "hidden must end in weight's H=48"),
        (hidden.double(), seeds, "hidden must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.sample(x, sampling, seeds=at, positions=seeds)


def test_what_cannot_be_is_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="scheme='int4' is unknown; use 'int8' or None"):
        RolloutEngine(model, scheme="int4")
    other = RolloutEngine(tiny_model("llama", hidden_act="relu"), scheme="int8")
    for _ in range(2):
        with pytest.raises(ValueError, match="decodes natively: its activation is relu"):
            other.generate([[2, 3]])
    engine = RolloutEngine(model, scheme="int8")
    engine.prefill([2, 3])
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 5] = float("nan")
        model.model.layers[1].self_attn.k_proj.weight[4, 6] = float("inf")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layers.1.self_attn.k_proj.weight holds .* 2 rows"):
            engine.prefill([2, 3])


def grpo(recipe, **changes):
    stage = recipe["stages"]["grpo"] | {"mismatch": "token_truncate", "steps": 2}
    return recipe | {"stages": {"grpo": stage}, "rollout_scheme": "int8"} | changes


def test_a_recipe_samples_in_int8_and_is_evaluated_in_floats(recipe, tmp_path, monkeypatch):
    schemes = []
    generate = RolloutEngine.generate

    def watched(self, prompts, group_size=1, sampling=None, **options):
        schemes.append((self.scheme, sampling.temperature == 0))
        return generate(self, prompts, group_size, sampling, **options)

    monkeypatch.setattr(RolloutEngine, "generate", watched)
    run = train.run(train.parse_config(grpo(recipe)), tmp_path / "run")
    assert set(schemes) == {("int8", False), (None, True)}
    for row in read_jsonl(run / "metrics.jsonl"):
        assert 1e-5 < row["mismatch_max"] < 0.3 and 0 < row["mismatch_k3"] < 1e-3


def test_recipes_that_cannot_sample_in_int8(recipe, tmp_path):
    server = {"server": "http://localhost:1", "weights": "w"}
    with pytest.raises(train.ConfigError, match="rollout_scheme='int8' has no effect on a server"):
        train.parse_config(grpo(recipe, rollout=server))
    with pytest.raises(train.ConfigError, match="rollout_scheme"):
        train.parse_config(grpo(recipe, rollout_scheme="nf4"))
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    model.save_pretrained(tmp_path / "gpt2")
    character_tokenizer(recipe["model"]["alphabet"]).save_pretrained(tmp_path / "gpt2")
    other = grpo(recipe, model={"path": str(tmp_path / "gpt2"), "dtype": "float32"})
    with pytest.raises(train.ConfigError, match=r"rollout_scheme='int8' cannot be: .* natively"):
        train.run(train.parse_config(other), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_instruction_set():
    code = (
        "import test_decode_int8 as t\n"
        "from test_decode import test_a_rows_bits_are_its_own as bits\n"
        "for family in ('llama', 'gemma2'):\n"
        "    t.test_hidden_states_equal_the_rounded_forward(family, t.torch.float32)\n"
        "t.test_hidden_states_equal_the_rounded_forward('qwen2', t.torch.bfloat16)\n"
        "bits('gemma2', t.torch.float32, 'int8')\n"
        "print('as it should be')"
    )
    for isa in native.module().cpu_isas():
        if isa != native.module().isa():
            assert "as it should be" in gpu_proof.run_python(code, FASTRL_ISA=isa)
