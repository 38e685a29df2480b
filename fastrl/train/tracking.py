"""What a run shows and records: JSON lines, a progress bar, tables, trackers."""

import json
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from fastrl import installation
from fastrl.files import write_whole
from fastrl.train import config as cfg
from fastrl.train import parallel
from fastrl.train.checkpoints import CheckpointError, Progress
from fastrl.train.rewards import Scored
from fastrl.train.stages import Stage

QUIET = 30.0  # seconds after which a console that shows no bar gets a line


def check_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker whose package is not installed."""
    packages = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
    for name in names:
        if find_spec(packages[name]) is None:
            raise cfg.ConfigError(
                f"tracker {name!r} is not installed; {installation.get(packages[name])}"
            )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line that a kill cut short is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Tracker:
    """Writes `metrics.jsonl` and `samples.jsonl` and shows progress on the console.

    Opened at step `done`, it first drops what was recorded after it, so that a resumed run has one
    history. Only the first of several processes writes and shows anything.
    """

    def __init__(self, folder: Path, config: cfg.Config, done: int, console: Console | None = None):
        chief = parallel.rank() == 0
        self.console = (console or Console()) if chief else Console(quiet=True)
        self.files = {}
        for name in ("metrics", "samples") if chief else ():
            path = folder / f"{name}.jsonl"
            kept = [r for r in read_jsonl(path) if r["step"] <= done]
            write_whole(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
            self.files[name] = path.open("a")
        names = config.trackers if chief else ()
        self.trackers = [_open_tracker(name, folder, config) for name in names]
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.headline: tuple[str, ...] = ()
        self.said = time.monotonic()

    def __enter__(self) -> "Tracker":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()
        for file in self.files.values():
            file.close()
        for tracker in self.trackers:
            tracker.close()

    def start_stage(self, name: str, stage: Stage, done: int) -> None:
        """A new bar for a stage."""
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.task = self.bars.add_task(name, total=stage.steps, completed=done, rate="", figures="")
        self.headline = stage.headline
        self.console.print(f"[bold]{escape(name)}[/bold]: steps {done} to {stage.steps}")

    def log(self, progress: Progress, metrics: dict[str, float], aloud: bool) -> None:
        """Record one step's metrics, non-finite ones as null; aloud, or after a while, in a line.

        The line has what the stage names its headline, and the held-out figures of this very step.
        """
        step, stage, stage_step = progress.step, progress.stage, progress.stage_step
        clean = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._write("metrics", {"step": step, "stage": stage, "stage_step": stage_step, **clean})
        for tracker in self.trackers:
            tracker.log(step, {f"{stage}/{k}": v for k, v in clean.items() if v is not None})
        shown = {k: metrics[k] for k in self.headline if k in metrics}
        rate = (
            f"{metrics['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in metrics else ""
        )
        if self.task is not None:
            self.bars.update(self.task, completed=stage_step, figures=_figures(shown), rate=rate)
        silent = self.bars.disable and time.monotonic() - self.said > QUIET
        if silent or aloud:
            self.said = time.monotonic()
            held_out = {k: v for k, v in metrics.items() if k.startswith("eval/")}
            self._line(f"  {stage}, step {stage_step}: ", shown | held_out)

    def _line(self, head: str, figures: Mapping[str, float]) -> None:
        """A name and its number stay together; what is no terminal gets one line, however long."""
        text = head + _figures(figures, within="\0")
        if self.console.is_terminal:
            width = max(self.console.width, 20)
            whole: Any = {"break_long_words": False, "break_on_hyphens": False}
            text = textwrap.fill(text, width, subsequent_indent="    ", **whole)
        text = text.replace("\0", " ")
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def samples(self, progress: Progress, kind: str, scored: Scored, shown: int = 4) -> None:
        """Record and show some completions with their rewards, spread over the batch."""
        step, stage = progress.step, progress.stage
        stride = max(len(scored.completions) // max(shown, 1), 1)
        title = f"{stage}, step {progress.stage_step}, {kind}"
        table = Table(title=escape(title), title_justify="left")
        for column in ("prompt", "completion", "reward"):
            table.add_column(column, overflow="fold")
        for i in list(range(0, len(scored.completions), stride))[:shown]:
            prompt, text, reward = scored.prompts[i], scored.completions[i], scored.total[i]
            row = {"step": step, "stage": stage, "kind": kind, "prompt": prompt, "completion": text}
            self._write("samples", row | {"reward": reward})
            table.add_row(escape(str(prompt)[-200:]), escape(text[:200]), f"{reward:.3g}")
        self.console.print(table)

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if name not in self.files:
            return
        try:
            self.files[name].write(json.dumps(row) + "\n")
            self.files[name].flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.files[name].name!r}: {error}") from error


def _figures(metrics: Mapping[str, float], within: str = " ") -> str:
    return "  ".join(f"{name}{within}{value:.4g}" for name, value in metrics.items())


class _TensorBoard:
    def __init__(self, folder: Path, config: cfg.Config):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Hosted:
    """wandb, or trackio, which has the same calls."""

    def __init__(self, module: Any, folder: Path, config: cfg.Config, **arguments: Any):
        self.module = module
        module.init(
            project="fastrl", name=folder.name, config=config.model_dump(mode="json"), **arguments
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.module.log(metrics, step=step)

    def close(self) -> None:
        self.module.finish()


def _open_tracker(name: str, folder: Path, config: cfg.Config) -> Any:
    if name == "tensorboard":
        return _TensorBoard(folder, config)
    if name == "wandb":
        import wandb

        return _Hosted(wandb, folder, config, dir=str(folder))
    import trackio

    return _Hosted(trackio, folder, config)
