"""Prompts computed once for their group: log-probs and gradients are those of the dense batch."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from fastrl import models
from fastrl.kernels import GroupLayout, native
from fastrl.models.attention import shared_attention
from fastrl.rollout import RolloutEngine, SamplingParams
from fastrl.train import ConfigError, loop, parse_config
from fastrl.train.algorithms import Context
from fastrl.train.algorithms.policy import compare, policy_loss, sample_batch
from fastrl.train.optimizer import Optimizer
from fastrl.train.update import accumulate

needs_cpu = pytest.mark.skipif(
    native.unavailable("cpu", torch.device("cpu")) is not None, reason="no cpu kernels"
)
SMALL = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, attention_bias=True),
    "mistral": MistralConfig(**SMALL, sliding_window=4),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True),
    "gemma2": Gemma2Config(
        **SMALL, **WINDOW, head_dim=8, query_pre_attn_scalar=4, attn_logit_softcapping=0.5
    ),
    "gemma3": Gemma3TextConfig(**SMALL, **WINDOW, head_dim=8),
}
LONG, SHORT, PAIR, OTHER = [5, 6, 7, 8, 9, 10, 11], [3], [12, 13], [14, 15, 16]
PROMPTS = [LONG, LONG, LONG, SHORT, PAIR, PAIR, OTHER]
LENGTHS = [5, 1, 3, 2, 0, 4, 3]  # a token, and none; a group of one; a window within the prompt


def build(family="qwen3", dtype=torch.float32, **options):
    torch.manual_seed(0)
    if family == "gemma2":  # the only one of the model's own that has the softcap
        options.setdefault("attn_implementation", "eager")
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), **options).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so that attention is not nearly uniform
            nn.init.normal_(parameter, std=0.2)
    return model


def completions(rows=slice(None)):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 41, (len(LENGTHS), max(LENGTHS)), generator=g)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    return PROMPTS[rows], ids[rows], mask[rows]


def results(model, function, rows=slice(None)):
    """Outputs and gradients of all parameters, with uneven upstream gradients."""
    prompts, ids, mask = completions(rows)
    model.zero_grad()
    out = function(model, prompts, ids, mask)
    upstream = torch.randn(3, *ids.shape, generator=torch.Generator().manual_seed(2))
    (torch.stack(out) * upstream).sum().backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def dense(model, *batch):
    return models.completion_logprobs(model, *batch, temperature=0.7, entropy=True)


def shared(model, *batch):
    return models.group_logprobs(model, batch, temperature=0.7, entropy=True)


def assert_same(got, want, tolerance):
    for a, b in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert got[1].keys() == want[1].keys()
    for name, b in want[1].items():
        a = got[1][name]
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1), name


@pytest.fixture
def float64(monkeypatch):
    """Norms, rotations and softmax in Hugging Face's models are float32 whatever the dtype is."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return torch.float64


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_float64(family, float64):
    model = build(family, float64)
    want, got = results(model, dense), results(model, shared)
    assert want[0].logprob.dtype == float64
    assert_same(got, want, 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_float32(family):
    model = build(family)
    assert_same(results(model, shared), results(model, dense), 1e-5)
    models.verify_shared_prefix(model)


def test_the_prompt_is_computed_once_and_the_last_token_never():
    model, seen = build(), []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    shared(model, *completions())
    prompts = len(LONG) + len(SHORT) + len(PAIR) + len(OTHER)
    assert seen == [prompts + sum(max(n - 1, 0) for n in LENGTHS)]


def test_rollouts_are_taken_as_they_are(model):
    sampling = SamplingParams(max_new_tokens=4, top_k=5, seed=3)
    rollouts = RolloutEngine(model).generate([[4, 5, 6], [7]], 3, sampling)
    got = models.group_logprobs(model, rollouts).logprob
    torch.testing.assert_close(got, rollouts.untruncated_logprobs, rtol=1e-5, atol=1e-5)


def test_groups_do_not_see_each_other(float64):
    model = build(dtype=float64)
    whole = results(model, shared)[0]
    alone = results(model, shared, slice(4, 6))[0]
    for a, b in zip(alone, whole, strict=True):
        torch.testing.assert_close(a, b[4:6], rtol=1e-12, atol=1e-12)


def test_completions_without_tokens():
    prompts, ids, mask = completions()
    out = models.group_logprobs(build(), (prompts, ids, torch.zeros_like(mask)))
    assert not out.logprob.any() and not out.lse.any()
    assert models.group_logprobs(build(), (prompts, ids[:, :0], mask[:, :0])).logprob.numel() == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "fastrl"])
