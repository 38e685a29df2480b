"""Runs that were stopped, killed or ran out of disk go on to the same bits; damage is refused."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import same, steady, stop_and_resume, weights

from fastrl import installation, train
from fastrl.files import WriteError
from fastrl.train import CheckpointError, checkpoints, loop, parse_config
from fastrl.train.tracking import read_jsonl

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
    for stop_at in (1, 2, 5):
        folder = tmp_path / f"stopped{stop_at}"
        stop_and_resume(config, folder, stop_at, monkeypatch)
        assert same(weights(folder), weights(whole))
        assert steady(folder) == steady(whole)
        assert read_jsonl(folder / "samples.jsonl") == read_jsonl(whole / "samples.jsonl")


@pytest.fixture
def heeded():
    """SIGINT, which a shell makes its background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_ctrl_c_saves_the_step_under_way(recipe, tmp_path, stage, monkeypatch, capfd):
    config = parse_config(recipe | {"save_every": 100})
    whole = train.run(config, tmp_path / "whole")
    step, folder = loop._step, tmp_path / "a run"

    def pressed(work, progress, *rest):
        if (progress.stage, progress.stage_step) == (stage, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return step(work, progress, *rest)

    monkeypatch.setattr(loop, "_step", pressed)
    saved = {"sft": 2, "grpo": 5}[stage]
    with pytest.raises(train.Interrupted) as stopped:
        train.run(config, folder)
    assert str(stopped.value) == (
        f"stopped; last saved after step {saved} of the run; to go on: "
        f"{installation.program()} train --resume '{folder}'"
    )
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    assert checkpoints.read_progress(checkpoints.latest(folder)).step == saved
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(loop, "_step", step)
    train.resume(folder)
    assert f"after step {saved}" in " ".join(capfd.readouterr().out.split())
    assert same(weights(folder), weights(whole)) and steady(folder) == steady(whole)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_twice_stops_at_once_and_resuming_says_that_it_begins_anew(
    recipe, tmp_path, monkeypatch, capfd
):
    def pressed(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one raises")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", pressed)
        with pytest.raises(train.Interrupted, match=r"to begin anew: .* --resume \S+run$"):
            train.run(parse_config(recipe), folder)
    assert checkpoints.latest(folder) is None
    train.resume(folder)
    assert "anew: it has no checkpoint" in " ".join(capfd.readouterr().out.split())


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


def test_a_damaged_reference_is_refused(recipe, tmp_path, monkeypatch):
    config = variant(recipe, "kl")
    step = loop._step

    def stopping(work, progress, *rest):
        if progress.step == 5:
            raise KeyboardInterrupt
        return step(work, progress, *rest)

    monkeypatch.setattr(loop, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, tmp_path / "run")
    (tmp_path / "run" / "begin-grpo" / "policy.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"cannot read .*begin-grpo"):
        train.resume(tmp_path / "run")


def test_data_that_changed_is_noticed(recipe, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    recipe["data"] = {"train_file": str(path)}
    recipe["rewards"], recipe["stages"] = [], {"sft": {"steps": 1, "batch_size": 2}}
    run = train.run(parse_config(recipe), tmp_path / "run")
    train.resume(run)
    path.write_text('{"prompt": "1+1=", "completion": "3"}\n')
    with pytest.raises(CheckpointError, match=r"rows\.jsonl changed since the run began"):
        train.resume(run)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot go on"):
        train.resume(run)


@pytest.mark.parametrize("moments", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed(recipe, tmp_path, moments):
    kills(recipe, tmp_path, moments)


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
                WriteError, match=r"cannot write .*what was saved before is untouched"
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
    path = newest / "policy.safetensors"
    content = path.read_bytes()
    for broken, message in (
        (content[:-10], "is truncated: policy.safetensors"),
        (content[:-1] + bytes([content[-1] ^ 1]), "is damaged: policy.safetensors"),
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
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="delete that folder"):
        train.resume(run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a fastrl run"):
        train.resume(tmp_path / "empty")


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
