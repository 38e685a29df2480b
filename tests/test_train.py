"""The trainer: what a run leaves behind, exact resumption, failures that lose nothing."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from runs import same, steady, weights
from safetensors.torch import load_file

from fastrl import train
from fastrl.kernels import native
from fastrl.models import load_model
from fastrl.rollout import RolloutEngine, SamplingParams
from fastrl.train import (
    CheckpointError,
    ConfigError,
    TrainingError,
    checkpoints,
    loop,
    parse_config,
    tracking,
)
from fastrl.train.algorithms import Context, demonstrations
from fastrl.train.algorithms.demonstrations import sft
from fastrl.train.optimizer import Optimizer
from fastrl.train.report import summarise, write_report
from fastrl.train.tracking import read_jsonl
from fastrl.train.update import accumulate, merge


def test_a_run_and_what_it_leaves(recipe, tmp_path):
    run = train.run(parse_config(recipe), tmp_path / "run")
    assert train.load_recipe(str(run / "config.yaml")) == parse_config(recipe)
    rows = read_jsonl(run / "metrics.jsonl")
    assert [(r["step"], r["stage"], r["stage_step"]) for r in rows] == [
        (i + 1, s, n + 1)
        for i, (s, n) in enumerate((s, n) for s in ("sft", "grpo") for n in range(3))
    ]
    assert {"loss", "nll", "grad_norm", "lr"} <= rows[0].keys()
    assert {"reward", "mismatch_mean", "mismatch_max", "mismatch_k3", "clip_fraction"} <= rows[
        3
    ].keys()
    assert rows[3]["mismatch_max"] < 1e-5
    assert [r["stage_step"] for r in rows if "eval/accuracy" in r] == [2, 3, 2, 3]
    assert all(0 <= r["eval/accuracy"] <= 1 for r in rows if "eval/accuracy" in r)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]
    samples = read_jsonl(run / "samples.jsonl")
    assert {"step", "stage", "kind", "prompt", "completion", "reward"} == samples[0].keys()
    model = load_model(str(run / "final"))
    out = RolloutEngine(model).generate([[4, 5]], 1, SamplingParams(max_new_tokens=4))
    assert len(out.completion_lists()[0]) >= 1
    page = write_report(run).read_text()
    assert "data:image/png;base64," in page and "eval" not in page[:100]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [row[0] for row in summarise(run)] == ["sft", "grpo"]
    assert not list(run.rglob("*.partial"))


def test_sft_learns_and_is_reproducible(recipe, tmp_path):
    recipe["stages"] = {"sft": {"steps": 40, "batch_size": 32, "optimizer": {"lr": 1e-2}}}
    first = train.run(parse_config(recipe), tmp_path / "a")
    rows = steady(first)
    assert rows[-1]["nll"] < 0.6 * rows[0]["nll"]
    second = train.run(parse_config(recipe), tmp_path / "b")
    assert same(weights(first), weights(second)) and rows == steady(second)
    other = train.run(parse_config(recipe | {"seed": 1}), tmp_path / "c")
    assert not same(weights(first), weights(other))


def test_grpo_learns(recipe, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_test.py").write_text(
        "def threes(prompts, completions): return [c.count('3') / max(len(c), 1) for c in "
        "completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe["rewards"] = [{"function": "rewards_of_test:threes"}]
    recipe["stages"] = {
        "grpo": {
            "steps": 30,
            "prompts_per_step": 8,
            "group_size": 8,
            "optimizer": {"lr": 1e-2},
            "updates_per_batch": 2,
            "eval_every": 30,
        }
    }
    rows = steady(train.run(parse_config(recipe), tmp_path / "run"))
    assert rows[0]["reward"] < 0.3 and rows[-1]["reward"] > 0.8
    assert any(r["approx_kl"] > 0 for r in rows)


def test_a_step_logs_the_mean_over_its_updates(recipe, tmp_path, monkeypatch):
    taken = []

    def apply(*args, **kwargs):
        figures, finite = real(*args, **kwargs)
        taken.append(figures)
        return figures, finite

    real = loop.apply
    monkeypatch.setattr(loop, "apply", apply)
    size = {"prompts_per_step": 8, "group_size": 8, "updates_per_batch": 3, "steps": 1}
    recipe["stages"] = {"grpo": size | {"optimizer": {"lr": 1e-2}}}
    (row,) = steady(train.run(parse_config(recipe), tmp_path / "run"))
    assert len(taken) == 3 and taken[0]["approx_kl"] < taken[2]["approx_kl"]
    for name in taken[0]:
        values = [figures[name] for figures in taken]
        want = max(values) if name.endswith("_max") else sum(values) / 3
        assert row[name] == pytest.approx(want, rel=1e-9), name


def test_merged_metrics():
    steps = [{"loss": 1.0, "ratio_max": 3.0, "reward": 5.0}, {"loss": 4.0, "ratio_max": 2.0}]
    assert merge(steps) == {"loss": 2.5, "ratio_max": 3.0, "reward": 5.0}


@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_micro_batches_do_not_change_a_step(recipe, micro_batch_size):
    setup = loop.prepare(parse_config(recipe))
    stage = setup.config.stages["sft"]
    (update,) = sft(Context(setup, stage, seed=0), 0)

    def gradients(size):
        optimizer = Optimizer(setup.policy, stage.optimizer, 1)
        metrics = accumulate(update.batch, update.loss, size, [optimizer])
        return metrics, [p.grad.clone() for p in setup.policy.parameters()]

    whole, want = gradients(64)
    split, got = gradients(micro_batch_size)
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert split["nll"] == pytest.approx(whole["nll"], rel=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_non_finite_steps_are_skipped_counted_and_saved(recipe, tmp_path, monkeypatch):
    recipe["stages"] = {"sft": {"steps": 8, "batch_size": 8, "optimizer": {"lr": 1e-2}}}
    real = demonstrations.demonstration_loss
    calls = []

    def poisoned(model, stage, batch):
        loss, metrics = real(model, stage, batch)
        calls.append(1)
        return (loss * float("nan") if len(calls) in bad else loss), metrics

    monkeypatch.setattr(demonstrations, "demonstration_loss", poisoned)
    bad = {2, 3, 5}
    run = train.run(parse_config(recipe), tmp_path / "a")
    assert [r["skipped"] for r in steady(run)] == [0, 1, 2, 2, 3, 3, 3, 3]
    assert all(torch.isfinite(w).all() for w in weights(run).values())
    report = json.loads((run / "skipped-step-3.json").read_text())
    assert (
        report["loss"] == "nan"
        and len(report["samples"]) == 8
        and "=" in report["samples"][0]["prompt"]
    )
    calls.clear()
    bad = {4, 5, 6}
    with pytest.raises(TrainingError, match="3 steps in a row had a non-finite loss"):
        train.run(parse_config(recipe), tmp_path / "b")
    kept = load_file(checkpoints.latest(tmp_path / "b") / "policy.safetensors")
    assert all(torch.isfinite(w).all() for w in kept.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": [{"function": "nowhere:f"}]}, ValueError, "cannot import 'nowhere'"),
        ({"rewards": [{"function": "bad_rewards:none"}]}, ValueError, "returned a NoneType"),
        ({"rewards": [{"function": "bad_rewards:one"}]}, ValueError, "it returned 1 values"),
        ({"rewards": [{"function": "bad_rewards:nan"}]}, ValueError, "it returned nan"),
        ({"max_completion_length": 40}, ValueError, "more than the model's context of 32"),
        ({"trackers": ["wandb"]}, ConfigError, "'wandb' is not installed; pip install wandb"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    recipe, tmp_path, change, error, message, monkeypatch
):
    (tmp_path / "bad_rewards.py").write_text(
        "def none(prompts, completions): return None\n"
        "def one(prompts, completions): return [1.0]\n"
        "def nan(prompts, completions): return [float('nan')] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    with pytest.raises(error, match=message):
        train.run(parse_config(recipe | change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_left_alone(recipe, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        train.run(parse_config(recipe), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_bfloat16_leaves_rotary_frequencies_in_float32(recipe):
    recipe["model"]["dtype"] = "bfloat16"
    model = loop.prepare(parse_config(recipe)).policy
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_an_automatic_dtype_is_one_that_the_device_multiplies(recipe, tmp_path, monkeypatch):
    recipe["model"]["dtype"] = "auto"
    for fast, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(native, "multiplies_bf16", lambda device, fast=fast: fast)
        setup = loop.prepare(parse_config(recipe))
        assert setup.config.model.dtype == dtype
        assert {p.dtype for p in setup.policy.parameters()} == {getattr(torch, dtype)}
    run = train.run(parse_config(recipe), tmp_path / "run")
    again = train.load_recipe(str(run / "config.yaml"))  # what a resumed run reads
    assert again.model.dtype == "float32"


def test_weights_that_are_not_finite_are_never_saved(recipe, tmp_path, monkeypatch):
    def ruin(self, step):
        self.masters[0].data.fill_(float("nan"))
        return 0.0

    monkeypatch.setattr(Optimizer, "step", ruin)
    with pytest.raises(TrainingError, match=r"left .* with NaN or infinity, so it is not saved"):
        train.run(parse_config(recipe | {"save_every": 1}), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_saved_model_is_a_starting_point(recipe, tmp_path):
    first = train.run(parse_config(recipe), tmp_path / "a")
    recipe["model"] = {"path": str(first / "final")}
    recipe["stages"] = {"grpo": recipe["stages"]["grpo"]}
    second = train.run(parse_config(recipe), tmp_path / "b")
    assert weights(first).keys() == weights(second).keys()
    assert read_jsonl(second / "metrics.jsonl")[-1]["step"] == 3


def test_a_console_that_is_no_terminal_gets_a_line_now_and_then(recipe, tmp_path, monkeypatch):
    recipe["stages"] = {"sft": {"steps": 4, "batch_size": 8, "eval_every": 4}}

    def shown(quiet):
        monkeypatch.setattr(tracking, "QUIET", quiet)
        console = Console(file=io.StringIO())
        train.run(parse_config(recipe), tmp_path / str(quiet), console)
        return re.findall(r"^  sft, step (\d)", console.file.getvalue(), re.MULTILINE)

    assert shown(0.0) == ["1", "2", "3", "4"] and shown(1e9) == ["4"]


def test_without_held_out_rows_the_figures_are_shown_all_the_same(recipe, tmp_path):
    recipe["data"]["reasoning_gym"]["eval_size"] = 0
    console = Console(file=io.StringIO())
    train.run(parse_config(recipe), tmp_path / "run", console)
    text = console.file.getvalue()
    lines = re.findall(r"^  (\w+, step \d): (\w+)", text, re.MULTILINE)
    sft, grpo = [[(f"{stage}, step {n}", first) for n in (2, 3)] for stage, first in
                 (("sft", "nll"), ("grpo", "reward"))]  # fmt: skip
    assert lines == sft + grpo
    assert "grpo, step 2, training" in text and "step 5" not in text  # the stage's step, not 5


def test_figures_of_a_step_are_of_that_step_and_stay_whole(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "QUIET", 0.0)
    config = parse_config(recipe)
    console = Console(file=io.StringIO())
    narrow = Console(file=io.StringIO(), force_terminal=True, width=40, color_system=None)
    metrics = {"reward": 0.5, "grad_norm": 3.0, "completion_length": 4.25, "seconds": 1.0}
    for shown in (console, narrow):
        with tracking.Tracker(tmp_path, config, 0, shown) as tracker:
            tracker.start_stage("grpo", config.stages["grpo"], 0)
            tracker.log(checkpoints.Progress(9, "grpo", 1), metrics | {"eval/accuracy": 0.25}, True)
            tracker.log(checkpoints.Progress(10, "grpo", 2), metrics, False)
    head, first, second = console.file.getvalue().splitlines()
    assert head == "grpo: steps 0 to 3"
    assert first == "  grpo, step 1: reward 0.5  completion_length 4.25  eval/accuracy 0.25"
    assert second == "  grpo, step 2: reward 0.5  completion_length 4.25"
    wrapped = "  grpo, step 1: reward 0.5\n    completion_length 4.25\n    eval/accuracy 0.25\n"
    assert wrapped in narrow.file.getvalue().replace("\r", "")


def test_tensorboard(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train.run(parse_config(recipe | {"trackers": ["tensorboard"]}), tmp_path / "run")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [r["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["stage"] == "sft"]
    assert [e.value for e in events.Scalars("sft/loss")] == pytest.approx(losses)