@pytest.mark.parametrize("watched", ["mlp", "mlp.gate_proj"])  # the model's own layers, and ours
def test_gradient_checkpointing(watched, reentrant, implementation):
    model = build(attn_implementation=implementation).train()
    passes = []
    layer = model.model.layers[0]
    layer.get_submodule(watched).register_forward_pre_hook(lambda *_: passes.append(1))
    want = results(model, shared)
    assert len(passes) == 1
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert_same(results(model, shared), want, 1e-6)
    assert len(passes) == 3  # the layer was computed again
    assert model.config._attn_implementation == implementation
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == functions


def test_lora():
    options = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "seed": 0}
    model = models.add_lora(build("qwen2"), **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    got, want = results(model, shared), results(model, dense)
    assert all("lora" in name for name in got[1])
    assert_same(got, want, 1e-5)


@needs_cpu
def test_compiled():
    model = build()
    want = results(model, shared)
    torch._dynamo.reset()
    model.model.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same(results(model, shared), want, 1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        some = results(model, shared, slice(0, 6))[0]  # another layout, the same graph
    torch.testing.assert_close(some.logprob, want[0].logprob[:6], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    """No further from float32 than the dense batch in bfloat16, twice over."""
    model = build()
    exact = results(model, dense)[0].logprob
    model = model if autocast else model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got, want = (results(model, f) for f in (shared, dense))
    assert got[0].logprob.dtype == torch.float32
    error, allowed = ((x[0].logprob - exact).abs().max() for x in (got, want))
    assert error < 2 * allowed + 1e-3 and allowed > 1e-3
    for name, gradient in want[1].items():
        scale = gradient.float().abs().max()
        assert (got[1][name].float() - gradient.float()).abs().max() < 0.1 * scale, name


def test_the_model_is_as_before_after_an_error():
    model = build().train()
    model.gradient_checkpointing_enable()
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]

    def stop(*_):
        raise RuntimeError("no further")

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="no further"):
        shared(model, *completions())
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == functions


def test_a_batch_without_a_layout_is_causal():
    model, ids = build("mistral"), torch.randint(3, 41, (3, 9))
    want = model(input_ids=ids).logits
    with shared_attention(model):
        got = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


LAYOUT = GroupLayout.from_lengths([3], [[2, 2]])
IDS = torch.arange(3, 10).unsqueeze(0)
PACKED = {"group_layout": LAYOUT, "position_ids": LAYOUT.positions().unsqueeze(0)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.arange(7).unsqueeze(0) > 1}, "takes no padding"),
        ({"attention_mask": torch.zeros(1, 1, 7, 7)}, "takes no mask of the caller's"),
        (PACKED | {"output_attentions": True}, "never holds attention weights"),
        ({"position_ids": PACKED["position_ids"]}, "start again within a row"),
        ({"group_layout": LAYOUT}, r"position_ids must be group_layout\.positions"),
        (PACKED | {"input_ids": IDS.expand(2, -1)}, "must be packed to"),
        (PACKED | {"input_ids": IDS[:, :5], "position_ids": None}, "end at the number of tokens"),
        (PACKED | {"is_causal": False}, "is causal, but Qwen3Attention is not"),
    ],
)
def test_what_the_attention_cannot_do_is_refused(arguments, message):
    model = build(attn_implementation="fastrl")
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, "use_cache": False} | arguments)


def test_a_cache_that_holds_tokens_is_refused():
    model = build(attn_implementation="fastrl").eval()
    with pytest.raises(ValueError, match="takes no KV cache, got 1 queries for 8 keys"):
        model.generate(IDS, max_new_tokens=3)


def test_dropout_of_attention_is_refused():
    config = Qwen2Config(**SMALL, attention_dropout=0.1)
    model = AutoModelForCausalLM.from_config(config)
    shared(model.eval(), *completions())
    with pytest.raises(ValueError, match=r"has attention_dropout=0\.1"):
        shared(model.train(), *completions())
    with pytest.raises(ValueError, match=r"has attention_dropout=0\.1"):
        models.verify_shared_prefix(model)
    model.set_attn_implementation("fastrl")
    with pytest.raises(ValueError, match="has no dropout"):
        model(IDS, use_cache=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            BloomConfig(vocab_size=41, hidden_size=32, n_layer=1, n_head=2),
            "BloomForCausalLM does not follow transformers' attention interface",
        ),
        (
            Qwen3NextConfig(**SMALL, num_experts=2, num_experts_per_tok=1),
            "Qwen3NextForCausalLM",
        ),
        (
            GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
            "does not know s_aux",
        ),
    ],
)
def test_families_that_cannot_share_are_named_with_what_to_use(config, message):
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"{message}.*use fastrl.models.completion_logprobs"):
        shared(model, *completions())
    assert model.config._attn_implementation == before


