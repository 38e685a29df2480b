"""The native decoder against Hugging Face's forward, and its independence of all around a row."""

import gpu_proof
import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model

from fastrl.kernels import native
from fastrl.models import backbone, completion_logprobs
from fastrl.rollout import RolloutEngine, SamplingParams
from fastrl.rollout.architecture import UnsupportedModel
from fastrl.rollout.decoder import PREFILL_ROWS, Decoder
from fastrl.rollout.weights import fingerprint

pytestmark = pytest.mark.skipif(bool(native.why_missing), reason=native.why_missing)
FREE = {"ignore_eos": True}


def prompts(*lengths):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (n,), generator=g).tolist() for n in lengths]


@torch.no_grad()
def forward(model, ids):
    return backbone(model)(torch.tensor([ids]), use_cache=False).last_hidden_state[0]


def native_engine(model, **options):
    engine = RolloutEngine(model, **options)
    engine.prefill([2])
    assert engine.fallback_reason is None
    return engine


def steps_are_the_forwards(engine, model, truth, texts, count):
    """Three rows behind each text, step by step; `truth` is the model itself, or in float64."""
    branches = [engine.prefill(ids).fork() for ids in texts for _ in range(3)]
    added = torch.tensor(prompts(*[count] * 9))
    for token in added.T:
        got = engine.step(branches, token)
    for i in (0, 4, 8):
        ids = texts[i // 3] + added[i].tolist()
        want = forward(truth, ids)[-1]
        error = (got[i].double() - want.double()).abs().max()
        if model is truth:
            assert error < 1e-5
        else:
            assert error <= 2 * (forward(model, ids)[-1].double() - want).abs().max() + 1e-3
        # AMX takes a prompt's attention in bf16, a row's own in floats: one more rounding apart.
        rounding = torch.finfo(got.dtype).eps * got[i].abs().max()
        assert engine.prefill(ids).hidden.sub(got[i]).abs().max() <= 2 * error + rounding + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_the_forward(family, dtype):
    model = tiny_model(family, dtype)
    engine = native_engine(model)
    truth = tiny_model(family).double() if dtype != torch.float32 else model
    if dtype != torch.float32:  # the same rounded weights, without rounding on the way
        truth.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    steps_are_the_forwards(engine, model, truth, prompts(5, 1, PREFILL_ROWS + 70), 70)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family):
    model = tiny_model(family)
    texts = prompts(3, 40, 1, 17)
    sampling = SamplingParams(temperature=0, max_new_tokens=70, eos_token_id=1)
    out = native_engine(model).generate(texts, 2, sampling).completion_lists()
    for i, ids in enumerate(texts):
        want = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=70, attention_mask=None
        )[0, len(ids) :].tolist()
        assert out[2 * i] == out[2 * i + 1] == want


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_the_trainers(family):
    model = tiny_model(family)
    sampling = SamplingParams(temperature=0.8, top_p=0.9, max_new_tokens=30, seed=3, **FREE)
    out = native_engine(model).generate(prompts(4, 30, 300), 5, sampling)
    again = completion_logprobs(
        model, out.prompt_ids, out.completion_ids, out.completion_mask, temperature=0.8
    )
    gap = (again.logprob - out.untruncated_logprobs).abs().amax(1)
    assert gap.max() < 1e-5, f"{family}, {gap}"


@pytest.mark.parametrize(
    "family, dtype, scheme",
    [
        ("gemma2", torch.float32, None),
        ("gemma2", torch.bfloat16, None),
        ("qwen2", torch.bfloat16, None),
        ("gemma2", torch.float32, "int8"),
    ],
)
def test_a_rows_bits_are_its_own(family, dtype, scheme):
    model = tiny_model(family, dtype)
    texts = prompts(260, 3, 33)

    def run(texts, size, first_row=0, **changes):
        options = {"max_new_tokens": 70, "seed": 5, "top_k": 20} | FREE | changes
        engine = native_engine(model, scheme=scheme)
        out = engine.generate(texts, size, SamplingParams(**options), first_row=first_row)
        return out.completion_ids, out.logprobs

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    whole = run(texts, 30)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert same(run(texts, 30), whole)
    assert same(run(texts[:1], 7), [x[:7] for x in whole])
    assert same(run([texts[0]] * 7, 1), [x[:7] for x in whole])
    assert same(run(texts[2:], 7, first_row=60), [x[60:67] for x in whole])
    # Others end early, and the rows of one prompt have fewer and fewer neighbours.
    ids, logprobs = run(texts, 30, ignore_eos=False, eos_token_id=tuple(range(2, 8)))
    until = torch.isin(whole[0], torch.arange(2, 8)).cummax(1).values.roll(1, 1)
    until[:, 0] = False
    width = ids.shape[1]
    assert (until[:, 1:].any(1)).sum() > 20
    for got, want in zip((ids, logprobs), whole, strict=True):
        assert torch.equal(got, want.masked_fill(until, 0)[:, :width])


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_fork_and_rewind(family):
    model = tiny_model(family)
    engine = native_engine(model)
    (ids,) = prompts(100)
    root = engine.prefill(ids)
    torch.testing.assert_close(root.hidden, forward(model, ids)[-1], rtol=0, atol=1e-5)

    def grow(branch, text, added):
        for token in added:
            hidden = engine.step([branch], torch.tensor([token]))[0]
        want = forward(model, text + added)[-1]
        torch.testing.assert_close(hidden, want, rtol=0, atol=1e-5)
        assert branch.length == len(text) + len(added)
        return text + added

    trunk, early = engine.fork(root), engine.fork(root, at=31)
    assert early.hidden is None and trunk.hidden is root.hidden
    text = grow(trunk, ids, prompts(90)[0])
    grow(early, ids[:31], [7, 8, 9])
    leaves = [engine.fork(trunk, at=n) for n in (100, 130, 190)]
    engine.rewind(trunk, 120)
    grow(trunk, text[:120], [4, 5, 6])  # the leaves keep what they read
    for leaf, n in zip(leaves, (100, 130, 190), strict=True):
        grow(leaf, text[:n], [11, 12])
    both = engine.step([trunk, leaves[1]], torch.tensor([9, 9]))
    alone = forward(model, [*text[:130], 11, 12, 9])[-1]
    torch.testing.assert_close(both[1], alone, rtol=0, atol=1e-5)
    for at in (0, 101):
        with pytest.raises(ValueError, match=f"at={at} must lie in"):
            engine.fork(root, at)
    del root, trunk, early, leaves


