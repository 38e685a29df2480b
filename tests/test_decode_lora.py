"""The native decoder of models with LoRA adapters, against peft's own forward."""

import warnings

import gpu_proof
import pytest
import torch
from families import FAMILIES, tiny_model
from peft import IA3Config, LoraConfig, get_peft_model
from test_decode import forward, native_engine, prompts, steps_are_the_forwards

from fastrl.kernels import native
from fastrl.models import add_lora, completion_logprobs
from fastrl.models.head import unwrap
from fastrl.rollout import RolloutEngine, SamplingParams
from fastrl.rollout.architecture import UnsupportedModel
from fastrl.rollout.decoder import Decoder

pytestmark = pytest.mark.skipif(bool(native.why_missing), reason=native.why_missing)
FREE = {"ignore_eos": True}


@torch.no_grad()
def awaken(model):
    """B is 0 where adapters begin: let all of them matter."""
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.copy_(0.05 * torch.randn(p.shape))
    return model.eval()


def adapted(family="qwen2", dtype=torch.float32, targets="all-linear", sizes=None, **options):
    base = tiny_model(family, dtype, **sizes or {})
    options = {"r": 5, "lora_alpha": 7, "target_modules": targets, "lora_dropout": 0.5} | options
    return awaken(get_peft_model(base, LoraConfig(**options)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_the_forward(family, dtype):
    model = adapted(family, dtype)
    assert model.base_model.model.model.layers[0].mlp.up_proj.lora_A.default.weight.dtype == (
        torch.float32
    )
    engine = native_engine(model)
    truth = model
    if dtype != torch.float32:  # the same rounded weights, without rounding on the way
        truth = adapted(family).double()
        truth.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    steps_are_the_forwards(engine, model, truth, prompts(5, 1, 100), 30)


def test_hidden_states_are_those_of_weights_merged_by_hand():
    model = adapted(r=3, lora_alpha=6, use_rslora=True, lora_bias=True)
    plain = tiny_model("qwen2", attention_bias=True, mlp_bias=True)
    want = {}
    for name, p in unwrap(model).named_parameters():
        if ".lora_" not in name:
            want[name.replace(".base_layer", "")] = p.detach().double()
    for name, module in unwrap(model).named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"]
            want[f"{name}.weight"] += 6 / 3**0.5 * b.weight.double() @ a.double()
            bias = want.get(f"{name}.bias", torch.zeros(len(b.bias)))
            want[f"{name}.bias"] = bias + 6 / 3**0.5 * b.bias.double()
    layers = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    for layer in layers[:-1]:  # not the head
        layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    plain = plain.double()
    missing, unexpected = plain.load_state_dict(want, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    (ids,) = prompts(20)
    got = native_engine(model).prefill(ids).hidden
    torch.testing.assert_close(got.double(), forward(plain, ids)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family):
    model = adapted(family)
    texts = prompts(3, 40, 1)
    sampling = SamplingParams(temperature=0, max_new_tokens=40, eos_token_id=1)
    out = native_engine(model).generate(texts, 2, sampling).completion_lists()
    for i, ids in enumerate(texts):
        want = model.generate(
            input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=40, attention_mask=None
        )[0, len(ids) :].tolist()
        assert out[2 * i] == out[2 * i + 1] == want


@pytest.mark.parametrize(
    ("targets", "rank", "options"),
    [
        (["q_proj"], 1, {}),
        (["k_proj", "down_proj"], 8, {"lora_bias": True}),
        (["v_proj", "o_proj", "gate_proj"], 17, {"use_rslora": True}),
        (["up_proj"], 64, {"rank_pattern": {"layers.1.mlp.up_proj": 2}}),
        (["q_proj", "down_proj"], 16, {"layers_to_transform": [2]}),
    ],
)
def test_log_probs_equal_the_trainers(targets, rank, options):
    model = adapted("llama", targets=targets, r=rank, lora_alpha=2 * rank**0.5, **options)
    sampling = SamplingParams(temperature=0.8, top_p=0.9, max_new_tokens=30, seed=3, **FREE)
    out = native_engine(model).generate(prompts(4, 30, 100), 5, sampling)
    again = completion_logprobs(
        model, out.prompt_ids, out.completion_ids, out.completion_mask, temperature=0.8
    )
    assert (again.logprob - out.untruncated_logprobs).abs().max() < 1e-5


def test_adapters_of_other_types():
    """In bf16 as the base, and in fp16; what a trainer finds is as far away as the rounding."""
    for dtype in (torch.bfloat16, torch.float16):
        model = adapted("qwen3", torch.bfloat16)
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.data = p.to(dtype)
        truth = adapted("qwen3").double()
        truth.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
        (ids,) = prompts(40)
        got = native_engine(model).prefill(ids).hidden
        for name, p in model.named_parameters():
            assert p.dtype == (dtype if ".lora_" in name else torch.bfloat16)
        if dtype == torch.bfloat16:  # with fp16 peft's sum is a float32, as float16 + bfloat16 is
            allowed = (forward(model, ids)[-1].double() - forward(truth, ids)[-1]).abs().max()
        assert (got.double() - forward(truth, ids)[-1]).abs().max() <= 2 * allowed + 1e-3


def run(model, texts, size, first_row=0):
    sampling = SamplingParams(max_new_tokens=40, seed=5, top_k=20, **FREE)
    out = native_engine(model).generate(texts, size, sampling, first_row=first_row)
    return out.completion_ids, out.logprobs


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 240, "intermediate_size": 1600}])
def test_a_rows_bits_are_its_own(sizes, dtype):
    """Layers that a core takes whole, and larger ones whose products threads share."""
    model = adapted("gemma2", dtype, sizes=sizes | {"num_hidden_layers": 2}, r=9)
    texts = prompts(300, 3, 33)
    whole = run(model, texts, 30)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert same(run(model, texts, 30), whole)
    finally:
        torch.set_num_threads(threads)
    assert same(run(model, texts[:1], 7), [x[:7] for x in whole])
    assert same(run(model, [texts[2]], 1, first_row=60), [x[60:61] for x in whole])


