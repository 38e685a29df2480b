"""QuantizedRewardModel: Hugging Face's scores, the same bits in any batch, named errors."""

import pytest
import torch
from reward_models import CLASSES, pairs, tiny, truth
from transformers import AutoModelForSequenceClassification

from fastrl.kernels import native
from fastrl.models import character_tokenizer
from fastrl.reward import (
    Checkpoint,
    QuantizedRewardModel,
    score_completions,
)
from fastrl.reward.build import matches
from fastrl.reward.ensemble import combine
from fastrl.reward.pairs import Pair

needs_cpu = pytest.mark.skipif(
    native.unavailable("cpu", torch.device("cpu")) is not None,
    reason="the reference of attention does not promise the same bits",
)
PROMPTS, COMPLETIONS = pairs()


def load(model, scheme="float32", **arguments):
    return QuantizedRewardModel.from_pretrained(Checkpoint.of(model), scheme, **arguments)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("family", CLASSES)
def test_float32_is_hugging_faces(family, heads):
    model = tiny(family, num_labels=heads)
    want = truth(model, PROMPTS, COMPLETIONS)
    assert want.std(0).min() > 0.01
    got = load(model).score(PROMPTS, COMPLETIONS)
    assert got.dtype == torch.float32
    assert got.shape == ((len(PROMPTS),) if heads == 1 else (len(PROMPTS), heads))
    torch.testing.assert_close(got.view(want.shape), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "error"), [("bf16", 0.05), ("int8", 0.1), ("nf4", 0.8), ("int4", 0.9), ("fp8", 0.3)]
)
@pytest.mark.parametrize("family", CLASSES)
def test_schemes_are_within_their_error(family, scheme, error):
    """In units of the scores' spread; the bounds are some three times what was found."""
    model = tiny(family, num_labels=4)
    want = truth(model, PROMPTS, COMPLETIONS)
    got = load(model, scheme).score(PROMPTS, COMPLETIONS)
    found = ((got - want).square().mean().sqrt() / want.std()).item()
    assert 1e-5 < found < error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["int8", "nf4", "float32"])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma2"])
