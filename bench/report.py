"""Shows what was measured: the machine, a table for each shape, and what changed since a report."""

import math
from itertools import groupby, pairwise
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastrl import bench
from fastrl.bench.race import describe

LEAST_BAND = 0.05  # a change smaller than this is noise whatever the percentiles say
SPARED = ("error", "20-80%", "peak", "+MB")  # what a narrow terminal does without, in this order
WIDEST = 1000  # characters, more than any table has
FEW, WIDE_BAND = 3, 0.3  # with fewer rounds than that there are no percentiles to tell by
Comparison = list[dict[str, Any]]


def show_start(report: dict, console: Console) -> None:
    """Prints what is measured on, what it can do at most, and which peers are missing."""
    machine = report["machine"]
    where = f"{machine['cpu']}, {report['isa'] or 'no native kernels'}, {report['threads']} threads"
    if report["device"] != "cpu":
        where = f"{machine['gpu']}, {where}"
    source = f"fastrl {report['fastrl']} {report['commit'] or ''}".strip()
    console.print(f"{where}; torch {machine['torch']}; {source}", highlight=False)
    figures = ", ".join(f"{name} {value:.0f}" for name, value in report["peaks"].items())
    console.print(
        f"at most (1e9 operations or bytes a second): {figures}"
        if figures
        else "the machine's peak was not measured: no share of it is shown",
        highlight=False,
    )
    console.print(
        f"ms: {'' if report['clock'] == 'wall' else 'CPU time, '}median; 20-80%: of 3 rounds and "
        "more; x: times ours; peak: share of what the machine "
        "can do; +MB: memory that the call takes",
        style="dim",
        highlight=False,
    )
    for who, why in report["missing"].items():
        console.print(f"without {who}: {why}", markup=False, highlight=False)


def show_point(result: dict, console: Console) -> None:
    """Prints a shape: a row a variant, and of the columns as many as fit."""
    title = f"{result['op']}: {describe(result['shape'])}"
    if why := result.get("skipped") or result.get("failed"):
        title += f": {why}"
    console.print(title, markup=False, highlight=False, style="italic")
    if not result["variants"]:
        return
    columns = ["ms", "20-80%", "x", "rate", "peak", "+MB", "error"]
    table, room = _table(result, columns), console.options.update_width(WIDEST)
    for column in SPARED:
        if console.measure(table, options=room).maximum <= console.width:
            break
        columns.remove(column)
        table = _table(result, columns)
    if table.row_count:
        console.print(table)
    show_figures(result["variants"], console)
    for mode in result["bounds"]:
        if factors := ladder(result, mode):
            start = next(iter(bench.load(result["op"]).ladder))
            steps = " x ".join(f"{part} {figure(factor)}" for part, factor in factors.items())
            whole = f"{figure(math.prod(factors.values()))} times {start}"
            console.print(f"  {mode}: {steps} = {whole}", markup=False, highlight=False)
    for name, of in result["variants"].items():
        for kind in ("wrong", "failed", "skipped"):
            if kind in of:
                style = "red" if kind == "wrong" else "dim"
                console.print(f"  {name} {kind}: {of[kind]}", style=style, markup=False)


