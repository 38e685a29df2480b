"""Data files, conversations, verifiable tasks and the order of batches."""

import json
import sys
from itertools import pairwise

import pytest

from fastrl import models
from fastrl.reward.reasoning_gym import make_flips, make_problems, ranking, verifier
from fastrl.train import DataError, load_recipe, parse_config
from fastrl.train.data import batch_indices, check_context, load_examples, read_rows

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def load(recipe, tokenizer, path, rows, eval_rows=None):
    recipe["data"] = {"train_file": str(write(path, rows))}
    if eval_rows is not None:
        recipe["data"]["eval_file"] = str(write(path.with_suffix(".eval.jsonl"), eval_rows))
    recipe["rewards"] = [{"function": "math:fsum"}]
    return load_examples(parse_config(recipe), tokenizer)


def test_json_lines(recipe, tokenizer, tmp_path):
    train, held_out = load(
        recipe,
        tokenizer,
        tmp_path / "t.jsonl",
        [{"prompt": "1+1=", "completion": "2", "level": 3}],
        [{"prompt": "2+2="}],
    )
    assert train[0].prompt_ids == tokenizer("1+1=")["input_ids"]
    assert train[0].completion_ids == [*tokenizer("2")["input_ids"], tokenizer.eos_token_id]
    assert train[0].columns == {"level": 3}
    assert held_out[0].completion_ids is None


def test_parquet(recipe, tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "t.parquet"
    datasets.Dataset.from_list([{"prompt": "1+1=", "completion": "2"}]).to_parquet(path)
    assert read_rows(path) == [{"prompt": "1+1=", "completion": "2"}]


def test_conversations(recipe, tmp_path):
    from fastrl.models import character_tokenizer

    tokenizer = character_tokenizer("0123456789+-= :;uas")
    tokenizer.chat_template = CHAT
    row = {
        "prompt": [{"role": "user", "content": "1+1="}],
        "completion": [{"role": "assistant", "content": "2"}],
    }
    train, _ = load(recipe, tokenizer, tmp_path / "t.jsonl", [row])
    assert tokenizer.decode(train[0].prompt_ids) == "u:1+1=;a:"
    assert tokenizer.decode(train[0].completion_ids) == "2;"
    with pytest.raises(DataError, match="row 1: completion must be a list of messages"):
        load(recipe, tokenizer, tmp_path / "u.jsonl", [row | {"completion": "2"}])
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        load(recipe, tokenizer, tmp_path / "u.jsonl", [row])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (
            [{"prompt": "1", "completion": "2"}, {"prompt": "1"}],
            "row 2: column 'completion' is missing",
        ),
        ([{"question": "1"}], "row 1: column 'prompt' is missing or empty; it has question"),
        ([{"prompt": "", "completion": "2"}], "row 1: column 'prompt' is missing or empty"),
        (
            [{"prompt": 5, "completion": "2"}],
            "row 1: prompt must be a string or a list of messages",
        ),
        ([{"prompt": "1", "completion": 2}], "row 1: completion must be a string"),
        ([{"prompt": "1x", "completion": "2"}], "row 1: the prompt holds characters"),
        ([{"prompt": "1", "completion": "123456"}], "row 1: the completion has 7 tokens"),
    ],
)
def test_bad_rows_are_named(recipe, tokenizer, tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load(recipe, tokenizer, tmp_path / "t.jsonl", rows)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "1"}\n\n{"prompt": \n')
    with pytest.raises(DataError, match=r"t\.jsonl, line 3: not JSON"):
        read_rows(path)
    path.write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=r"t\.jsonl, line 1: not JSON in UTF-8"):
        read_rows(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="line 1: must be a JSON object"):
        read_rows(path)


def test_one_special_token_for_everything(recipe, tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    single = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="<eos>", eos_token="<eos>"
    )
    rows = [{"prompt": "1", "completion": "2"}]
    train, _ = load(recipe, single, tmp_path / "t.jsonl", rows)
    assert train[0].completion_ids[-1] == single.eos_token_id


def test_prompts_that_do_not_fit(recipe, tokenizer, tmp_path):
    rows = [{"prompt": "1", "completion": "2"}, {"prompt": "1" * 30, "completion": "2"}]
    train, _ = load(recipe, tokenizer, tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match=r"t.jsonl, row 2: the prompt has 30 tokens.*context of 32"):
        check_context(train, 5, 32, "t.jsonl")
    check_context(train, 2, 32, "t.jsonl")
    recipe["max_prompt_length"] = 20
    with pytest.raises(
        DataError, match="row 2: the prompt has 30 tokens, more than max_prompt_length=20"
    ):
        load(recipe, tokenizer, tmp_path / "t.jsonl", rows)


