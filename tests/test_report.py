"""Every metric that a run logs is explained, and a report shows each curve once with its words."""

import re

import pytest
from conftest import TINY

from fastrl import train
from fastrl.train import parse_config
from fastrl.train.metrics import METRICS, entry
from fastrl.train.recipe import load_recipe
from fastrl.train.report import explain, panels, write_report
from fastrl.train.stages import FAMILIES
from fastrl.train.tracking import read_jsonl

STEP = {"step", "stage", "stage_step"}
SMALL = {
    "steps": 1,
    "batch_size": 4,
    "prompts_per_step": 4,
    "demonstrations_per_step": 4,
    "group_size": 2,
    "micro_batch_size": 64,
}


def logged(config, folder):
    """A finished run's rows, and the names of its metrics."""
    rows = read_jsonl(train.run(config, folder) / "metrics.jsonl")
    return rows, {name for row in rows for name in row} - STEP


def small(name):
    """A shipped recipe with a tiny model and tiny steps."""
    values = load_recipe(name).model_dump(mode="json", exclude_unset=True)
    values["model"]["architecture"] = TINY["model"]["architecture"]
    values["data"]["reasoning_gym"] |= {"size": 80, "eval_size": 4}
    for stage in values["stages"].values():
        stage |= {key: value for key, value in SMALL.items() if key in stage or key == "steps"}
    return parse_config(values)


# At least one of each family, and of those that log something of their own.
RECIPES = (
    *("afd", "arithmetic", "clip_cov", "dapo", "distillation", "dpo", "gail", "iqlearn"),
    *("iterated_dpo", "kto", "orpo", "ppo", "raft", "reward", "rpo", "spin"),
)


def test_recipes_of_all_families():
    stages = [s for name in RECIPES for s in load_recipe(name).stages.values()]
    assert {type(stage) for stage in stages} == set(FAMILIES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_metric_of_the_shipped_recipes_is_explained(name, tmp_path):
    _, names = logged(small(name), tmp_path / "run")
    assert {"loss", "grad_norm", "seconds"} <= names
    assert not {n for n in names if entry(n) not in METRICS}


def test_a_report_explains_each_curve_and_shows_it_once(recipe, tmp_path):
    rows, _ = logged(parse_config(recipe), tmp_path / "run")
    shown = panels(rows)
    order = ["eval/accuracy", "eval/nll", "reward", "reward_std", "zero_std_groups", "loss"]
    assert [name for name in shown if not name.startswith(("eval/rew", "reward/"))][:6] == order
    page = write_report(tmp_path / "run").read_text()
    figures = re.findall(r'<figure><img alt="(.*?)"\s.*?<figcaption>(.*?)</figcaption>', page, re.S)
    assert [name for name, _ in figures] == list(shown)
    assert all(text for _, text in figures) and "`" not in dict(figures)["approx_kl"]
    assert "exactly 0 with updates_per_batch: 1" in dict(figures)["approx_kl"]
    assert "<dt>skipped</dt><dd>Steps so far whose loss or gradient was NaN" in page


def test_curves_that_are_one_are_drawn_once():
    row = {"step": 1, "stage": "grpo", "stage_step": 1, "loss": 0.0, "skipped": 0.0, "own": 3.0}
    one = row | {"reward": 0.1, "reward/r": 0.1 + 1e-9, "eval/reward": 0.5, "eval/accuracy": 0.5}
    assert panels([one, row]) == {
        "eval/accuracy": ["eval/reward"],
        "reward": ["reward/r"],
        "loss": [],
        "own": [],
    }
    assert explain("reward", ["reward/r"]).endswith(
        "Healthy: rises, noisily. The same as reward/r."
    )
    assert explain("own", []) == ""
    two = one | {"reward/s": 0.9, "eval/accuracy": None}
    assert list(panels([two])) == ["eval/reward", "reward", "reward/s", "loss", "own"]
    assert list(panels([one, row | {"reward/r": 0.2}])) == [
        "eval/accuracy",
        "reward",
        "reward/r",
        "loss",
        "own",
    ]