@needs_cpu
def test_bits_do_not_depend_on_the_batch(family, scheme, dtype):
    model = load(tiny(family, dtype, num_labels=2), scheme)
    want = model.score(PROMPTS, COMPLETIONS)
    alone = [model.score([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert torch.equal(torch.stack(alone), want)
    assert torch.equal(model.score(PROMPTS, COMPLETIONS, share_prompts=False), want)
    order = torch.randperm(len(PROMPTS)).tolist()
    mixed = model.score([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order])
    assert torch.equal(mixed, want[order])
    for budget in (1, 20, 45):  # groups in pieces
        model.batch_tokens = budget
        assert torch.equal(model.score(PROMPTS, COMPLETIONS), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@needs_cpu
def test_activations_have_the_precision_of_the_checkpoint(dtype):
    model, kinds = tiny(dtype=dtype), ("bf16", "float32")
    half, wide = (load(model, "int8", activations=x) for x in kinds)
    scores, want = (m.score(PROMPTS, COMPLETIONS) for m in (half, wide))
    assert scores.dtype == torch.float32 and not torch.equal(scores, want)
    assert (scores - want).norm() < 0.1 * want.norm()
    assert half.fingerprint() != wide.fingerprint()
    default = want if dtype == torch.float32 else scores
    assert torch.equal(load(model, "int8").score(PROMPTS, COMPLETIONS), default)
    of_scheme = {scheme: load(model, scheme).dtype for scheme in ("bf16", "float32")}
    assert of_scheme == {"bf16": torch.bfloat16, "float32": torch.float32}


@pytest.mark.parametrize("scheme", ["int8", "nf4", "float32"])
@pytest.mark.parametrize("heads", [1, 3])
@needs_cpu
def test_every_token_has_the_score_of_the_pair_that_ends_there(scheme, heads):
    model = load(tiny(num_labels=heads), scheme, batch_tokens=40)
    found = model.score_tokens(
        [Pair(tuple(p), tuple(c)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    )
    assert [len(x) for x in found] == [len(c) for c in COMPLETIONS]
    for prompt, completion, scores in zip(PROMPTS, COMPLETIONS, found, strict=True):
        cut = [completion[: i + 1] for i in range(len(completion))]
        assert torch.equal(scores, model.score([prompt] * len(cut), cut)) or not cut


def test_scores_of_tokens_are_hugging_faces():
    model = tiny(num_labels=2)
    found = load(model).score_tokens([Pair((3, 4, 5), (6, 7)), Pair((3, 4, 5), ())])
    hidden = model.base_model(torch.tensor([[3, 4, 5, 6, 7]])).last_hidden_state
    torch.testing.assert_close(found[0], model.score(hidden)[0, 3:].detach(), rtol=1e-5, atol=1e-5)
    assert found[1].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_cpu
def test_int8_bits_do_not_depend_on_threads(dtype):
    model, found = load(tiny("gemma2", dtype), "int8"), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(model.score(PROMPTS, COMPLETIONS))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_last_layer_computes_the_pooled_tokens_alone(monkeypatch):
    from fastrl.reward import linear

    rows = []
    product = linear.product
    monkeypatch.setattr(linear, "product", lambda x, *to: rows.append(len(x)) or product(x, *to))
    load(tiny()).score(PROMPTS, COMPLETIONS)
    tokens = 13 + 1 + 30 + sum(map(len, COMPLETIONS))  # each prompt once
    order = ["k", "v", "q", "o", "gate", "up", "down"]
    assert rows[: 2 * 7] == [tokens] * 14
    assert dict(zip(order, rows[14:], strict=True)) == {
        "k": tokens, "v": tokens, "q": 7, "o": 7, "gate": 7, "up": 7, "down": 7,
    }  # fmt: skip


def test_a_last_token_that_is_eos_and_pad_is_pooled():
    model = tiny(pad_token_id=1, eos_token_id=1)
    prompts, completions = [[5, 6], [5, 6], [5, 6, 1]], [[7, 1], [7], []]
    model.config.pad_token_id = None  # so that Hugging Face takes each row's last token
    want = truth(model, prompts, completions).squeeze(1)
    torch.testing.assert_close(load(model).score(prompts, completions), want, rtol=1e-5, atol=1e-5)
    assert want[0] != want[1]


def test_nothing_to_score():
    assert load(tiny()).score([], []).shape == (0,)
    assert load(tiny(num_labels=2)).score([], []).shape == (0, 2)


TEXT = "0123456789+-= "


def chatty():
    tokenizer = character_tokenizer(TEXT)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '=' if m['role'] == 'user' else '+' }}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}+{% endif %}"
    )
    return tokenizer


def test_texts_and_conversations_are_their_ids():
    tokenizer = chatty()
    model = load(tiny(), tokenizer=tokenizer)

    def ids(text):
        return tokenizer(text)["input_ids"]

    prompts, completions = ["1+2=", "1+2=", "7"], ["3", "", "-1"]
    want = model.score(list(map(ids, prompts)), list(map(ids, completions)))
    assert torch.equal(model.score(prompts, completions), want)
    messages = [[{"role": "user", "content": p}] for p in prompts]
    answers = [[{"role": "assistant", "content": c}] for c in completions]
    want = model.score([ids(f"={p}+") for p in prompts], list(map(ids, completions)))
    for given in (answers, completions):
        torch.testing.assert_close(model.score(messages, given), want, rtol=1e-5, atol=1e-6)


def test_the_whole_text_is_what_is_tokenised(tmp_path):
    """Where the last token of a prompt merges with a completion, the pair is as one text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(["abab cdcd abcd"] * 9, trainers.BpeTrainer(vocab_size=20))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    model = load(tiny(), tokenizer=tokenizer)
    assert (
        tokenizer("aba")["input_ids"] + tokenizer("b")["input_ids"]
        != tokenizer("abab")["input_ids"]
    )
    got = model.score(["aba", "aba"], ["b", " cd"])
    want = truth(tiny(), [tokenizer(t)["input_ids"] for t in ("abab", "aba cd")], [[], []])
    torch.testing.assert_close(got, want.squeeze(1), rtol=1e-5, atol=1e-5)


def outliers(model):
    """Some channels of every norm's output are large, as in large models."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] *= 60
            layer.post_attention_layernorm.weight[7] *= 60
            layer.self_attn.q_proj.weight[:, 3] /= 60
            layer.self_attn.k_proj.weight[:, 3] /= 60
            layer.self_attn.v_proj.weight[:, 3] /= 60
            layer.mlp.gate_proj.weight[:, 7] /= 60
            layer.mlp.up_proj.weight[:, 7] /= 60
    return model


def test_smoothing_undoes_outliers():
    model = outliers(tiny("qwen3", num_labels=4))
    want = truth(model, PROMPTS, COMPLETIONS)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    errors = [
        (load(model, "int8", smooth=smooth).score(PROMPTS, COMPLETIONS) - want).square().mean()
        for smooth in (None, texts)
    ]
    assert errors[1] < errors[0] / 9


@pytest.mark.parametrize("family", CLASSES)
def test_smoothing_changes_nothing_but_rounding(family):
    """With every layer kept in bf16 the smoothed model is the model."""
    model = tiny(family, num_labels=2)
    want = truth(model, PROMPTS, COMPLETIONS)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    smooth = load(model, "int8", keep_bf16=("layers",), smooth=texts)
    got = smooth.score(PROMPTS, COMPLETIONS)
    assert (got - want).square().mean().sqrt() < 0.05 * want.std()


def test_patterns_choose_layers():
    for pattern in ("layers.1", "mlp", "down_proj", "mlp.*", "layers.*.mlp", "l*.1.mlp.down_proj"):
        assert matches(pattern, "layers.1.mlp.down_proj"), pattern
    for pattern in ("layers.10", "ml", "proj", "layers.1.self_attn", "score"):
        assert not matches(pattern, "layers.1.mlp.down_proj"), pattern
    model = load(tiny(), "int8", keep_bf16=("down_proj",), skip=("score", "layers.0.self_attn"))
    held = {
        f"{layer.index}.{n}": getattr(x.weight, "dtype", "int8")
        for layer in model.layers
        for n, x in layer.linears.items()
    }
    assert held["0.mlp.down_proj"] == torch.bfloat16 and held["1.mlp.up_proj"] == "int8"
    assert held["0.self_attn.q_proj"] == torch.float32 and held["1.self_attn.q_proj"] == "int8"


def test_directories(tmp_path):
    model = tiny("qwen2", torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    character_tokenizer(TEXT).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    got = QuantizedRewardModel.from_pretrained(tmp_path, "int8")
    memory = load(model, "int8", tokenizer=got.tokenizer)
    assert torch.equal(got.score(["1+1"], ["=2"]), memory.score(["1+1"], ["=2"]))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    exact = QuantizedRewardModel.from_pretrained(tmp_path, "float32")
    want = truth(again.eval(), PROMPTS, COMPLETIONS).squeeze(1)
    torch.testing.assert_close(exact.score(PROMPTS, COMPLETIONS), want, rtol=1e-5, atol=1e-5)


# As a reward.


def test_ensembles_by_hand():
    scores = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert combine(scores, "mean").tolist() == [2.0, 0.0]
    assert combine(scores, "worst_case").tolist() == [1.0, 0.0]
    assert combine(scores, "uncertainty", 0.5).tolist() == [1.5, 0.0]  # the variance is 1
    assert combine(torch.tensor([4.0]), None).tolist() == [4.0]
    with pytest.raises(ValueError, match="has 2 heads; choose"):
        combine(scores, None)
    with pytest.raises(ValueError, match="ensemble='median' is unknown; use one of mean"):
        combine(scores, "median")


def test_as_reward_function():
    model = load(tiny(num_labels=2), "int8", tokenizer=chatty())
    function = model.as_reward_function(ensemble="worst_case", name="rm")
    assert function.__name__ == "rm"
    prompts, completions = ["1+2=", "1+2="], ["3", "4"]
    got = score_completions(function, "rm", prompts, completions, {"level": [1, 2]})
    assert got == model.score(prompts, completions).amin(1).tolist()
    with pytest.raises(ValueError, match="has 2 heads"):
        model.as_reward_function()


# In a recipe.


def test_a_recipe_names_a_reward_model(recipe, tmp_path):
    from fastrl.train import ConfigError, loop, parse_config

    path = tmp_path / "rm"
    tiny(num_labels=2).save_pretrained(path)
    character_tokenizer(TEXT).save_pretrained(path)
    reward = {"model": str(path), "scheme": "int8", "ensemble": "mean", "weight": 2.0}
    recipe["rewards"] += [reward]
    setup = loop.prepare(parse_config(recipe))
    rows = setup.train[:2]
    scored = setup.rewards.score(rows, ["1", "2"])
    model = QuantizedRewardModel.from_pretrained(path, "int8")
    want = model.score([e.prompt for e in rows], ["1", "2"]).mean(1).tolist()
    assert scored.parts["rm"] == want and len(scored.parts) == 2
    for change, message in (
        ({"ensemble": None}, "reward model .* has 2 heads"),
        ({"model": str(tmp_path / "no")}, "reward model .* is not a directory"),
        ({"model": None}, "give either function or model"),
        ({"function": "a:b"}, "give either function or model"),
        ({"model": None, "function": "a:b"}, "scheme, keep_bf16 and ensemble go with model"),
        ({"scheme": "int3"}, "scheme"),
    ):
        recipe["rewards"][1] = reward | change
        with pytest.raises(ConfigError, match=message):
            loop.prepare(parse_config(recipe))
