"""A run's report: an HTML page with learning curves and completions, and a short table."""

import base64
import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastrl.files import write_whole
from fastrl.train.checkpoints import CheckpointError, open_run
from fastrl.train.recipe import dump_config
from fastrl.train.tracking import read_jsonl

# What a reader looks for first; the rest follows by name.
FIRST = (
    "eval/accuracy",
    "eval/reward",
    "eval/pair_accuracy",
    "reward",
    "loss",
    "eval/nll",
    "nll",
    "entropy",
    "completion_length",
    "kl",
)
LEFT_OUT = ("step", "stage", "stage_step", "skipped")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
color: #222 } table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem;
text-align: left; border-bottom: 1px solid #ddd; vertical-align: top } td.text { white-space:
pre-wrap; font-family: monospace } img { max-width: 100% } pre { background: #f6f6f6; padding: 1rem;
overflow-x: auto } </style></head><body>
<h1>{{ name }}</h1>
<table><tr><th>stage</th>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in summary %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor
%}</table> <img alt="learning curves" src="data:image/png;base64,{{ curves }}"> <h2>Completions</h2>
<table><tr><th>step of the run</th><th>kind</th><th>prompt</th><th>completion</th>
<th>reward</th></tr>
{% for s in samples %}<tr><td>{{ s.step }}</td><td>{{ s.stage }}, {{ s.kind }}</td><td
class="text">{{ s.prompt }}</td> <td class="text">{{ s.completion }}</td><td>{{ "%.3g" |
format(s.reward) }}</td></tr>{% endfor %}</table> <h2>Recipe</h2><pre>{{ recipe }}</pre>
</body></html>
"""

SUMMARY = (
    "steps",
    "minutes",
    "tokens/s",
    "first accuracy",
    "last accuracy",
    "first reward",
    "last reward",
    "skipped",
)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one row a step.

    Raises `CheckpointError` if it has none.
    """
    rows = read_jsonl(run / "metrics.jsonl")
    if not rows:
        raise CheckpointError(f"run {str(run)!r} has no metrics yet; nothing to report")
    return rows


def summarise(run: Path) -> list[list[str]]:
    """One row per stage: steps, minutes, tokens per second, first and last accuracy and reward."""
    rows = read_metrics(run)
    out = []
    for stage in dict.fromkeys(r["stage"] for r in rows):
        mine = [r for r in rows if r["stage"] == stage]

        def ends(key: str, mine: list[dict[str, Any]] = mine) -> list[str]:
            values = [r[key] for r in mine if r.get(key) is not None]
            return [f"{values[0]:.3f}", f"{values[-1]:.3f}"] if values else ["", ""]

        seconds = sum(r["seconds"] for r in mine)
        tokens = sum(r["seconds"] * r["tokens_per_second"] for r in mine)
        out.append(
            [
                stage,
                str(mine[-1]["stage_step"]),
                f"{seconds / 60:.1f}",
                f"{tokens / max(seconds, 1e-9):,.0f}",
                *ends("eval/accuracy"),
                *ends("reward"),
                f"{mine[-1]['skipped']:.0f}",
            ]
        )
    return out


def print_summary(run: Path, console: Console) -> None:
    """The summary as a table."""
    table = Table()
    for column in ("stage", *SUMMARY):
        table.add_column(column)
    for row in summarise(run):
        table.add_row(*row)
    console.print(table)


def draw_curves(run: Path) -> bytes:
    """Learning curves of every metric over all stages, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    names = {k for r in rows for k, v in r.items() if k not in LEFT_OUT and v is not None}
    ordered = [n for n in FIRST if n in names] + sorted(names - set(FIRST))
    columns = 3
    lines = -(-len(ordered) // columns)
    figure = Figure(figsize=(4.4 * columns, 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    stages = list(dict.fromkeys(r["stage"] for r in rows))
    for i, name in enumerate(ordered):
        axes = figure.add_subplot(lines, columns, i + 1)
        for k, stage in enumerate(stages):
            points = [
                (r["step"], r[name])
                for r in rows
                if r["stage"] == stage and r.get(name) is not None
            ]
            if points:
                few = len(points) <= 40
                axes.plot(
                    *zip(*points, strict=True),
                    color=f"C{k}",
                    lw=1.2,
                    marker="." if few else "",
                    label=stage,
                )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step of the run", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if i == 0:
            axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def write_report(run: Path, last_samples: int = 40) -> Path:
    """Write `curves.png` and `report.html` in the run folder.

    Raises `CheckpointError` if it is not a run.
    """
    import jinja2

    config = open_run(run)
    curves = draw_curves(run)
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            name=f"{config.name}, seed {config.seed}",
            columns=SUMMARY,
            summary=summarise(run),
            curves=base64.b64encode(curves).decode(),
            samples=read_jsonl(run / "samples.jsonl")[-last_samples:][::-1],
            recipe=dump_config(config),
        )
    )
    write_whole(run / "curves.png", curves)
    write_whole(run / "report.html", page.encode())
    return run / "report.html"