def show_figures(variants: dict[str, dict], console: Console) -> None:
    """Prints what follows from the best rounds: a row a variant, a column a figure."""
    names = list(dict.fromkeys(n for of in variants.values() for n in of.get("figures", {})))
    if not names:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("best rounds", min_width=12, overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for variant, of in variants.items():
        if found := of.get("figures"):
            cells = (figure(found[name]) if name in found else "" for name in names)
            table.add_row(variant, *cells, style="bold" if of["peer"] == "fastrl" else None)
    console.print(table)


def _table(result: dict, columns: list[str]) -> Table:
    """What was timed at a shape, ours in bold."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("variant", min_width=12, overflow="fold")
    table.add_column("mode", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    base = best_of_ours(result)
    for mode in result["bounds"]:
        for name, of in result["variants"].items():
            if mode in of:
                cells = _timing(of, mode, base.get(mode), result["bounds"][mode])
                style = "bold" if of["peer"] == "fastrl" else None
                table.add_row(name, mode, *(cells[c] for c in columns), style=style)
        table.add_section()
    return table


def _timing(of: dict, mode: str, base: float | None, bound: dict) -> dict[str, str]:
    """Median, percentiles, how many times ours, rate, share of the peak, memory, largest error."""
    times, errors = of[mode], of.get("errors", {})
    median, spread = times["median"], times["rounds"] >= FEW
    low, high = figure(1e3 * times["p20"]), figure(1e3 * times["p80"])
    times_ours = median / base if base else math.nan
    return {
        "ms": figure(1e3 * median),
        "20-80%": f"{low}-{high}" if spread else "",
        "x": (f"{times_ours:.2f}" if times_ours < 100 else f"{times_ours:.0f}") if base else "",
        "rate": rate(median, bound),
        "peak": f"{bound['floor'] / median:.0%}" if "floor" in bound else "",
        "+MB": f"{of['extra_mb'][mode]:.0f}" if "extra_mb" in of else "",
        "error": f"{max(errors.values()):.0e}" if errors else "",
    }


def ladder(result: dict, mode: str) -> dict[str, float]:
    """How many times as fast each part of the race's ladder makes it; empty where one is missing.

    Their product is how many times as fast as the first variant the last one is.
    """
    rungs = bench.load(result["op"]).ladder
    times = [
        result["variants"].get(name, {}).get(mode, {}).get("median") for name in rungs.values()
    ]
    if not times or None in times:
        return {}
    return {
        part: before / after
        for part, (before, after) in zip(list(rungs)[1:], pairwise(times), strict=True)
    }


def figure(x: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def rate(seconds: float, bound: dict) -> str:
    """Operations or bytes a second, whichever bounds the call."""
    arithmetic = bound["operations"] > 16 * bound["bytes"]  # where the peaks are unknown
    if "floor" in bound:
        arithmetic = bound["by"] == "operations"
    if arithmetic:
        flops = bound["operations"] / seconds
        tera = flops >= 1e12
        return f"{figure(flops / (1e12 if tera else 1e9))} {'T' if tera else 'G'}FLOP/s"
    return f"{figure(bound['bytes'] / seconds / 1e9)} GB/s"


def best_of_ours(result: dict) -> dict[str, float]:
    """Median seconds of the first of ours that was timed, by mode."""
    for of in result["variants"].values():
        if of.get("peer") == "fastrl" and any(m in of for m in result["bounds"]):
            return {m: of[m]["median"] for m in result["bounds"] if m in of}
    return {}


def wrong(report: dict) -> list[str]:
    """What of ours disagreed with the truth or failed, in a line each."""
    found = []
    for point in report["points"]:
        where = f"{point['op']} {describe(point['shape'])}"
        if "failed" in point:
            found.append(f"{where}: {point['failed']}")
        for name, of in point["variants"].items():
            why = of.get("wrong") or of.get("failed")
            if of.get("peer") == "fastrl" and why:
                found.append(f"{where}, {name}: {why}")
    return found


def compare(old: dict, new: dict) -> Comparison:
    """Every variant, shape and mode that both reports have, with the ratio of medians, new / old.

    ``band`` is how far apart noise can bring two medians: half of each report's 20-80% range, in
    shares of the old median, and at least 5%, or 30% where there were less than 3 rounds.
    ``verdict`` is "slower", "faster" or "same", and "wrong" for what was timed and now fails its
    gate. ValueError where the reports are of machines or settings that cannot be compared.
    """
    for key, usual in (("device", None), ("threads", None), ("isa", None), ("clock", "wall")):
        was, now = old.get(key, usual), new.get(key, usual)
        if was != now:
            raise ValueError(f"the old report has {key}={was!r}, this is {now!r}")
    for key in ("cpu", "family", "gpu"):
        if old["machine"].get(key) != new["machine"].get(key):
            raise ValueError(
                f"the old report is of another machine: {key} {old['machine'].get(key)!r}, "
                f"this is {new['machine'].get(key)!r}"
            )
    before = {_key(p): p for p in old["points"]}
    rows: Comparison = []
    for point in new["points"]:
        was = before.get(_key(point), {"variants": {}})["variants"]
        for name, of in point["variants"].items():
            for mode in (m for m in was.get(name, {}) if m in point["bounds"]):
                row = {"op": point["op"], "shape": point["shape"], "variant": name, "mode": mode}
                row["ours"] = of.get("peer") == "fastrl"
                a, b = was[name][mode], of.get(mode)
                if b is None:
                    why = of.get("wrong") or of.get("failed")
                    if why:
                        rows.append(row | {"ratio": math.nan, "band": 0.0, "verdict": "wrong"})
                    continue
                spread = (a["p80"] - a["p20"] + b["p80"] - b["p20"]) / 2 / a["median"]
                few = min(a["rounds"], b["rounds"]) < FEW
                ratio, band = (
                    b["median"] / a["median"],
                    max(WIDE_BAND if few else LEAST_BAND, spread),
                )
                verdict = "slower" if ratio > 1 + band else "faster" if ratio < 1 - band else "same"
                rows.append(row | {"ratio": ratio, "band": band, "verdict": verdict})
    if not rows:
        raise ValueError("the old report and this one have no variant of a shape in common")
    return rows


def _key(point: dict) -> str:
    return f"{point['op']} {sorted(point['shape'].items())}"


def regressions(rows: Comparison) -> Comparison:
    """Of ours, what is slower beyond the noise or wrong."""
    return [r for r in rows if r["ours"] and r["verdict"] in ("slower", "wrong")]


def show_comparison(rows: Comparison, console: Console) -> None:
    """Prints the ratios; the others' say whether the machine itself was slower."""
    console.print("against the old report: median, new / old", style="italic", highlight=False)
    for where, of in groupby(rows, lambda row: f"{row['op']}: {describe(row['shape'])}"):
        console.print(where, style="italic", markup=False, highlight=False)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("variant", min_width=12, overflow="fold")
        table.add_column("mode")
        for column in ("ratio", "noise", ""):
            table.add_column(column, justify="right", no_wrap=True)
        for row in of:
            bad = row["ours"] and row["verdict"] in ("slower", "wrong")
            table.add_row(
                *(row["variant"], row["mode"]),
                *(f"{row['ratio']:.2f}", f"±{row['band']:.0%}", row["verdict"]),
                style="bold red" if bad else None,
            )
        console.print(table)
    peers = sorted(r["ratio"] for r in rows if not r["ours"] and not math.isnan(r["ratio"]))
    if peers:
        drift = peers[len(peers) // 2]
        console.print(f"the others, which did not change: {drift:.2f} (median ratio)")
