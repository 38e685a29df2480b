"""The training loop: checked settings in, a run folder out; read it from top to bottom."""

import json
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from fastrl.files import write_whole
from fastrl.train import checkpoints, parallel
from fastrl.train.algorithms import STEPS, stream_seed
from fastrl.train.begin import Work, add_scorers, begin, like_policy, save_final
from fastrl.train.checkpoints import Progress
from fastrl.train.config import Config
from fastrl.train.evaluate import evaluate
from fastrl.train.interrupts import interrupts
from fastrl.train.named import check_named
from fastrl.train.setup import Setup, prepare
from fastrl.train.tracking import Tracker
from fastrl.train.update import Update, apply, merge

MAX_SKIPPED = 3


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says why and where its samples are."""


def run(config: Config, out: Path | str | None = None, console: Console | None = None) -> Path:
    """Train as the recipe says; returns the run folder (default `runs/<name>-seed<seed>-<time>`).

    The folder holds config.yaml, metrics.jsonl, samples.jsonl, checkpoints/ and, at the end, final/
    (the policy in Hugging Face format) and final-NAME/ of each scoring model. Processes that
    torchrun started train together, and the first one writes; all have to see the folder. Raises
    `ConfigError`, `DataError`, `RewardError` or `ValueError` for settings that cannot work, before
    the folder is made; `CheckpointError` for a folder that exists, `WriteError` for a disk that is
    full; `TrainingError` after three non-finite steps in a row; `Interrupted` at Ctrl-C, after
    the step under way and with a checkpoint of it; at a second one, and of several processes, at
    once and without.
    """
    with parallel.processes():
        stamp = parallel.first(lambda: datetime.now().strftime("%Y%m%d-%H%M%S"))
        name = f"{config.name}-seed{config.seed}-{stamp}"
        folder = Path(out) if out is not None else Path("runs") / name
        if parallel.first(folder.exists):
            checkpoints.create_run(folder, config)  # raises: say so before loading anything
        check_named(config)
        setup = prepare(config)
        parallel.first(lambda: checkpoints.create_run(folder, setup.config))
        if parallel.rank() == 0:
            (console or Console()).print(f"run {folder}", highlight=False, soft_wrap=True)
        return _train(setup, folder, Progress(), None, console)


def resume(folder: Path | str, console: Console | None = None) -> Path:
    """Continue a run from its newest checkpoint, to the same bits as if it had never stopped.

    With another number of processes, to rounding.
    """
    folder = Path(folder)
    with parallel.processes():
        config = checkpoints.open_run(folder)
        checkpoints.check_inputs(folder, config)
        checkpoint = checkpoints.latest(folder)
        progress = Progress() if checkpoint is None else checkpoints.read_progress(checkpoint)
        if parallel.rank() == 0:
            where = f"after step {progress.step}" if checkpoint else "anew: it has no checkpoint"
            (console or Console()).print(f"run {folder} {where}", highlight=False, soft_wrap=True)
        setup = prepare(config)
        if checkpoint is not None:
            names = list(config.stages)
            for name in names[: names.index(progress.stage) + 1]:
                add_scorers(setup, config.stages[name])
            for name, network in setup.networks.items():
                weights = checkpoints.trainable(network)
                checkpoints.load_weights(weights, checkpoint / f"{name}.safetensors")
        return _train(setup, folder, progress, checkpoint, console)


def _train(
    setup: Setup, folder: Path, progress: Progress, checkpoint: Path | None, console: Console | None
) -> Path:
    config = setup.config
    with (
        interrupts(folder) as interrupted,
        Tracker(folder, config, progress.step, console) as tracker,
    ):
        names = list(config.stages)
        first = names.index(progress.stage) if progress.stage else 0
        for name in names[first:]:
            stage = config.stages[name]
            continued = name == progress.stage
            if not continued:
                progress = replace(progress, stage=name, stage_step=0, skipped_in_a_row=0)
            if progress.stage_step == stage.steps:
                continue
            work = begin(setup, stage, name, folder, checkpoint if continued else None)
            tracker.start_stage(name, stage, progress.stage_step)
            while progress.stage_step < stage.steps:
                progress = _step(work, progress, tracker, folder)
                done = progress.stage_step == stage.steps
                stop = interrupted()
                if done or stop or progress.step % config.save_every == 0:
                    _check_finite(setup, progress)
                    checkpoints.save(
                        folder, progress, work.weights(), work.optimizers, config.keep_checkpoints
                    )
                if stop:
                    raise KeyboardInterrupt
        for name, network in setup.networks.items():
            save_final(setup, name, network, folder)
    return folder


def _check_finite(setup: Setup, progress: Progress) -> None:
    bad = [
        f"{network}'s {name}"
        for network, model in setup.networks.items()
        for name, parameter in checkpoints.trainable(model).items()
        if not torch.isfinite(parallel.local(parameter)).all()
    ]
    for name in (name for names in parallel.gather(bad) for name in names):
        raise TrainingError(
            f"step {progress.step} left {name} with NaN or infinity, so it is not saved; a lower "
            "learning rate may help"
        )


def _step(work: Work, progress: Progress, tracker: Tracker, folder: Path) -> Progress:
    context, index = work.context, progress.stage_step
    setup, stage = context.setup, context.stage
    torch.manual_seed(stream_seed(context.seed, str(index)))
    _refresh(work, index)
    start, learning, tokens = time.perf_counter(), 0.0, 0.0
    finite, scored = True, None
    logged: list[dict[str, float]] = []
    for update in STEPS[type(stage)](context, index):
        begun = time.perf_counter()
        figures, finite = apply(
            update,
            work.optimizers,
            stage.micro_batch_size,
            index,
            shared_prefix=context.shared_prefix,
        )
        learning += time.perf_counter() - begun
        logged.append({**update.metrics, **figures})
        tokens = max(tokens, float(update.batch.completion_mask.sum()))
        scored = scored or update.scored
        if not finite:
            break
        if "policy" in update.networks:
            setup.engine.weights_changed()
    progress = _advance(progress, finite)
    elapsed = time.perf_counter() - start
    metrics = merge(logged) | {
        "skipped": float(progress.skipped),
        "seconds": elapsed,
        "rollout_seconds": elapsed - learning,
        "tokens_per_second": tokens / elapsed,
    }
    aloud = progress.stage_step % stage.eval_every == 0 or progress.stage_step == stage.steps
    if aloud:
        evaluated, shown = evaluate(context)
        metrics |= evaluated
        if shown is not None:
            tracker.samples(progress, "held out, greedy", shown)
        if scored is not None:
            tracker.samples(progress, "training", scored)
    tracker.log(progress, metrics, aloud)
    if not finite:
        _save_skipped(setup, update, figures, progress, folder)
    return progress


def _refresh(work: Work, index: int) -> None:
    """Where an iteration ends, the policy becomes its own reference."""
    context = work.context
    every = getattr(context.stage, "reference_every", None)
    if context.reference is None or every is None or index == 0 or index % every:
        return
    for name, parameter in like_policy(context.reference, context.setup.policy).items():
        parameter.copy_(checkpoints.trainable(context.setup.policy)[name])


def _advance(progress: Progress, finite: bool) -> Progress:
    return replace(
        progress,
        step=progress.step + 1,
        stage_step=progress.stage_step + 1,
        skipped=progress.skipped + (not finite),
        skipped_in_a_row=0 if finite else progress.skipped_in_a_row + 1,
    )


def _save_skipped(
    setup: Setup, update: Update, figures: dict[str, float], progress: Progress, folder: Path
) -> None:
    path = folder / f"skipped-step-{progress.step}.json"
    loss, norm = (figures[update.prefix + name] for name in ("loss", "grad_norm"))
    prompts, ids, mask = update.batch.completions
    rows = zip(prompts, ids.tolist(), mask.sum(-1).tolist(), strict=True)
    samples = [
        {"prompt": setup.tokenizer.decode(p), "completion": setup.tokenizer.decode(c[:n])}
        for p, c, n in rows
    ]
    report = {
        "network": ", ".join(update.networks),
        "loss": str(loss),
        "grad_norm": str(norm),
        "samples": samples,
    }
    parallel.first(lambda: write_whole(path, json.dumps(report, indent=1).encode()))
    if progress.skipped_in_a_row >= MAX_SKIPPED:
        raise TrainingError(
            f"{MAX_SKIPPED} steps in a row had a non-finite loss or gradient and were not applied "
            f"(step {progress.step}: loss {loss}, gradient norm {norm}). Their samples "
            f"are in {folder}/skipped-step-*.json; a lower learning rate may help"
        )
