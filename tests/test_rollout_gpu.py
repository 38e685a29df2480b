"""Rollouts on a GPU: in Triton's interpreter without one, and tests for where there is one."""

from importlib.util import find_spec

import gpu_proof
import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model

from fastrl.models import add_lora, backbone
from fastrl.rollout import RolloutEngine, SamplingParams, engine
from fastrl.rollout.device import DeviceDecoder


def prompts(*lengths):
    g = torch.Generator().manual_seed(5)
    return [torch.randint(2, VOCAB, (n,), generator=g).tolist() for n in lengths]


@torch.no_grad()
def forward(model, ids):
    """Final hidden states of all tokens."""
    return backbone(model)(torch.tensor([ids], device=model.device)).last_hidden_state[0]


def device_engine(model, **options):
    engine.Decoder = DeviceDecoder  # on a CPU too, in the interpreter
    made = RolloutEngine(model, **options)
    assert isinstance(made._native()[0], DeviceDecoder), made.fallback_reason
    return made


def check_greedy(family, device="cpu", lengths=(12, 1), tokens=4, **changes):
    """Equal to Hugging Face's generate, for two completions of each prompt."""
    model = tiny_model(family, **changes).to(device)
    asked = prompts(*lengths)
    sampling = SamplingParams(temperature=0, max_new_tokens=tokens, ignore_eos=True)
    rows = device_engine(model).generate(asked, 2, sampling).completion_lists()
    for i, prompt in enumerate(asked):
        options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None}
        want = model.generate(torch.tensor([prompt], device=device), **options)
        assert rows[2 * i] == rows[2 * i + 1] == want[0, len(prompt) :].tolist()


def check_branches(family, device="cpu", more=3, **changes):
    """Fork, rewind and step reach the hidden states of the forward over the same tokens."""
    model = tiny_model(family, **changes).to(device)
    rollouts = device_engine(model)
    (prompt,) = prompts(11)
    extra = prompts(*[more] * 3)
    root = rollouts.prefill(prompt)
    torch.testing.assert_close(root.hidden, forward(model, prompt)[-1], rtol=1e-4, atol=1e-4)
    whole, part = rollouts.fork(root), rollouts.fork(root, 7)
    for step in range(more):
        tokens = torch.tensor([extra[0][step], extra[1][step]], device=device)
        hidden = rollouts.step([whole, part], tokens)
    other = rollouts.fork(whole, 12)  # within what the first has written
    rollouts.rewind(whole, 13)
    tokens = torch.tensor([extra[2][0], extra[2][1]], device=device)
    again = rollouts.step([whole, other], tokens)
    for got, ids in (
        (hidden[0], prompt + extra[0]),
        (hidden[1], prompt[:7] + extra[1]),
        (again[0], [*prompt, *extra[0][:2], extra[2][0]]),
        (again[1], [*prompt, extra[0][0], extra[2][1]]),
    ):
        torch.testing.assert_close(got, forward(model, ids)[-1], rtol=1e-4, atol=1e-4)


def check_new_weights(device="cpu"):
    """Seen in place without a new decoder; a parameter that moved takes a new one. LoRA too."""
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", "seed": 0}
    model = add_lora(tiny_model("qwen3", num_hidden_layers=1), **lora).to(device)
    rollouts = device_engine(model)
    first = rollouts._native()[0]
    (prompt,) = prompts(5)
    for moved in (False, False, True):
        with torch.no_grad():
            for p in model.parameters():
                if moved:
                    p.data = p + 0.05 * torch.randn_like(p)
                else:
                    p.add_(0.05 * torch.randn_like(p))
        branch = rollouts.prefill(prompt)
        got = rollouts.step([branch], torch.tensor([9], device=device))[0]
        want = forward(model, [*prompt, 9])[-1]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert (rollouts._native()[0] is first) == (not moved)


def check_interpreted():
    torch.set_num_threads(1)
    check_greedy("gemma2", num_hidden_layers=2)
    check_branches("mistral", num_hidden_layers=1)
    check_new_weights()


def check_interpreted_families():
    for family in FAMILIES:
        check_greedy(family)
        check_branches(family)


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize(
    "check", ["interpreted", pytest.param("interpreted_families", marks=pytest.mark.slow)]
)
def test_triton(check):
    code = f"from test_rollout_gpu import *; check_{check}()"
    gpu_proof.run_python(code, TRITON_INTERPRET="1")


def test_a_cpu_without_the_interpreter_is_refused():
    with pytest.raises(engine.UnsupportedModel, match="Triton needs them on a GPU"):
        DeviceDecoder(tiny_model("llama"))


# ---- on a GPU ------------------------------------------------------------------------------------


@gpu_proof.needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_equals_generate(family):
    torch.backends.cuda.matmul.allow_tf32 = False
    check_greedy(family, "cuda", lengths=(12, 1, 300), tokens=70)
    check_branches(family, "cuda", more=3)


@gpu_proof.needs_gpu
def test_gpu_new_weights():
    check_new_weights("cuda")


@gpu_proof.needs_gpu
def test_gpu_steps_are_replayed():
    """One graph serves many steps, and a batch that shrinks takes few more."""
    model = tiny_model("qwen2", torch.bfloat16).cuda()
    rollouts = device_engine(model)
    sampling = SamplingParams(max_new_tokens=100, eos_token_id=tuple(range(2, 12)))
    out = rollouts.generate(prompts(40, 7), 16, sampling)
    steps = rollouts._decoder._steps
    assert all(step.graph is not None for step in steps.values())
    assert len(steps) < 16 < out.completion_ids.shape[1]
    again = rollouts.generate(prompts(40, 7), 16, sampling)
    assert torch.equal(again.completion_ids, out.completion_ids)
    assert torch.equal(again.logprobs, out.logprobs)
