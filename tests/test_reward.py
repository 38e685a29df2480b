"""Reward functions: found by import path, called as TRL calls them, checked."""

import pytest

from fastrl.reward import RewardError, load_reward_function, score_completions


def test_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions): return [len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    function = load_reward_function("my_rewards:length")
    assert score_completions(function, "length", ["a"], ["bcd"], {"level": [1]}) == [3.0]
    for path, message in (
        ("my_rewards", "must look like module:function"),
        ("my_rewardz:length", f"cannot import 'my_rewardz'.*working directory {tmp_path}"),
        ("my_rewards:width", "has no function 'width'$"),
        ("my_rewards:lenght", "has no function 'lenght'; did you mean 'length'"),
    ):
        with pytest.raises(RewardError, match=message):
            load_reward_function(path)


def test_columns_reach_the_function():
    def named(prompts, completions, level):
        return level

    def everything(prompts, completions, **columns):
        assert sorted(columns) == ["level", "other"]
        return columns["level"]

    columns = {"level": [1, 2], "other": [3, 4]}
    for function in (named, everything):
        assert score_completions(function, "f", ["a", "b"], ["c", "d"], columns) == [1.0, 2.0]


def test_a_function_that_raises_is_named():
    def needs_gold(prompts, completions, gold):
        return gold

    def looks_up(prompts, completions):
        return [{}[c] for c in completions]

    for function, message in (
        (needs_gold, "'f' raised TypeError.*gold.*given columns: none"),
        (looks_up, "'f' raised KeyError: 'c'.*the first of 1 completions: 'c'"),
    ):
        with pytest.raises(RewardError, match=message):
            score_completions(function, "f", ["a"], ["c"], {"level": [1]})
    with pytest.raises(RewardError, match="column named 'completions'"):
        anything = lambda **columns: [1.0]  # noqa: E731
        score_completions(anything, "f", ["a"], ["c"], {"completions": [1]})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "must return a list of 2 numbers.*it returned 1 values"),
        (None, "it returned a NoneType"),
        ("ab", "it returned 2 values"),
        ([1.0, None], "for completion 1 it returned None"),
        ([float("nan"), 1.0], "for completion 0 it returned nan"),
        ([1.0, float("inf")], "for completion 1 it returned inf"),
        (["1", "2"], "for completion 0 it returned '1'"),
    ],
)
def test_bad_results_are_named(result, message):
    with pytest.raises(RewardError, match=message):
        score_completions(lambda prompts, completions: result, "f", ["", ""], ["", ""], {})
