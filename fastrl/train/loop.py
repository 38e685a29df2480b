"""The training loop: checked settings in, a run folder out; read it from top to bottom."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from fastrl import losses, models
from fastrl.models import completion_logprobs
from fastrl.rollout import SamplingParams
from fastrl.train import checkpoints
from fastrl.train.batches import Batch, Scored, demonstrations, grpo_batch, sft_batch
from fastrl.train.checkpoints import Progress
from fastrl.train.config import GRPO, SFT, Config
from fastrl.train.optimizer import Optimizer
from fastrl.train.setup import Setup, prepare
from fastrl.train.tracking import Tracker

MAX_SKIPPED = 3


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says why and where its samples are."""


def run(config: Config, out: Path | str | None = None, console: Console | None = None) -> Path:
    """Train as the recipe says; returns the run folder (default `runs/<name>-seed<seed>-<time>`).

    The folder holds config.yaml, metrics.jsonl, samples.jsonl, checkpoints/ and, at the end, final/
    (the model in Hugging Face format). Raises `ConfigError`, `DataError`, `RewardError` or
    `ValueError` for settings that cannot work, before the folder is made; `CheckpointError` for a
    folder that exists or a disk that is full; `TrainingError` after three non-finite steps in a
    row.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (
        Path(out) if out is not None else Path("runs") / f"{config.name}-seed{config.seed}-{stamp}"
    )
    if folder.exists():
        checkpoints.create_run(folder, config)  # raises: say so before loading anything
    setup = prepare(config)
    checkpoints.create_run(folder, config)
    (console or Console()).print(f"run {folder}", highlight=False, soft_wrap=True)
    return _train(setup, folder, Progress(), None, console)


def resume(folder: Path | str, console: Console | None = None) -> Path:
    """Continue a run from its newest checkpoint, to the same bits as if it had never stopped."""
    folder = Path(folder)
    config = checkpoints.open_run(folder)
    checkpoints.check_inputs(folder, config)
    checkpoint = checkpoints.latest(folder)
    progress = Progress() if checkpoint is None else checkpoints.read_progress(checkpoint)
    setup = prepare(config)
    if checkpoint is not None:
        checkpoints.load_weights(setup.model, checkpoint / "model.safetensors")
    return _train(setup, folder, progress, checkpoint, console)


def _train(
    setup: Setup, folder: Path, progress: Progress, checkpoint: Path | None, console: Console | None
) -> Path:
    config = setup.config
    with Tracker(folder, config, progress.step, console) as tracker:
        names = list(config.stages)
        first = names.index(progress.stage) if progress.stage else 0
        for name in names[first:]:
            stage = config.stages[name]
            continued = name == progress.stage
            if not continued:
                progress = replace(progress, stage=name, stage_step=0, skipped_in_a_row=0)
            if progress.stage_step == stage.steps:
                continue
            reference = _reference(setup, stage, folder / f"reference-{name}", progress.stage_step)
            optimizer = Optimizer(setup.model, stage.optimizer, stage.steps)
            if continued and checkpoint is not None:
                checkpoints.load_optimizer(checkpoint, optimizer)
            tracker.start_stage(name, progress.stage_step, stage.steps)
            while progress.stage_step < stage.steps:
                progress = _step(setup, stage, progress, optimizer, reference, tracker, folder)
                done = progress.stage_step == stage.steps
                if done or progress.step % config.save_every == 0:
                    _check_finite(setup.model, progress)
                    checkpoints.save(
                        folder, progress, setup.model, optimizer, config.keep_checkpoints
                    )
        checkpoints.write_folder(
            folder / "final",
            lambda path: models.save_pretrained(setup.model, setup.tokenizer, path),
        )
    return folder


def _check_finite(model: nn.Module, progress: Progress) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise TrainingError(
                f"step {progress.step} left {name} with NaN or infinity, so it is not saved; "
                "a lower learning rate may help"
            )


def _step(
    setup: Setup,
    stage: SFT | GRPO,
    progress: Progress,
    optimizer: Optimizer,
    reference: nn.Module | None,
    tracker: Tracker,
    folder: Path,
) -> Progress:
    config, start, index = setup.config, time.perf_counter(), progress.stage_step
    seed = stream_seed(config.seed, progress.stage)
    torch.manual_seed(stream_seed(seed, str(index)))
    scored: Scored | None = None
    metrics: dict[str, float] = {}
    shared = setup.shared_prefix and isinstance(stage, GRPO)
    if isinstance(stage, SFT):
        batch = sft_batch(
            setup.train, stage, index, seed, config.max_completion_length, setup.device
        )
        updates = 1
    else:
        batch, scored, metrics = grpo_batch(
            setup.train,
            stage,
            index,
            seed,
            config.max_completion_length,
            setup.engine,
            setup.rewards,
            setup.tokenizer,
            reference,
            shared,
        )
        updates = stage.updates_per_batch
    sampled = time.perf_counter()
    finite = True
    for _ in range(updates):
        loss = sft_step_loss if isinstance(stage, SFT) else grpo_step_loss(stage, shared)
        metrics |= accumulate(
            setup.model, batch, loss, stage.micro_batch_size, optimizer, shared_prefix=shared
        )
        metrics["grad_norm"] = optimizer.clip()
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if not finite:
            break
        metrics["lr"] = optimizer.step(index)
        setup.engine.weights_changed()
    progress = _advance(progress, finite)
    elapsed = time.perf_counter() - start
    metrics |= {
        "skipped": float(progress.skipped),
        "seconds": elapsed,
        "rollout_seconds": sampled - start,
        "tokens_per_second": float(batch.completion_mask.sum()) / elapsed,
    }
    if progress.stage_step % stage.eval_every == 0 or progress.stage_step == stage.steps:
        evaluated, shown = evaluate(setup, stage)
        metrics |= evaluated
        if shown is not None:
            tracker.samples(progress.step, progress.stage, "held out, greedy", shown)
        if scored is not None:
            tracker.samples(progress.step, progress.stage, "training", scored)
    tracker.log(progress.step, progress.stage, progress.stage_step, metrics)
    if not finite:
        _save_skipped(setup, batch, progress, metrics, folder)
    return progress


def stream_seed(seed: int, name: str) -> int:
    """A 31-bit seed for a named stream of a run: stages and steps draw from unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def _advance(progress: Progress, finite: bool) -> Progress:
    return replace(
        progress,
        step=progress.step + 1,
        stage_step=progress.stage_step + 1,
        skipped=progress.skipped + (not finite),
        skipped_in_a_row=0 if finite else progress.skipped_in_a_row + 1,
    )