def test_branches_need_the_weights_they_were_made_under():
    model = tiny_model("llama")
    engine = native_engine(model)
    branch = engine.prefill([3, 4])
    assert engine.weight_version == branch.weight_version == 0
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="weight_version=0, the weights are of 1"):
        engine.step([branch], torch.tensor([5]))
    fresh = engine.prefill([3, 4])
    torch.testing.assert_close(fresh.hidden, forward(model, [3, 4])[-1], rtol=0, atol=1e-5)
    model.model.layers[0].mlp.up_proj.weight.data = torch.randn(100, 48)  # moved, not written
    assert engine.weight_version == 2
    moved = engine.prefill([3, 4])
    torch.testing.assert_close(moved.hidden, forward(model, [3, 4])[-1], rtol=0, atol=1e-5)
    engine.weights_changed()
    assert engine.weight_version == 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # writes past autograd
    model(torch.tensor([[3, 4]])).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    assert engine.weight_version == 4


def test_weights_without_memory_have_a_fingerprint():
    layer = torch.nn.Linear(64, 64)
    layer.weight.data.untyped_storage().resize_(0)
    before = fingerprint(layer)
    with torch.no_grad():
        layer.bias.data.add_(1)
    assert fingerprint(layer) != before


def test_what_is_not_known_is_refused():
    def refuse(model, why):
        with pytest.raises(UnsupportedModel, match=why):
            Decoder(model)

    model = tiny_model("llama")
    model.model.norm.double()
    refuse(model, "norm.weight is torch.float64, the embedding torch.float32")
    model = tiny_model("qwen3")
    up = model.model.layers[1].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.detach().T.contiguous().T)
    refuse(model, "up_proj.weight is not stored row by row")
    refuse(tiny_model("llama", hidden_act="relu"), "its activation is relu")
    refuse(tiny_model("llama").double(), "its parameters are torch.float64")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    refuse(tiny_model("llama", rope_parameters=rope), "dynamic angles depend on the length")
    model = tiny_model("llama")
    model.model.layers[0].mlp.gate_proj = torch.nn.Sequential(model.model.layers[0].mlp.gate_proj)
    refuse(model, "a projection of another type")


def test_bad_steps_are_named():
    engine = native_engine(tiny_model("llama", max_position_embeddings=8))
    a, b = engine.prefill([3]), engine.prefill([3] * 8)
    for branches, tokens, message in (
        ([a], torch.tensor([1, 2]), r"shape \[1\]"),
        ([], torch.tensor([], dtype=torch.int64), "at least one branch"),
        ([a], torch.tensor([1.0]), "must be int64"),
        ([a, a], torch.tensor([1, 2]), "a branch twice"),
        ([a], torch.tensor([VOCAB]), "outside the vocabulary"),
        ([a, b], torch.tensor([1, 2]), "context of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.step(branches, tokens)
    assert (a.length, b.length) == (1, 8)


def test_sampling_from_a_branch_is_what_generate_does():
    engine = native_engine(tiny_model("qwen2"))
    sampling = SamplingParams(max_new_tokens=5, seed=9, **FREE)
    (ids,) = prompts(12)
    want = engine.generate([ids], 4, sampling)
    from fastrl.rollout.generation import row_seeds

    root = engine.prefill(ids)
    branches = [root.fork() for _ in range(4)]
    hidden = root.hidden.repeat(4, 1)
    seeds = row_seeds(9, torch.arange(4))
    for i in range(5):
        drawn = engine.sample(hidden, sampling, seeds=seeds, positions=torch.full((4,), i))
        assert torch.equal(drawn.token, want.completion_ids[:, i])
        assert torch.equal(drawn.logprob, want.logprobs[:, i])
        hidden = engine.step(branches, drawn.token)


def test_every_instruction_set():
    code = (
        "import test_decode as t\n"
        "for family in ('gemma2', 'qwen3'):\n"
        "    t.test_log_probs_equal_the_trainers(family)\n"
        "t.test_hidden_states_equal_the_forward('qwen2', t.torch.bfloat16)\n"
        "t.test_a_rows_bits_are_its_own('gemma2', t.torch.bfloat16, None)\n"
        "print('as it should be')"
    )
    for isa in native.module().cpu_isas():
        if isa != native.module().isa():
            assert "as it should be" in gpu_proof.run_python(code, FASTRL_ISA=isa)