def test_a_model_that_looks_beyond_its_completion_is_found():
    model = build()
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + x.cumsum(1)
    with pytest.raises(ValueError, match="computes other log-probs when the prompt is shared"):
        models.verify_shared_prefix(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, i, m: ([[], *p[1:]], i, m), "empty prompt"),
        (lambda p, i, m: (torch.ones(6, 2).long(), i, m), "must be a list .* without padding"),
        (lambda p, i, m: (p[1:], i, m), r"must be \[B=6, T\] for 6 prompts"),
        (lambda p, i, m: (p, i, m.long()), "completion_mask must be bool"),
        (lambda p, i, m: (p, i, m.flip(1)), "right-padded"),
    ],
)
def test_bad_batches_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        models.group_logprobs(build(), change(*completions()))


# The trainer.


def grpo_setup(recipe, shared_prefix, **stage):
    recipe["model"]["shared_prefix"] = shared_prefix
    recipe["stages"]["grpo"] |= stage
    return loop.prepare(parse_config(recipe))


def a_batch(setup, reference=None):
    context = Context(setup, setup.config.stages["grpo"], 1, reference)
    batch = compare(context, sample_batch(context, 0)[0])
    noise = torch.randn(len(batch.prompt_ids), generator=torch.Generator().manual_seed(0))
    # Rewards of an untrained model hardly differ.
    return context, replace(batch, advantages=noise)


@pytest.mark.parametrize(
    ("size", "model"),
    [(64, {}), (6, {}), (3, {}), (1, {}), (8, {"gradient_checkpointing": True, "lora": {}})],
)
def test_a_step_is_the_same_with_and_without(recipe, size, model):
    recipe["model"] |= model
    options = {"updates_per_batch": 2, "kl_coef": 0.1, "micro_batch_size": size}
    steps = []
    for choice in ("off", "on"):
        setup = grpo_setup(recipe, choice, **options)
        stage = setup.config.stages["grpo"]
        context, batch = a_batch(setup, setup.policy)
        with torch.no_grad():  # so that ratio and KL are not trivial
            for p in setup.policy.parameters():
                p.mul_(1.05)
        optimizer = Optimizer(setup.policy, stage.optimizer, 1)
        metrics = accumulate(
            batch,
            lambda part, context=context: policy_loss(context, part, None),
            size,
            [optimizer],
            shared_prefix=setup.shared_prefix,
        )
        trained = [p for p in setup.policy.parameters() if p.requires_grad]
        steps.append((batch, metrics, [p.grad.clone() for p in trained]))
    (a, want, wanted), (b, got, gradients) = steps
    for name in ("old_logprobs", "ref_logprobs"):
        torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=1e-5, atol=1e-5)
    assert got == pytest.approx(want, rel=1e-4, abs=1e-6) and got["kl"] > 0
    for x, y in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_micro_batches_keep_groups_together(recipe):
    setup = grpo_setup(recipe, "off")
    _, batch = a_batch(setup)  # 4 prompts x 4
    prompts = [[i] for i in (1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 4, 5, 5, 5, 5, 5)]
    batch = replace(batch, prompt_ids=prompts)
    rows = {n: [p.tolist() for p in batch.pieces(n, shared_prefix=True)] for n in (1, 4, 5, 16)}
    assert rows[16] == [list(range(16))]
    assert rows[5] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10], [11, 12, 13, 14, 15]]
    assert rows[4] == [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 10], [11, 12, 13, 14], [15]]
    assert rows[1] == [[i] for i in range(16)]
    assert [p.prompt_ids for p, _ in batch.micro_batches(5, shared_prefix=True)][2] == [[4]]


def test_the_choice_of_a_recipe(recipe, monkeypatch):
    for given, choice in ((True, "on"), (False, "off"), ("auto", "auto")):
        recipe["model"]["shared_prefix"] = given
        assert parse_config(recipe).model.shared_prefix == choice
    recipe["model"]["shared_prefix"] = "maybe"
    with pytest.raises(ConfigError, match=r"model\.shared_prefix.*'auto', 'on' or 'off'"):
        parse_config(recipe)
    assert not grpo_setup(recipe, "off").shared_prefix
    assert grpo_setup(recipe, "auto").shared_prefix
    assert grpo_setup(recipe, "on").shared_prefix
    monkeypatch.setattr(native, "unavailable", lambda impl, device: "not here")
    assert not grpo_setup(recipe, "auto").shared_prefix


@needs_cpu
def test_a_model_that_cannot_share_is_trained_without_or_refused(recipe, monkeypatch):
    def refuse(_):
        raise ValueError("it cannot")

    monkeypatch.setattr(models, "verify_shared_prefix", refuse)
    with pytest.raises(ConfigError, match="shared_prefix=on cannot be: it cannot"):
        grpo_setup(recipe, "on")
    with pytest.warns(UserWarning, match="repeated for each completion: it cannot"):
        assert not grpo_setup(recipe, "auto").shared_prefix