def _save_skipped(
    setup: Setup, batch: Batch, progress: Progress, metrics: dict[str, float], folder: Path
) -> None:
    path = folder / f"skipped-step-{progress.step}.json"
    rows = zip(
        batch.prompt_ids,
        batch.completion_ids.tolist(),
        batch.completion_mask.sum(-1).tolist(),
        strict=True,
    )
    samples = [
        {"prompt": setup.tokenizer.decode(p), "completion": setup.tokenizer.decode(c[:n])}
        for p, c, n in rows
    ]
    report = {
        "loss": str(metrics["loss"]),
        "grad_norm": str(metrics["grad_norm"]),
        "samples": samples,
    }
    checkpoints.write_whole(path, json.dumps(report, indent=1).encode())
    if progress.skipped_in_a_row >= MAX_SKIPPED:
        raise TrainingError(
            f"{MAX_SKIPPED} steps in a row had a non-finite loss or gradient and were not applied "
            f"(step {progress.step}: loss {metrics['loss']}, gradient norm "
            f"{metrics['grad_norm']}). Their samples "
            f"are in {folder}/skipped-step-*.json; a lower learning rate may help"
        )


Loss = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]


def sft_step_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of demonstrations."""
    out = completion_logprobs(model, batch.prompt_ids, batch.completion_ids, batch.completion_mask)
    return losses.sft_loss(out.logprob, batch.completion_mask, batch.weights)


def grpo_step_loss(stage: GRPO, shared_prefix: bool) -> Loss:
    """Loss and metrics of rollouts, with the mismatch between sampler and trainer."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.advantages is not None and batch.sampler_logprobs is not None
        logprobs = batch.logprobs(model, stage.temperature, shared_prefix=shared_prefix)
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        value, metrics = losses.policy_loss(
            logprobs,
            old,
            batch.advantages,
            batch.completion_mask,
            batch.weights,
            eps_low=stage.eps_low,
            eps_high=stage.eps_high,
            dual_clip=stage.dual_clip,
            ref_logprobs=batch.ref_logprobs,
            kl_coef=stage.kl_coef,
            kl_estimator=stage.kl_estimator,
        )
        gap = (old - batch.sampler_logprobs)[batch.completion_mask]
        metrics["mismatch_mean"] = gap.abs().mean()
        metrics["mismatch_k3"] = (torch.expm1(gap) - gap).mean()
        metrics["mismatch_max"] = gap.abs().max()
        return value, metrics

    return loss


