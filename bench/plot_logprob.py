"""Plots and the README's table from the figures of `fastrl bench logprob --json RESULTS.json`.

python -m fastrl.bench.plot_logprob RESULTS.json [--out docs] [--shape N,H,V]

Writes logprob-time.png and logprob-memory.png: bars of all variants at one shape, without entropy
and with no row ignored, and where the file has that width and vocabulary for three or more numbers
of tokens, lines over them. Prints the table as Markdown.
"""

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fastrl.bench.bench_logprob import RACE
from fastrl.bench.plot import ACCENT, GREY, label, number

OURS = "fastrl"
VARIANTS = [OURS, *(n for n in RACE.variants(torch.device("cpu")) if n != OURS)]

# Told apart without colour too: bars by their names, lines by marker and stroke.
STROKES = {
    OURS: ("o", "-"),
    "eager": ("s", "--"),
    "torch.compile": ("^", "-."),
    "F.linear_cross_entropy": ("D", ":"),
    "F.linear_cross_entropy chunked": ("v", (0, (5, 1, 1, 1, 1, 1))),
    "cut-cross-entropy": ("X", (0, (3, 1))),
    "TRL chunked": ("P", (0, (1, 2))),
}
GREYS = dict(
    zip(VARIANTS, (ACCENT, "#222", "#555", "#777", "#999", "#446688", "#b08030"), strict=True)
)
MODES = {"forward": "forward", "both": "forward + backward"}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def time_of(variant: dict, mode: str) -> float | None:
    return variant[mode]["median"] * 1e3 if mode in variant else None


def memory_of(variant: dict, mode: str) -> float | None:
    return variant["extra_mb"][mode] if "extra_mb" in variant else None


def why(variant: dict) -> str:
    """Why a variant has no figures, in a few words."""
    text = next((variant[k] for k in ("wrong", "skipped", "failed") if k in variant), "")
    return text if len(text) <= 36 else text[:35] + "…"


def points_of(report: dict) -> list[dict]:
    """The points of logprob, `shape` the three sizes and the rest of it beside them."""
    found = []
    for point in (p for p in report["points"] if p["op"] == "logprob"):
        sizes = [point["shape"][k] for k in ("N", "H", "V")]
        rest = {k: point["shape"][k] for k in ("dtype", "entropy", "ignored")}
        found.append({**rest, "shape": sizes, "variants": point["variants"]})
    return found


def plain(points: list[dict]) -> list[dict]:
    """Without entropy, no row ignored, and our kernel right."""
    found = [p for p in points if not p["entropy"] and not p["ignored"]]
    return [p for p in found if "forward" in p["variants"].get(OURS, {})]


def headline(points: list[dict]) -> list[int]:
    """The shape of the bars: that of Qwen2.5-0.5B's head, or the largest there is."""
    shapes = [p["shape"] for p in points]
    usual = [2048, 896, 151936]
    return usual if usual in shapes else max(shapes, key=lambda s: s[0] * s[1] * s[2])


def bars(axes, point: dict, mode: str, value, unit: str):
    """One bar a variant, ours first, with its value and how many times ours it is."""
    found = {n: value(v, mode) for n, v in point["variants"].items() if n in VARIANTS}
    found = {n: x for n, x in found.items() if x is not None}
    order = [OURS, *sorted((n for n in found if n != OURS), key=found.get)]
    absent = {n: why(v) for n, v in point["variants"].items() if n not in found and why(v)}
    least = 1.0 if unit == "MB" else 0.0  # less is the measurement's own noise
    lengths = [max(found[n], least) for n in order]
    colors = [ACCENT, *[GREY] * (len(order) + len(absent) - 1)]
    names = [*order, *absent]
    start = 0.5 if unit == "MB" else 0.0  # a bar that is missing has no length
    drawn = axes.barh(names, [*lengths, *[start] * len(absent)], height=0.66, color=colors)
    drawn[0].set_hatch("///")
    drawn[0].set_edgecolor("white")
    for i, name in enumerate(order):
        text = (
            f" {number(found[name])} {unit}" if found[name] >= least else f" < {least:.0f} {unit}"
        )
        if name != OURS:
            more = ">" if found[OURS] < least else ""
            text += f"  ({more}{number(lengths[i] / lengths[0])}×)"
        weight = "bold" if name == OURS else "normal"
        axes.text(lengths[i], i, text, va="center", fontsize=8.5, fontweight=weight)
    for i, text in enumerate(absent.values(), len(order)):
        axes.text(start, i, f" {text}", va="center", fontsize=8.5, fontstyle="italic", color=GREY)
    axes.set_yticks(range(len(names)), [label(n) for n in names])
    axes.invert_yaxis()
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)
    if unit == "MB":
        axes.set_xscale("log")
        axes.set_xlim(0.5, max(lengths) * 60)
    else:
        axes.set_xlim(0, max(lengths) * 1.45)
    axes.set_title(f"{DTYPES[point['dtype']]}, {MODES[mode]}", loc="left", fontsize=10)


