"""A picture of a report: for each shape the medians as bars, ours first, in a column a mode."""

from typing import Any

from matplotlib.figure import Figure

from fastrl.bench.race import describe

ACCENT, GREY = "#c0392b", "#8a8f98"


def number(x: float) -> str:
    return f"{x:.2g}" if x < 1 else f"{x:.1f}" if x < 10 else f"{x:,.0f}"


def label(name: str) -> str:
    """A name in two lines if it is long."""
    return name.replace(" ", "\n", 1) if len(name) > 24 else name


def draw(report: dict) -> Figure:
    """The figure of a report; ValueError where nothing of it was timed."""
    rows = []
    for point in report["points"]:
        modes = [m for m in point["bounds"] if any(m in v for v in point["variants"].values())]
        if modes:
            rows.append((point, modes))
    if not rows:
        raise ValueError("there is nothing to plot: no variant was timed")
    columns = max(len(modes) for _, modes in rows)
    heights = [0.7 + 0.3 * len(point["variants"]) for point, _ in rows]
    figure = Figure(figsize=(5.5 * columns, sum(heights) + 0.8), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for (point, modes), axes in zip(rows, grid, strict=True):
        for i, ax in enumerate(axes):
            if i < len(modes):
                times = {
                    n: of.get(modes[i], {}).get("median") for n, of in point["variants"].items()
                }
                title = f"{point['op']}: {describe(point['shape'])}, {modes[i]}"
                bars(ax, times, point["variants"], title)
            else:
                ax.set_axis_off()
    machine = report["machine"]
    where = machine["gpu"] if report["device"] == "cuda" else machine["cpu"]
    figure.suptitle(
        f"median milliseconds, less is better; {where}, {report['isa']}, "
        f"{report['threads']} threads, torch {machine['torch']}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def bars(axes: Any, times: dict[str, float | None], variants: dict[str, dict], title: str) -> None:
    """A bar a variant with its time and how many times ours it is; words where there is none."""
    timed = {n: t for n, t in times.items() if t is not None}
    base = next((t for n, t in timed.items() if variants[n]["peer"] == "fastrl"), None)
    most = max(timed.values())
    for i, (name, seconds) in enumerate(times.items()):
        own = variants[name]["peer"] == "fastrl"
        if seconds is None:
            of = variants[name]
            why = "wrong" if "wrong" in of else of.get("skipped") or of.get("failed") or ""
            axes.text(0, i, f" {why[:48]}", va="center", fontsize=8, fontstyle="italic", color=GREY)
            continue
        # Told apart without colour too: ours is hatched.
        axes.barh(i, seconds, height=0.66, color=ACCENT if own else GREY,
                  hatch="///" if own else None, edgecolor="white")  # fmt: skip
        text = f" {number(1e3 * seconds)} ms"
        text += f"  ({number(seconds / base)}×)" if base and seconds != base else ""
        axes.text(seconds, i, text, va="center", fontsize=8)
    axes.set_yticks(range(len(times)), [label(n) for n in times], fontsize=8)
    axes.set_ylim(len(times) - 0.5, -0.5)
    axes.set_xlim(0, 1.4 * most)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)
    axes.set_title(title, loc="left", fontsize=8.5)