def accumulate(
    model: nn.Module,
    batch: Batch,
    loss: Loss,
    micro_batch_size: int,
    optimizer: Optimizer,
    *,
    shared_prefix: bool = False,
) -> dict[str, float]:
    """Gradients of one optimizer step, a micro-batch at a time.

    Returns the loss and metrics of the whole batch.

    Rows that cannot contribute (no tokens; advantage zero and no reference) are left out: their
    gradient is exactly zero, while the weights of the others still count them.
    """
    optimizer.zero_grad()
    contributes = batch.completion_mask.any(-1)
    if batch.advantages is not None and batch.ref_logprobs is None:
        contributes &= batch.advantages != 0
    metrics: dict[str, float] = {}
    total, tokens = 0.0, float(batch.completion_mask[contributes].sum())
    kept = batch.select(torch.nonzero(contributes).squeeze(-1))
    for part in kept.micro_batches(micro_batch_size, shared_prefix=shared_prefix):
        value, figures = loss(model, part)
        value.backward()
        optimizer.collect()
        total += float(value.detach())
        share = float(part.completion_mask.sum()) / tokens
        for name, figure in figures.items():
            if name.endswith("_max"):
                metrics[name] = max(metrics.get(name, 0.0), float(figure))
            else:
                metrics[name] = metrics.get(name, 0.0) + share * float(figure)
    return {"loss": total, **metrics}


@torch.no_grad()
def evaluate(setup: Setup, stage: SFT | GRPO) -> tuple[dict[str, float], Scored | None]:
    """Held-out figures: reward and accuracy of greedy completions; for SFT the NLL.

    Accuracy is the share of completions that the first reward function gives at least 1.
    """
    metrics: dict[str, float] = {}
    scored = None
    if not setup.held_out:
        return metrics, scored
    setup.model.eval()
    limit = setup.config.max_completion_length
    if isinstance(stage, SFT) and all(e.completion_ids for e in setup.held_out):
        batch = demonstrations(setup.held_out, stage, limit, setup.device)
        parts = batch.micro_batches(stage.micro_batch_size)
        nll = sum(
            float(sft_step_loss(setup.model, p)[1]["nll"]) * int(p.completion_mask.sum())
            for p in parts
        )
        metrics["eval/nll"] = nll / int(batch.completion_mask.sum())
    if setup.rewards.functions:
        greedy = SamplingParams(
            temperature=0.0, max_new_tokens=limit, eos_token_id=setup.tokenizer.eos_token_id
        )
        rollouts = setup.engine.generate([e.prompt_ids for e in setup.held_out], 1, greedy)
        scored = setup.rewards.score_rollouts(setup.held_out, rollouts, setup.tokenizer)
        first = next(iter(scored.parts.values()))
        metrics["eval/reward"] = sum(scored.total) / len(scored.total)
        metrics["eval/accuracy"] = sum(s >= 1 - 1e-6 for s in first) / len(first)
    setup.model.train()
    return metrics, scored


def _reference(setup: Setup, stage: SFT | GRPO, folder: Path, stage_step: int) -> nn.Module | None:
    """A frozen copy of the policy as it was when the stage began.

    Parameters that never train are shared.
    """
    if not isinstance(stage, GRPO) or stage.kl_coef == 0:
        return None
    frozen = {id(p): p for p in setup.model.parameters() if not p.requires_grad}
    setup.model.zero_grad()  # gradients would be copied along
    reference = copy.deepcopy(setup.model, frozen)
    if stage_step == 0:
        checkpoints.write_folder(
            folder, lambda path: checkpoints.save_weights(setup.model, path / "model.safetensors")
        )
    else:
        checkpoints.load_weights(reference, folder / "model.safetensors")
    return reference.eval().requires_grad_(False)