def test_reasoning_gym_problems_and_verifier():
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train, held_out = make_problems("chain_sum", options, 300, 20, 0, "{expression}=")
    assert len(held_out) == len({r["prompt"] for r in held_out}) == 20
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert make_problems("chain_sum", options, 300, 20, 0, "{expression}=") == (train, held_out)
    assert all(eval(r["prompt"][:-1]) == int(r["completion"]) for r in train)
    score = verifier("chain_sum", options)
    entry, right = train[0]["entry"], train[0]["completion"]
    texts = [right, f" {right} ", f"so <answer>{right}</answer>", "x"]
    chat = [[{"role": "assistant", "content": t}] for t in texts]
    for completions in (texts, chat):
        got = score(prompts=[""] * 4, completions=completions, entry=[entry] * 4)
        assert got == [1.0, 1.0, 1.0, 0.0]


def test_rankings_fall_by_the_verifiers_grade():
    """In the recipe whose reward model fidelity is judged on; capitals are among its words."""
    gym = load_recipe("reward_model").data.reasoning_gym
    options = (gym.task, gym.options, 200, 50, gym.seed, gym.prompt, gym.ranked)
    train, held_out = make_problems(*options)
    assert gym.ranked == 8 and make_problems(*options) == (train, held_out)
    score = verifier(gym.task, gym.options)
    assert any(not r["completion"].islower() for r in train)
    for row in train + held_out:
        grades = score([""] * 8, row["ranked"], entry=[row["entry"]] * 8)
        assert grades[0] == 1 and all(better > worse for better, worse in pairwise(grades))
        assert all(a.isalpha() and len(a) == len(row["completion"]) for a in row["ranked"])


def test_rankings_by_kind():
    """Wrong characters are of the kinds that the answer has; short answers grow."""
    assert all(c.isdigit() or c == "-" for text in ranking("-12", 4, 0) for c in text)
    assert [len(text) for text in ranking("7", 4, 0)] == [1, 1, 2, 3]
    assert all(c.isdigit() or c == "=" for text in ranking("==", 3, 0) for c in text)
    assert ranking("aB", 2, 0)[1].isalpha() and ranking("aB", 2, 0)[1].lower() != "ab"


def test_a_share_of_training_rankings_is_the_wrong_way_round():
    rows = [{"prompt": str(i), "ranked": ["right", "wrong"]} for i in range(1000)]
    assert make_flips(rows, 0.0, 0) == rows
    assert all(row["ranked"] == ["wrong", "right"] for row in make_flips(rows, 1.0, 0))
    some = make_flips(rows, 0.3, 0)
    assert 250 < sum(row["ranked"][0] == "wrong" for row in some) < 350
    assert some == make_flips(rows, 0.3, 0) != make_flips(rows, 0.3, 1)
    small = ["data.reasoning_gym.size=40", "data.reasoning_gym.eval_size=20"]
    flipped, plain = (
        load_recipe("dpo", [*small, f"data.reasoning_gym.flips={share}"]) for share in (1.0, 0.0)
    )
    tokenizer = models.character_tokenizer(plain.model.alphabet)
    train, held_out = load_examples(flipped, tokenizer)
    as_they_are, held_out_too = load_examples(plain, tokenizer)
    assert [e.ranked_ids[::-1] for e in train] == [e.ranked_ids for e in as_they_are]
    assert held_out == held_out_too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "chain_sums"}, "task 'chain_sums' is unknown; did you mean 'chain_sum'"),
        ({"options": {"min_term": 2}}, "min_term"),
        ({"template": "{expresion}="}, "template '{expresion}=' does not fit.*fields: question"),
        ({"eval_size": 10_000, "size": 50}, "too few distinct problems"),
    ],
)
def test_bad_tasks_are_named(change, message):
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    arguments = {
        "task": "chain_sum",
        "options": options,
        "size": 10,
        "eval_size": 4,
        "seed": 0,
        "template": "{question}",
    }
    with pytest.raises(ValueError, match=message):
        make_problems(**(arguments | change))


def test_a_missing_reasoning_gym_comes_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    for need in (
        lambda: verifier("chain_sum", {}),
        lambda: make_problems("chain_sum", {}, 4, 0, 0, "{question}"),
    ):
        with pytest.raises(ValueError, match="extra gym: pip install reasoning-gym"):
            need()


def test_batches_use_every_row_once_per_epoch():
    drawn = [i for step in range(10) for i in batch_indices(10, 4, step, seed=3)]
    assert len(drawn) == 40
    for epoch in range(4):
        assert sorted(drawn[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert batch_indices(10, 4, 5, seed=3) == drawn[20:24]
    assert batch_indices(10, 4, 5, seed=4) != drawn[20:24]
    assert sorted(batch_indices(3, 7, 0, seed=0)[:3]) == [0, 1, 2]
