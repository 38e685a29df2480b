"""The rollout engine against Hugging Face generate, and its independence of batching."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastrl.kernels import GroupLayout, native
from fastrl.models import completion_logprobs
from fastrl.rollout import RolloutEngine, SamplingParams, generation

PROMPTS = ["1+2=", "12 - 7=", "3", "45 + 45 - 1="]


@pytest.fixture
def engine(model, tokenizer):
    return RolloutEngine(model, tokenizer)


def test_greedy_equals_generate(engine, model, tokenizer):
    out = engine.generate(PROMPTS, 2, SamplingParams(temperature=0, max_new_tokens=9))
    assert out.completion_ids.dtype == torch.int64 and out.completion_mask.dtype == torch.bool
    rows = out.completion_lists()
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        want = model.generate(
            ids, do_sample=False, max_new_tokens=9, eos_token_id=1, pad_token_id=0
        )
        want = want[0, ids.shape[1] :].tolist()
        assert rows[2 * i] == rows[2 * i + 1] == want


def test_sampler_and_trainer_agree(engine, model):
    sampling = SamplingParams(temperature=0.7, max_new_tokens=8, top_p=0.9, seed=3)
    out = engine.generate(PROMPTS, 4, sampling)
    again = completion_logprobs(
        model, out.prompt_ids, out.completion_ids, out.completion_mask, temperature=0.7
    )
    gap = (again.logprob - out.untruncated_logprobs)[out.completion_mask]
    assert gap.abs().max() < 1e-5
    assert (out.logprobs >= out.untruncated_logprobs)[out.completion_mask].all()
    assert out.layout.group_size == 4 and out.layout.prompt_lengths == (4, 7, 1, 12)
    assert list(out.layout.completion_lengths) == out.completion_mask.sum(-1).tolist()
    assert out.prompt_ids[0] is out.prompt_ids[3]


def test_a_row_depends_on_its_seed_alone(model, tokenizer):
    sampling = SamplingParams(max_new_tokens=6, seed=11)
    whole = RolloutEngine(model, tokenizer).generate(PROMPTS, 3, sampling).completion_lists()
    pieces = RolloutEngine(model, tokenizer, max_rows=2).generate(PROMPTS, 3, sampling)
    assert pieces.completion_lists() == whole
    assert len({tuple(r) for r in whole}) > 6
    other = SamplingParams(max_new_tokens=6, seed=12)
    assert RolloutEngine(model, tokenizer).generate(PROMPTS, 3, other).completion_lists() != whole


def test_stopping(engine, model, tokenizer):
    free = engine.generate(PROMPTS, 8, SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert free.completion_mask.all() and set(free.finish_reason) == {"length"}
    out = engine.generate(PROMPTS, 8, SamplingParams(max_new_tokens=12))
    for ids, reason in zip(out.completion_lists(), out.finish_reason, strict=True):
        assert (ids[-1] == tokenizer.eos_token_id) == (reason == "stop")
        assert tokenizer.eos_token_id not in ids[:-1]
    assert len(set(out.layout.completion_lengths)) > 1
    stop = SamplingParams(max_new_tokens=12, ignore_eos=True, stop=("1", "23"))
    texts = tokenizer.batch_decode(engine.generate(PROMPTS, 8, stop).completion_lists())
    reasons = engine.generate(PROMPTS, 8, stop).finish_reason
    for text, reason in zip(texts, reasons, strict=True):
        assert (reason == "stop") == text.endswith(("1", "23"))
        assert "1" not in text[:-1] and "23" not in text[:-1]


def test_weight_version_and_mode(engine, model):
    model.train()
    assert engine.generate(PROMPTS, 1, SamplingParams(max_new_tokens=1)).weight_version == 0
    engine.weights_changed()
    assert engine.generate(PROMPTS, 1, SamplingParams(max_new_tokens=1)).weight_version == 1
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is empty"),
        ("1+1=", {}, "got one string"),
        ([[]], {}, "prompt 0 is empty"),
        ([[5], [999]], {}, "prompt 1 holds token ids outside the vocabulary"),
        (["1" * 30], {}, "more than the model's context of 32"),
    ],
)
def test_bad_prompts_are_named(engine, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, 2, SamplingParams(max_new_tokens=4))


def test_bad_settings_are_named(engine, model):
    with pytest.raises(ValueError, match="group_size=0"):
        engine.generate(PROMPTS, 0)
    with pytest.raises(ValueError, match="max_rows=0"):
        RolloutEngine(model, max_rows=0)
    with pytest.raises(ValueError, match="need a tokenizer"):
        RolloutEngine(model).generate(["1"], 1, SamplingParams(max_new_tokens=1))
    for name, value in (
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("max_new_tokens", 0),
        ("stop", "word"),
        ("stop", ("",)),
    ):
        with pytest.raises(ValueError, match=f"{name}="):
            SamplingParams(**{name: value})


def test_limits_of_each_prompt(engine):
    sampling = SamplingParams(max_new_tokens=9, ignore_eos=True, seed=2)
    free = engine.generate(PROMPTS, 3, sampling)
    out = engine.generate(PROMPTS, 3, sampling, max_new_tokens=[2, 9, 1, 4])
    assert out.layout.completion_lengths == (2,) * 3 + (9,) * 3 + (1,) * 3 + (4,) * 3
    assert set(out.finish_reason) == {"length"}
    for ids, all_ids in zip(out.completion_lists(), free.completion_lists(), strict=True):
        assert ids == all_ids[: len(ids)]
    for bad, message in (([1, 2], "holds 2 limits for 4 prompts"), ([1, 0, 1, 1], "at least 1")):
        with pytest.raises(ValueError, match=message):
            engine.generate(PROMPTS, 3, sampling, max_new_tokens=bad)


def test_group_stop(engine, model, tokenizer):
    sampling = SamplingParams(max_new_tokens=12, seed=4)
    free = engine.generate(PROMPTS, 6, sampling)
    asked = []

    def first_to_finish_wins(group):
        asked.append(group)
        return True

    out = engine.generate(PROMPTS, 6, sampling, group_stop=first_to_finish_wins)
    lengths = torch.tensor(out.layout.completion_lengths).view(4, 6)
    shortest = torch.tensor(free.layout.completion_lengths).view(4, 6).min(1, keepdim=True).values
    assert (lengths == shortest).all()
    assert {g.index for g in asked} <= set(range(4))
    for g in asked:
        rows = out.completion_lists()[6 * g.index : 6 * g.index + 6]
        assert g.completions == rows and any(g.finished) and not all(g.finished)
        reasons = out.finish_reason[6 * g.index : 6 * g.index + 6]
        assert [r == "pruned" for r in reasons] == [not f for f in g.finished]

    def drop_the_last(group):
        return [False] * 5 + [True]

    some = engine.generate(PROMPTS, 6, sampling, group_stop=drop_the_last)
    for i, (ids, whole) in enumerate(
        zip(some.completion_lists(), free.completion_lists(), strict=True)
    ):
        assert ids == (whole if i % 6 < 5 else whole[: len(ids)])
    assert "pruned" in some.finish_reason[5::6]
    with pytest.raises(ValueError, match="returned 2 values for a group of 6"):
        engine.generate(PROMPTS, 6, sampling, group_stop=lambda group: [True, False])
    with pytest.raises(ValueError, match="group_size=6 is more than max_rows=4"):
        RolloutEngine(model, tokenizer, max_rows=4).generate(
            PROMPTS, 6, sampling, group_stop=drop_the_last
        )


def test_groups_stay_whole_within_max_rows(model, tokenizer):
    sampling = SamplingParams(max_new_tokens=12, seed=4)
    stop = {"group_stop": lambda group: True}
    want = RolloutEngine(model, tokenizer).generate(PROMPTS, 6, sampling, **stop)
    got = RolloutEngine(model, tokenizer, max_rows=15).generate(PROMPTS, 6, sampling, **stop)
    assert got.completion_lists() == want.completion_lists()
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)


def test_waiting_groups_take_the_places_of_finished_rows(model, tokenizer, monkeypatch):
    sampling = SamplingParams(max_new_tokens=12, seed=4)
    prompts, limits = PROMPTS * 3, [12, 1, 3, 2] * 3
    want = RolloutEngine(model, tokenizer).generate(prompts, 2, sampling, max_new_tokens=limits)
    sizes, tokens = [], []
    put = generation.Completions.put

    def watched(out, at, drawn):
        sizes.append(len(at))
        tokens.append(drawn.total())
        put(out, at, drawn)

    monkeypatch.setattr(generation.Completions, "put", watched)
    engine = RolloutEngine(model, tokenizer, max_rows=5)
    got = engine.generate(prompts, 2, sampling, max_new_tokens=limits)
    assert torch.equal(got.completion_ids, want.completion_ids)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    assert got.finish_reason == want.finish_reason and got.prompt_ids == want.prompt_ids
    assert sum(tokens) == sum(got.layout.completion_lengths) and max(sizes) <= 5
    if engine.fallback_reason is None:  # else one batch after the other
        assert len(sizes) < 6 * max(got.layout.completion_lengths[0::8])


def test_a_call_that_made_one_draw_of_many_hands_on_every_rows_token():
    """As where a step takes longer than a call's patience: the tokens lie apart in memory."""
    room = torch.arange(12).view(3, 4)
    drawn = generation.Drawn(room[:, :1], room[:, :1], room[:, :1], torch.ones(3).long())
    assert drawn.last().tolist() == [0, 4, 8] and drawn.last().is_contiguous()


