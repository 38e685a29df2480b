"""Learning curves of recipes over seeds: what a method learns, and in how many seconds.

python -m fastrl.bench.learning arithmetic rloo ppo --seeds 0 1 2 --out runs/curves \\
    --set stages.{last}.steps=300 --json curves.json --plot curves.png

Trains each recipe with each seed, every run a process of one thread, `--jobs` at a time; runs that
are there already are read, and those that were cut off go on. In a setting `{last}` stands for the
name of a recipe's last stage. The figure shows the held-out greedy accuracy of that stage, the mean
over seeds as a line and the smallest and largest as an area.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from fastrl.train.recipe import load_recipe


@dataclass(frozen=True)
class Run:
    """A recipe with a seed and other settings, and the folder that it is trained in."""

    recipe: str
    seed: int
    settings: tuple[str, ...]
    folder: Path

    def train(self) -> None:
        """Train, or go on training; a run that is complete is left as it is."""
        if (self.folder / "final").is_dir():
            return
        command = [sys.executable, "-m", "fastrl", "train"]
        if self.folder.exists():
            command += ["--resume", str(self.folder)]
        else:
            command += [self.recipe, "--out", str(self.folder)]
            for setting in (f"seed={self.seed}", *self.settings):
                command += ["--set", setting]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.folder.with_suffix(".log").open("a") as log:
            code = subprocess.run(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode
        if code:
            raise SystemExit(f"{' '.join(command)} failed; see {log.name}")

    def metrics(self, *stages: str) -> list[dict]:
        """What was logged, in all stages or in some."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [m for m in map(json.loads, lines) if not stages or m["stage"] in stages]


def train_all(runs: Iterable[Run], jobs: int) -> None:
    """Train runs, `jobs` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(run.train) for run in runs]:
            done.result()


def accuracy_curve(rows: list[dict]) -> list[tuple[int, float]]:
    """Steps of a stage and the held-out accuracy after them."""
    return [(m["stage_step"], m["eval/accuracy"]) for m in rows if "eval/accuracy" in m]


def figure(curves: dict[str, list[list[tuple[int, float]]]], title: str) -> Figure:
    """Accuracy over steps: for each name the mean of its runs, and the range as an area."""
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    out = Figure(figsize=(3.0 * columns, 2.3 * rows + 0.5), layout="constrained")
    grid = out.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax in grid.flat[len(curves) :]:
        ax.set_axis_off()
    for ax, (name, runs) in zip(grid.flat, curves.items(), strict=False):
        steps = [step for step, _ in runs[0]]
        values = list(zip(*([100 * a for _, a in run] for run in runs), strict=True))
        ax.fill_between(steps, [*map(min, values)], [*map(max, values)], alpha=0.25, linewidth=0)
        ax.plot(steps, [sum(v) / len(v) for v in values])
        ax.set_title(name, fontsize=10, loc="left")
        ax.grid(alpha=0.3)
    grid[0, 0].set_ylim(0, 100)
    out.supxlabel("step", fontsize=9)
    out.supylabel("held-out accuracy, %", fontsize=9)
    out.suptitle(title, x=0.01, ha="left", fontsize=10)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="the runs' folder")
    parser.add_argument("--set", action="append", default=[], help="a setting of every recipe")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    last = {recipe: list(load_recipe(recipe).stages)[-1] for recipe in options.recipes}
    runs = {
        recipe: [
            Run(
                recipe,
                seed,
                tuple(s.replace("{last}", stage) for s in options.set),
                options.out / f"{recipe}-seed{seed}",
            )
            for seed in options.seeds
        ]
        for recipe, stage in last.items()
    }
    train_all((run for several in runs.values() for run in several), options.jobs)
    report, curves = {}, {}
    for recipe, several in runs.items():
        stage = last[recipe]
        before = [
            accuracy_curve([m for m in run.metrics() if m["stage"] != stage])[-1:]
            for run in several
        ]
        curves[stage] = [
            [(0, start[0][1]), *accuracy_curve(run.metrics(stage))]
            if start
            else accuracy_curve(run.metrics(stage))
            for start, run in zip(before, several, strict=True)
        ]
        seconds = [sum(m["seconds"] for m in run.metrics(stage)) for run in several]
        report[recipe] = {"seeds": options.seeds, "accuracy": curves[stage], "seconds": seconds}
        final = [100 * curve[-1][1] for curve in curves[stage]]
        print(
            f"{recipe}: {' '.join(f'{a:.1f}' for a in final)} %, "
            f"{sum(seconds) / len(seconds):.0f} s of training"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        title = f"seeds {' '.join(map(str, options.seeds))}: mean, smallest and largest"
        figure(curves, title).savefig(options.plot, dpi=110)


if __name__ == "__main__":
    main()