def test_adapters_are_switched_joined_scaled_disabled_and_merged():
    model = adapted("qwen3")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=9, target_modules=["v_proj", "up_proj"]))
    awaken(model)
    engine = native_engine(model)
    (ids,) = prompts(20)
    seen = []

    def check():
        """What the model's forward says now, natively, under a version of its own."""
        branch = engine.prefill(ids)
        assert engine.fallback_reason is None
        torch.testing.assert_close(branch.hidden, forward(model, ids)[-1], rtol=0, atol=1e-5)
        for other in seen:
            if not torch.equal(other.hidden, branch.hidden):
                with pytest.raises(ValueError, match="prefill it again"):
                    engine.step([other], torch.tensor([5]))
        seen.append(branch)
        return branch.hidden

    first = check()
    model.set_adapter("second")
    second = check()
    model.base_model.set_adapter(["default", "second"])
    both = check()
    model.base_model.model.model.layers[1].mlp.up_proj.set_scale("second", 3.0)
    scaled = check()
    with model.disable_adapter():
        base = check()
        torch.testing.assert_close(base, forward(tiny_model("qwen3"), ids)[-1], rtol=0, atol=1e-5)
    assert torch.equal(check(), scaled)
    model.merge_adapter(["default"])
    merged = check()
    torch.testing.assert_close(merged, first, rtol=0, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(check(), scaled, rtol=0, atol=1e-4)
    model.merge_adapter()
    with model.disable_adapter():  # a forward then takes them out of the weights, for good
        torch.testing.assert_close(check(), base, rtol=0, atol=1e-4)
    states = [first, second, both, scaled, base]
    apart = [(a - b).abs().max() for i, a in enumerate(states) for b in states[:i]]
    assert min(apart) > 1e-2
    version = engine.weight_version
    assert len({branch.weight_version for branch in seen}) > 6
    model.set_adapter("second")
    model.delete_adapter("default")
    assert engine.weight_version == version + 1
    check()


def test_an_optimizer_step_is_followed_in_place():
    model = add_lora(
        tiny_model("qwen2"), rank=4, alpha=8, dropout=0.0, target_modules="all-linear", seed=0
    )
    engine = native_engine(model)
    decoder = engine._native()[0]
    sampling = SamplingParams(max_new_tokens=20, seed=1, **FREE)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    texts, rollouts = prompts(7, 12), []
    for step in range(3):
        out = engine.generate(texts, 4, sampling)
        assert out.weight_version == step and engine._native()[0] is decoder
        again = completion_logprobs(
            model, out.prompt_ids, out.completion_ids, out.completion_mask
        ).logprob
        assert (again - out.untruncated_logprobs).abs().max() < 1e-5
        rollouts.append(out.logprobs)
        optimizer.zero_grad()
        again.sum().backward()
        optimizer.step()
    assert not torch.equal(rollouts[0], rollouts[1]) and not torch.equal(rollouts[1], rollouts[2])


def test_adapters_that_transformers_added():
    model = tiny_model("mistral")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    awaken(model)
    (ids,) = prompts(30)
    got = native_engine(model).prefill(ids).hidden
    torch.testing.assert_close(got, forward(model, ids)[-1], rtol=0, atol=1e-5)


def test_other_adapters_decode_through_their_forward_with_one_warning():
    model = adapted("llama", targets=["q_proj", "up_proj"])
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["v_proj"], use_dora=True))
    awaken(model)
    engine = RolloutEngine(model)
    sampling = SamplingParams(temperature=0, max_new_tokens=12, **FREE)
    texts = prompts(9, 4)

    def greedy():
        got = engine.generate(texts, 1, sampling).completion_lists()
        for ids, out in zip(texts, got, strict=True):
            want = model.generate(
                input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=12, min_new_tokens=12
            )
            assert want[0, len(ids) :].tolist() == out

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        greedy()
        assert engine.fallback_reason is None
    model.set_adapter("dora")
    reason = "adapter 'dora' is no plain LoRA but a DoraLinearVariant"
    with pytest.warns(RuntimeWarning, match=f"slower forward: its {reason}") as told:
        greedy()
    assert len(told) == 1 and reason in engine.fallback_reason
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        greedy()
        model.set_adapter("default")
        greedy()
    assert engine.fallback_reason is None


