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


def test_doctor_names_every_op():
    from fastrl.kernels import IMPLEMENTATIONS

    result = fastrl("doctor")
    assert result.exit_code in (0, 1)
    for word in (*IMPLEMENTATIONS, "torch", "native kernels"):
        assert word in result.output


def test_a_mistake_in_a_recipe_is_told_before_torch_is_imported():
    code = """
import sys
from typer.testing import CliRunner
from fastrl.cli import app
result = CliRunner().invoke(app, ["train", "arithmetic", "--set", "sed=1"])
assert result.exit_code == 2 and "did you mean 'seed'" in result.output, result.output
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_quick_and_needs_no_torch():
    code = "import sys; from fastrl.cli import app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert fastrl("--help").exit_code == 0