def lines(axes, points: list[dict], mode: str, value, unit: str):
    """A line a variant over the number of tokens, named at its end."""
    ends = []
    for name in VARIANTS:
        at = [(p["shape"][0], value(p["variants"].get(name, {}), mode)) for p in points]
        at = sorted((n, max(x, 1.0 if unit == "MB" else 0.0)) for n, x in at if x is not None)
        if not at:
            continue
        marker, stroke = STROKES[name]
        style = {"linewidth": 2.6, "zorder": 3} if name == OURS else {"linewidth": 1.3}
        axes.plot(*zip(*at, strict=True), marker=marker, linestyle=stroke, color=GREYS[name],
                  markersize=5, **style)  # fmt: skip
        if at[-1][0] < max(p["shape"][0] for p in points):
            axes.annotate(label(name), at[-1], xytext=(7, 0), textcoords="offset points",
                          va="center", fontsize=8.5, color=GREYS[name])  # fmt: skip
        else:
            ends.append((at[-1][1], at[-1][0], name))
    axes.set(xscale="log", yscale="log", xlabel="tokens")
    axes.set_title(f"{DTYPES[points[0]['dtype']]}, {MODES[mode]} ({unit})", loc="left", fontsize=10)
    tokens = sorted({p["shape"][0] for p in points})
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens], fontsize=8)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _names_at_ends(axes, ends)


def _names_at_ends(axes, ends):
    """Names to the right of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    step = (high / low) ** 0.052
    last = None
    for y, x, name in sorted(ends):
        at = y if last is None else max(y, last * step)
        last = at
        axes.annotate(
            name,
            (x, y),
            xytext=(1.03, at),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color=GREYS[name],
            fontweight="bold" if name == OURS else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": GREYS[name],
                "linewidth": 0.5,
                "relpos": (0, 0.5),
            },
        )


def figure(report: dict, points: list[dict], shape: list[int], value, unit: str, title: str):
    """Rows: bars for each dtype, then lines for each with three or more numbers of tokens."""
    rows = []
    for dtype in DTYPES:
        rows += [(bars, p) for p in points if p["shape"] == shape and p["dtype"] == dtype]
    for dtype in DTYPES:
        same = [p for p in points if p["shape"][1:] == shape[1:] and p["dtype"] == dtype]
        if len({p["shape"][0] for p in same}) >= 3:
            rows.append((lines, same))
    heights = [2.3 if draw is bars else 3.4 for draw, _ in rows]
    fig = Figure(figsize=(11, sum(heights) + 1.1), layout="constrained")
    grid = fig.subplots(len(rows), 2, squeeze=False, height_ratios=heights)
    for (draw, what), pair in zip(rows, grid, strict=True):
        for axes, mode in zip(pair, MODES, strict=True):
            draw(axes, what, mode, value, unit)
    n, h, v = shape
    where = f"{report['machine']['cpu']}, {report['isa']}, {report['threads']} threads"
    fig.suptitle(f"{title}\nN={n:,} H={h:,} V={v:,}; {where}; torch {report['versions']['torch']}",
                 x=0.01, ha="left", fontsize=11)  # fmt: skip
    return fig


def table(points: list[dict]) -> str:
    """A row a point: our times and memory, and the others as multiples of them."""
    names = [n for n in VARIANTS if n != OURS and any(n in p["variants"] for p in points)]
    lines = [
        f"| N x H x V | ours: fwd, fwd+bwd, extra memory | {' | '.join(names)} |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    for point in points:
        mine = point["variants"].get(OURS, {})
        if "forward" not in mine:
            continue
        text = " x ".join(map(str, point["shape"])) + f" {DTYPES[point['dtype']]}"
        text += ", entropy" if point["entropy"] else ""
        text += f", {point['ignored']:.0%} ignored" if point["ignored"] else ""
        cells = [text, f"{_ms(mine)}{_mb(mine)}"]
        for name in names:
            of = point["variants"].get(name, {})
            if "forward" not in of:
                cells.append("skipped" if "skipped" in of else "failed" if "failed" in of else "")
                continue
            ratios = (number(of[m]["median"] / mine[m]["median"]) + "x" for m in MODES)
            cells.append(", ".join(ratios) + _mb(of))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ms(variant: dict) -> str:
    return ", ".join(f"{number(time_of(variant, m))} ms" for m in MODES)


def _mb(variant: dict) -> str:
    return f", {memory_of(variant, 'both'):,.0f} MB" if "extra_mb" in variant else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--shape", help="N,H,V of the bars")
    options = parser.parse_args()
    report = json.loads(options.results.read_text())
    everything = points_of(report)
    points = plain(everything)
    if not points:
        raise SystemExit(f"{options.results} has no point without entropy and ignored rows")
    shape = [*map(int, options.shape.split(","))] if options.shape else headline(points)
    if shape not in [p["shape"] for p in points]:
        raise SystemExit(f"{options.results} has no {shape}; it has {[p['shape'] for p in points]}")
    options.out.mkdir(parents=True, exist_ok=True)
    figures = [("time", time_of, "ms", "Log-probs from hidden states: time, median")]
    if any("extra_mb" in v for p in points for v in p["variants"].values()):
        title = "Log-probs from hidden states: extra memory beyond inputs and gradients (log scale)"
        figures.append(("memory", memory_of, "MB", title))
    for name, value, unit, title in figures:
        path = options.out / f"logprob-{name}.png"
        figure(report, points, shape, value, unit, title).savefig(path, dpi=130)
        print(f"wrote {path}")
    print(table(everything))


if __name__ == "__main__":
    main()