def test_layout_is_what_the_kernels_take(engine):
    out = engine.generate(PROMPTS, 3, SamplingParams(max_new_tokens=9, seed=1))
    assert isinstance(out.layout, GroupLayout)
    out.layout.check(sum(out.layout.prompt_lengths) + int(out.completion_mask.sum()))
    ragged = GroupLayout.from_lengths([4, 2], [[1, 2], [3]])
    assert ragged.prompt_lengths == (4, 2) and ragged.completion_lengths == (1, 2, 3)
    with pytest.raises(ValueError, match=r"no size in common, but \[1, 2\]"):
        _ = ragged.group_size


def test_progress(engine, capsys):
    sampling = SamplingParams(max_new_tokens=3, seed=4)
    want = engine.generate(PROMPTS, 2, sampling)
    assert capsys.readouterr().out == ""
    got = engine.generate(PROMPTS, 2, sampling, progress=True)
    assert "tokens/s" in capsys.readouterr().out
    assert torch.equal(got.completion_ids, want.completion_ids)


@pytest.mark.skipif(bool(native.why_missing), reason=native.why_missing)
def test_other_models_decode_through_their_forward_with_one_warning(model, tokenizer):
    sampling = SamplingParams(max_new_tokens=6, seed=4)
    want = RolloutEngine(model, tokenizer).generate(PROMPTS, 3, sampling)

    class Renamed(type(model)):
        pass

    def check(other, why):
        engine = RolloutEngine(other, tokenizer)
        with pytest.warns(RuntimeWarning, match=f"slower forward: .*{why}") as seen:
            got = engine.generate(PROMPTS, 3, sampling)
        assert len(seen) == 1 and why in engine.fallback_reason
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.generate(PROMPTS, 3, sampling, group_stop=lambda group: True)
        with pytest.raises(RuntimeError, match=f"need the native decoder: .*{why}"):
            engine.prefill("1+")
        return got

    other = copy.deepcopy(model)
    other.__class__ = Renamed
    got = check(other, "Renamed is not one of the known families")
    assert got.completion_lists() == want.completion_lists()
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    other = get_peft_model(copy.deepcopy(model), dora)
    got = check(other, "no plain LoRA but a DoraLinearVariant")
    assert got.completion_lists() == want.completion_lists()
    hooked = copy.deepcopy(model)
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, given, out: out * 1.5)
    check(hooked, "its hidden states differ")
