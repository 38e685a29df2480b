"""The rollout engine against Hugging Face generate, and its independence of batching."""

import pytest
import torch

from fastrl.models import completion_logprobs
from fastrl.rollout import RolloutEngine, SamplingParams

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
