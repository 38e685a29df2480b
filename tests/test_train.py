"""The trainer: what a run leaves behind, exact resumption, failures that lose nothing."""

import json
import multiprocessing
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastrl import train
from fastrl.models import load_model
from fastrl.rollout import RolloutEngine, SamplingParams
from fastrl.train import (
    CheckpointError,
    ConfigError,
    TrainingError,
    checkpoints,
    loop,
    parse_config,
)
from fastrl.train.config import Optimizer as OptimizerSettings
from fastrl.train.optimizer import Optimizer, learning_rate
from fastrl.train.report import summarise, write_report
from fastrl.train.tracking import read_jsonl


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steady(run: Path) -> list[dict]:
    clocks = ("seconds", "rollout_seconds", "tokens_per_second")
    return [
        {k: v for k, v in r.items() if k not in clocks} for r in read_jsonl(run / "metrics.jsonl")
    ]


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


@pytest.mark.parametrize("micro_batch_size", [1, 5])
def test_micro_batches_do_not_change_a_step(recipe, micro_batch_size):
    setup = loop.prepare(parse_config(recipe))
    examples = setup.train[:12]

    def gradients(size):
        stage = setup.config.stages["sft"]
        batch = loop.demonstrations(examples, stage, 5, setup.device)
        optimizer = Optimizer(setup.model, stage.optimizer, 1)
        metrics = loop.accumulate(setup.model, batch, loop.sft_step_loss, size, optimizer)
        return metrics, [p.grad.clone() for p in setup.model.parameters()]

    whole, want = gradients(64)
    split, got = gradients(micro_batch_size)
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert split["nll"] == pytest.approx(whole["nll"], rel=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


VARIANTS = {
    "plain": {},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "lora": {"model": {"lora": {"rank": 4, "dropout": 0.1}}},
    "kl": {
        "grpo": {
            "kl_coef": 0.1,
            "kl_estimator": "k3",
            "updates_per_batch": 2,
            "reduction": "dr_grpo",
        }
    },
    "checkpointing": {"model": {"gradient_checkpointing": True}, "grpo": {"top_p": 0.9}},
}


def variant(recipe, name):
    recipe["model"] |= VARIANTS[name].get("model", {})
    recipe["stages"]["grpo"] |= VARIANTS[name].get("grpo", {})
    return parse_config(recipe)


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_is_exact(recipe, tmp_path, name, monkeypatch):
    config = variant(recipe, name)
    whole = train.run(config, tmp_path / "whole")
    step = loop._step
    for stop_at in (1, 2, 5):
        folder = tmp_path / f"stopped{stop_at}"

        def stopping(setup, stage, progress, *rest, stop_at=stop_at):
            if progress.step == stop_at:
                raise KeyboardInterrupt
            return step(setup, stage, progress, *rest)

        monkeypatch.setattr(loop, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, folder)
        monkeypatch.setattr(loop, "_step", step)
        train.resume(folder)
        assert same(weights(folder), weights(whole))
        assert steady(folder) == steady(whole)
        assert read_jsonl(folder / "samples.jsonl") == read_jsonl(whole / "samples.jsonl")


def _run_or_resume(values, folder):
    torch.set_num_threads(1)
    if (folder / "config.yaml").is_file():
        train.resume(folder)
    else:
        train.run(parse_config(values), folder)


def kills(recipe, tmp_path, moments: int) -> None:
    """Kill a run at random moments, resume each time, compare with an undisturbed one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastrl.train", "peft", "reasoning_gym", "torch._dynamo"])
    recipe["stages"]["sft"]["steps"] = recipe["stages"]["grpo"]["steps"] = 40
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def go(folder: Path, seconds: float | None = None) -> bool:
        """Run or resume, killed after so many seconds; says whether it came to its end."""
        process = context.Process(target=_run_or_resume, args=(recipe, folder))
        process.start()
        process.join(seconds if seconds is not None else 300)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode == 0

    go(tmp_path / "warm")  # the first process waits for the server's imports
    start = time.perf_counter()
    assert go(whole)
    duration = time.perf_counter() - start
    chance = random.Random(0)
    while moments:
        if go(killed, duration * chance.uniform(0.1, 0.8)):
            # It came to its end first: check, and begin anew with the kills that are left.
            assert same(weights(killed), weights(whole))
            shutil.rmtree(killed)
        else:
            moments -= 1
            if killed.exists() and not (killed / "config.yaml").is_file():
                shutil.rmtree(killed)
    assert go(killed)
    assert same(weights(killed), weights(whole))
    assert steady(killed) == steady(whole)


def test_killed_twenty_times(recipe, tmp_path):
    kills(recipe, tmp_path, 20)


def test_non_finite_steps_are_skipped_counted_and_saved(recipe, tmp_path, monkeypatch):
    recipe["stages"] = {"sft": {"steps": 8, "batch_size": 8, "optimizer": {"lr": 1e-2}}}
    real = loop.sft_step_loss
    calls = []

    def poisoned(model, batch):
        loss, metrics = real(model, batch)
        calls.append(1)
        return (loss * float("nan") if len(calls) in bad else loss), metrics

    monkeypatch.setattr(loop, "sft_step_loss", poisoned)
    monkeypatch.setattr(loop, "evaluate", lambda *_: ({}, None))
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
    kept = load_file(checkpoints.latest(tmp_path / "b") / "model.safetensors")
    assert all(torch.isfinite(w).all() for w in kept.values())


def test_full_disk_keeps_the_previous_checkpoint(recipe, tmp_path):
    recipe["model"]["architecture"]["intermediate_size"] = 512
    config = parse_config(recipe | {"save_every": 1, "keep_checkpoints": 1})
    folder = tmp_path / "run"
    real, saves = checkpoints.save, []

    def save(*arguments):
        # From the second checkpoint on, no file may grow beyond 100 kB.
        if saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        saves.append(1)
        return real(*arguments)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "save", save)
            with pytest.raises(
                CheckpointError, match=r"cannot write .*what was saved before is untouched"
            ):
                train.run(config, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000001"]
    train.resume(folder)
    whole = train.run(config, tmp_path / "whole")
    assert same(weights(folder), weights(whole))


def test_damaged_checkpoints_are_refused(recipe, tmp_path):
    config = parse_config(recipe)
    run = train.run(config, tmp_path / "run")
    newest = checkpoints.latest(run)
    path = newest / "model.safetensors"
    content = path.read_bytes()
    for broken, message in (
        (content[:-10], "is truncated: model.safetensors"),
        (content[:-1] + bytes([content[-1] ^ 1]), "is damaged: model.safetensors"),
    ):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=message):
            train.resume(run)
    path.write_bytes(content)
    state = newest / "state.json"
    for text in ("{}", "not json", '{"format": "other"}'):
        state.write_text(text)
        with pytest.raises(CheckpointError, match="is not a fastrl checkpoint"):
            train.resume(run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a fastrl run"):
        train.resume(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": [{"function": "nowhere:f"}]}, ValueError, "cannot import 'nowhere'"),
        ({"max_completion_length": 40}, ValueError, "more than the model's context of 32"),
        ({"trackers": ["wandb"]}, ConfigError, "tracker 'wandb' is not installed"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    recipe, tmp_path, change, error, message
):
    if (
        "trackers" in change
        and loop.check_trackers
        and __import__("importlib").util.find_spec("wandb")
    ):
        pytest.skip("wandb is installed here")
    with pytest.raises(error, match=message):
        train.run(parse_config(recipe | change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_folder_is_left_alone(recipe, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        train.run(parse_config(recipe), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_vocabulary_and_checkpoint_of_another_model(recipe, tmp_path):
    small = recipe["model"]["architecture"] | {"vocab_size": 9}
    with pytest.raises(
        ValueError, match="tokenizer has 17 tokens but the model's vocabulary only 9"
    ):
        train.run(
            parse_config(recipe | {"model": recipe["model"] | {"architecture": small}}),
            tmp_path / "a",
        )
    run = train.run(parse_config(recipe), tmp_path / "b")
    recipe["model"]["architecture"]["hidden_size"] = 16
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(CheckpointError, match="holds the weights of another model"):
        train.resume(run)


def test_a_saved_model_is_a_starting_point(recipe, tmp_path):
    first = train.run(parse_config(recipe), tmp_path / "a")
    recipe["model"] = {"path": str(first / "final")}
    recipe["stages"] = {"grpo": recipe["stages"]["grpo"]}
    second = train.run(parse_config(recipe), tmp_path / "b")
    assert weights(first).keys() == weights(second).keys()
    assert read_jsonl(second / "metrics.jsonl")[-1]["step"] == 3


def test_tensorboard(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train.run(parse_config(recipe | {"trackers": ["tensorboard"]}), tmp_path / "run")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [r["loss"] for r in read_jsonl(run / "metrics.jsonl") if r["stage"] == "sft"]
    assert [e.value for e in events.Scalars("sft/loss")] == pytest.approx(losses)


def test_learning_rate_by_hand():
    settings = OptimizerSettings(lr=1.0, warmup_steps=2, final_lr_fraction=0.1)
    assert [learning_rate(settings, s, 12) for s in (0, 1, 2, 7)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.55]
    )
    linear = settings.model_copy(update={"schedule": "linear"})
    assert learning_rate(linear, 7, 12) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(settings.model_copy(update={"schedule": "constant"}), 11, 12) == 1.0


def test_bf16_updates_smaller_than_a_bf16_step_add_up():
    layer = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    settings = OptimizerSettings(lr=1e-4, schedule="constant", max_grad_norm=1e9)
    optimizer = Optimizer(layer, settings, 100)
    for step in range(100):
        optimizer.zero_grad()
        for _ in range(2):
            layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
            optimizer.collect()
        assert optimizer.masters[0].grad.dtype == torch.float32
        optimizer.clip()
        optimizer.step(step)
    assert layer.weight.float().mean().item() == pytest.approx(0.99, abs=4e-3)
