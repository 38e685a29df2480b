"""Learning curves of recipes over seeds: what a method learns, and in how many seconds.

python -m fastrl.bench.learning arithmetic rloo ppo --seeds 0 1 2 --out runs/curves \\
    --set stages.{last}.steps=300 --json curves.json --plot curves.png

Trains each recipe with each seed, every run a process of one thread, `--jobs` at a time; runs that
are there already are read, and those that were cut off go on. The stages before the last are
trained once for all recipes that have them in common. In a setting `{last}` stands for the name of
a recipe's last stage. The file gains the recipes' figures, or has them replaced, and the figure
shows all that the file holds: the held-out greedy accuracy of the last stage, the mean over seeds
as a line and the smallest and largest as an area.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from fastrl.train.config import Config
from fastrl.train.recipe import dump_config, load_recipe
from fastrl.train.stages import Distillation

AVERAGED = 10  # steps at an end of a stage over which a metric of each step is averaged


@dataclass(frozen=True)
class Run:
    """A recipe with a seed and other settings, and the folder that it is trained in.

    With a `start` it goes on from that run's policy, and leaves out the stages that made it.
    """

    recipe: str
    seed: int
    settings: tuple[str, ...]
    folder: Path
    start: "Run | None" = None

    @property
    def overrides(self) -> list[str]:
        """All that differs from the recipe."""
        out = [f"seed={self.seed}", *self.settings]
        if self.start is not None:
            out += [f"stages.{name}=null" for name in self.start.config().stages]
            out += ["model.alphabet=null", "model.architecture=null"]
            out += [f"model.path={self.start.folder.absolute() / 'final'}"]
        return out

    def config(self) -> Config:
        return load_recipe(self.recipe, self.overrides)

    def train(self) -> None:
        """Train, or go on training; a run that is complete is left as it is."""
        if (self.folder / "final").is_dir():
            return
        command = [sys.executable, "-m", "fastrl", "train"]
        if self.folder.exists():
            command += ["--resume", str(self.folder)]
        else:
            command += [self.recipe, "--out", str(self.folder)]
            for setting in self.overrides:
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

    def history(self) -> list[dict]:
        """What was logged from the first stage on, whichever run trained it."""
        return (self.start.history() if self.start is not None else []) + self.metrics()


def last_stage(recipe: str) -> str:
    return list(load_recipe(recipe).stages)[-1]


def warm_start(recipe: str, seed: int, settings: tuple[str, ...], out: Path) -> Run | None:
    """The run of a recipe's stages before the last, the same for all recipes that share them.

    None where there are none, or where the last stage needs more of them than their policy.
    """
    config = load_recipe(recipe, settings)
    *before, last = config.stages
    stage = config.stages[last]
    learned = stage.reward_from not in (None, "functions") or stage.needs_earlier
    if not before or learned or (isinstance(stage, Distillation) and stage.teacher is None):
        return None
    settings = (*settings, f"stages.{last}=null")
    text = dump_config(load_recipe(recipe, [*settings, "name=start"]))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Run(recipe, seed, settings, out / f"{'-'.join(before)}-{digest}-seed{seed}")


def train_all(runs: Iterable[Run], jobs: int) -> None:
    """Train runs, `jobs` at a time; first those that others go on from."""
    runs = list(runs)
    if starts := {run.start.folder: run.start for run in runs if run.start is not None}:
        train_all(starts.values(), jobs)
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(run.train) for run in runs]:
            done.result()


def accuracy_curve(rows: list[dict]) -> list[tuple[int, float]]:
    """Steps of a stage and the held-out accuracy after them."""
    return [(m["stage_step"], m["eval/accuracy"]) for m in rows if "eval/accuracy" in m]


def learning(runs: list[Run], stage: str) -> dict:
    """What the last stage made of each seed: accuracy over steps, entropy at the end, seconds."""
    curves, entropies, seconds = [], [], []
    for run in runs:
        rows = run.metrics(stage)
        before = accuracy_curve([m for m in run.history() if m["stage"] != stage])
        curves.append([(0, a) for _, a in before[-1:]] + accuracy_curve(rows))
        entropies.append(mean(m["entropy"] for m in rows[-AVERAGED:]))
        seconds.append(sum(m["seconds"] for m in rows))
    seeds = [run.seed for run in runs]
    return {"seeds": seeds, "accuracy": curves, "entropy": entropies, "seconds": seconds}


def figure(curves: dict[str, list[list[tuple[int, float]]]]) -> Figure:
    """Accuracy over steps: for each name the mean over its seeds, and the range as an area."""
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
        ax.plot(steps, [mean(v) for v in values])
        seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
        ax.set_title(f"{name}, {seeds}", fontsize=10, loc="left")
        ax.grid(alpha=0.3)
    grid[0, 0].set_ylim(0, 100)
    out.supxlabel("step", fontsize=9)
    out.supylabel("held-out accuracy, %", fontsize=9)
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
    last = {recipe: last_stage(recipe) for recipe in options.recipes}
    runs: dict[str, list[Run]] = {recipe: [] for recipe in last}
    for seed in options.seeds:  # whoever stops early has all recipes of the first seeds
        for recipe, stage in last.items():
            settings = tuple(s.replace("{last}", stage) for s in options.set)
            start = warm_start(recipe, seed, settings, options.out)
            folder = options.out / f"{recipe}-seed{seed}"
            runs[recipe].append(Run(recipe, seed, settings, folder, start))
    train_all((r for some in zip(*runs.values(), strict=True) for r in some), options.jobs)
    report = {}
    if options.json is not None and options.json.exists():
        report = json.loads(options.json.read_text())
    for recipe, several in runs.items():
        report[recipe] = got = learning(several, last[recipe])
        final = [100 * curve[-1][1] for curve in got["accuracy"]]
        print(
            f"{recipe}: {' '.join(f'{a:.1f}' for a in final)} %, "
            f"{mean(got['seconds']):.0f} s of training"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        curves = {last_stage(recipe): got["accuracy"] for recipe, got in report.items()}
        figure(curves).savefig(options.plot, dpi=110)


if __name__ == "__main__":
    main()
