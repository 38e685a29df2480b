"""The command line, as a user types it."""

import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from fastrl.cli import app


def fastrl(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def path(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_train_resume_and_report(path, tmp_path):
    run = tmp_path / "run"
    result = fastrl("train", path, "--set", "stages.grpo.steps=2", "--out", run)
    assert result.exit_code == 0, result.output
    assert "completion" in result.output and "report.html" in result.output
    assert (run / "report.html").is_file() and (run / "final" / "config.json").is_file()
    result = fastrl("report", run)
    assert result.exit_code == 0 and "grpo" in result.output
    assert fastrl("train", "--resume", run).exit_code == 0
    result = fastrl("train", path, "--out", run)
    assert result.exit_code == 2 and "already exists" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "give a RECIPE"),
        (["train"], "or one of afd, airl, arithmetic,"),
        (["train", "dop"], "did you mean 'opo' or 'dpo'?"),
        (["train", "arithmetics"], "neither a file nor a shipped recipe"),
        (["train", "arithmetic", "--set", "sede=1"], "did you mean 'seed'"),
        (["train", "--resume", "nowhere"], "is not a fastrl run"),
        (["train", "--resume", "nowhere", "--set", "seed=1"], "--set and --out go with a recipe"),
        (["report", "nowhere"], "is not a fastrl run"),
    ],
)
def test_mistakes_are_named_without_a_traceback(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fastrl(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_every_model_that_was_trained_is_named(path, tmp_path):
    run = tmp_path / "run"
    stages = ["stages.sft=null", "stages.grpo=null", "stages.reward={steps: 1, batch_size: 4}"]
    result = fastrl("train", path, "--out", run, *(a for s in stages for a in ("--set", s)))
    assert result.exit_code == 0, result.output
    assert result.output.endswith(f"reward {run}/final-reward\nreport {run}/report.html\n")
    assert "\nmodel" not in result.output  # the policy, which it left as it was
    stages = ["stages.sft=null", "stages.ppo={steps: 1, prompts_per_step: 4}", "stages.grpo=null"]
    run = tmp_path / "ppo"
    result = fastrl("train", path, "--out", run, *(a for s in stages for a in ("--set", s)))
    assert f"model  {run}/final\ncritic {run}/final-critic\nreport" in result.output


def test_doctor_names_every_op():
    from fastrl.kernels import IMPLEMENTATIONS

    result = fastrl("doctor")
    assert result.exit_code in (0, 1)
    for word in (*IMPLEMENTATIONS, "torch", "native kernels"):
        assert word in result.output


def test_a_mistake_in_a_recipe_is_told_before_torch_is_imported(tmp_path):
    code = """
import sys
from typer.testing import CliRunner
from fastrl.cli import app
for settings, message in (
    (["arithmetic", "sed=1"], "did you mean 'seed'"),
    (["arithmetic", "rewards.0.function=reasoning_gm"], "be reasoning_gym; did you mean that?"),
    (["arithmetic", "rewards.0.function=no_rewards:score"], "in the working directory"),
    (["hf_grpo"], "prompts.jsonl' does not exist"),
    (["arithmetic", "model.tokenizer=./nowhere"], "model path './nowhere' is not a directory"),
    (["arithmetic", "model.tokenizer=runs/my/finl"], "not how names on the Hugging Face hub look"),
):
    settings = [settings[0], *(a for s in settings[1:] for a in ("--set", s))]
    settings += ["--set", "model.alphabet=null"] if "model.tokenizer" in settings[-1] else []
    result = CliRunner().invoke(app, ["train", *settings])
    assert result.exit_code == 2 and message in result.output, result.output
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_help_is_quick_and_needs_no_torch():
    code = "import sys; from fastrl.cli import app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert fastrl("--help").exit_code == 0