def test_what_is_not_known_is_refused():
    def refuse(model, why):
        with pytest.raises(UnsupportedModel, match=why):
            Decoder(model)

    options = {"target_modules": ["k_proj"], "feedforward_modules": []}
    model = get_peft_model(tiny_model("llama"), IA3Config(**options))
    refuse(model, "a projection of another type, Linear")
    refuse(adapted(targets=["q_proj"], modules_to_save=["norm"]), "peft has replaced a module")
    refuse(adapted(targets=["embed_tokens"]), "its embedding is of another type")
    refuse(adapted(trainable_token_indices=[3]), "its embedding is of another type")
    model = adapted()
    unwrap(model).model.layers[1].mlp.up_proj.lora_A.double()
    refuse(model, r"up_proj.lora_A.default.weight is torch.float64")
    model = adapted(target_parameters=["mlp.up_proj.weight"], targets=None, lora_dropout=0.0)
    refuse(model, "a projection of another type, ParamWrapper")


@pytest.mark.slow
def test_every_instruction_set():
    code = (
        "import test_decode_lora as t\n"
        "t.test_log_probs_equal_the_trainers(['k_proj', 'down_proj'], 17, {})\n"
        "t.test_hidden_states_equal_the_forward('qwen2', t.torch.bfloat16)\n"
        "t.test_adapters_of_other_types()\n"
        "t.test_a_rows_bits_are_its_own({}, t.torch.bfloat16)\n"
        "print('as it should be')"
    )
    for isa in native.module().cpu_isas():
        if isa != native.module().isa():
            assert "as it should be" in gpu_proof.run_python(code, FASTRL_ISA=isa)
