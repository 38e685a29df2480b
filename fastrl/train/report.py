"""A run's report: an HTML page with learning curves and completions, and a short table."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fastrl.files import write_whole
from fastrl.train.checkpoints import CheckpointError, open_run
from fastrl.train.metrics import METRICS, entry
from fastrl.train.recipe import dump_config
from fastrl.train.tracking import read_jsonl

LEFT_OUT = ("step", "stage", "stage_step", "skipped")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ name }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
color: #222 } table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem;
text-align: left; border-bottom: 1px solid #ddd; vertical-align: top } td.text { white-space:
pre-wrap; font-family: monospace } img { max-width: 100% } pre { background: #f6f6f6; padding: 1rem;
overflow-x: auto } .curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill,
minmax(20rem, 1fr)) } figure { margin: 0 } figcaption { font-size: 13px } dt { float: left;
margin-right: .5rem; font-weight: bold } </style></head><body>
<h1>{{ name }}</h1>
<table><tr><th>stage</th>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in summary %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor
%}</table> <dl>{% for name, text in legend %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
<h2>Curves</h2><div class="curves">{% for c in curves %}<figure><img alt="{{ c.name }}"
src="data:image/png;base64,{{ c.image }}"><figcaption>{{ c.text }}</figcaption></figure>{% endfor
%}</div> <h2>Completions</h2>
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
# Columns whose names do not say it all, and the metric that each one is of.
LEGEND = (("tokens/s", "tokens_per_second"), ("accuracy", "eval/accuracy"), ("skipped", "skipped"))


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


def panels(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What is drawn, in the glossary's order, and under which other names it was logged too."""
    order = list(METRICS)
    names = {k for r in rows for k, v in r.items() if k not in LEFT_OUT and v is not None}
    out: dict[str, list[str]] = {}
    for name in sorted(
        names, key=lambda n: (order.index(entry(n)) if entry(n) in METRICS else len(order), n)
    ):
        twin = {"eval/reward": "eval/accuracy", "reward/NAME": "reward"}.get(entry(name), "")
        if twin in out and _same(rows, name, twin):
            out[twin].append(name)
        else:
            out[name] = []
    return out


def _same(rows: list[dict[str, Any]], name: str, twin: str) -> bool:
    both = [(r[name], r.get(twin)) for r in rows if r.get(name) is not None]
    return all(b is not None and math.isclose(a, b, abs_tol=1e-6) for a, b in both)


def explain(name: str, also: list[str]) -> str:
    """What stands under a curve."""
    metric = METRICS.get(entry(name))
    texts = [metric.sentence()] if metric else []
    texts += [f"The same as {other}." for other in also]
    return " ".join(texts).replace("`", "")


def draw(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """The curve of a metric over all stages, as pixels `[H, W, 4]`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.4, 2.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for k, stage in enumerate(dict.fromkeys(r["stage"] for r in rows)):
        points = [
            (r["step"], r[name]) for r in rows if r["stage"] == stage and r.get(name) is not None
        ]
        if points:
            marker = "." if len(points) <= 40 else ""
            axes.plot(*zip(*points, strict=True), f"C{k}", lw=1.2, marker=marker, label=stage)
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("step of the run", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def tile(images: list[np.ndarray], columns: int = 3) -> np.ndarray:
    """Images of one size side by side, row by row, on white."""
    empty = [np.full_like(images[0], 255)] * (-len(images) % columns)
    cells = [*images, *empty]
    rows = [np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    return np.vstack(rows)


def png(pixels: np.ndarray) -> bytes:
    """An image as a file's bytes."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()


def write_report(run: Path, last_samples: int = 40) -> Path:
    """Write `curves.png` and `report.html` in the run folder.

    Raises `CheckpointError` if it is not a run.
    """
    import jinja2

    config = open_run(run)
    rows = read_metrics(run)
    shown = panels(rows)
    images = [draw(rows, name) for name in shown]
    curves = [
        {
            "name": name,
            "image": base64.b64encode(png(image)).decode(),
            "text": explain(name, also),
        }
        for (name, also), image in zip(shown.items(), images, strict=True)
    ]
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(PAGE)
        .render(
            name=f"{config.name}, seed {config.seed}",
            columns=SUMMARY,
            summary=summarise(run),
            legend=[(name, explain(key, [])) for name, key in LEGEND],
            curves=curves,
            samples=read_jsonl(run / "samples.jsonl")[-last_samples:][::-1],
            recipe=dump_config(config),
        )
    )
    write_whole(run / "curves.png", png(tile(images)))
    write_whole(run / "report.html", page.encode())
    return run / "report.html"
