"""`fastrl bench`: which races at which shapes, what is written, and what the exit code says."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from fastrl import bench
from fastrl.bench import peers, points, report
from fastrl.bench.points import CAPPED, Options
from fastrl.bench.race import Shape

WHOLE = (
    480.0  # seconds after which no shape of a run of everything starts: it ends within 10 minutes
)
# What a report has to share with one that it goes on from.
SAME = ("machine", "versions", "environment", "isa", "device", "commit")


def options(
    device: str = "auto",
    threads: int | None = None,
    isa: str | None = None,
    quick: bool = False,
    modes: str | None = None,
    **given: float | bool | None,
) -> Options:
    """Checked settings of a run; what is None has its default. ValueError for what cannot be."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device!r} is not one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isa is not None and isa not in CAPPED:
        raise ValueError(f"--isa {isa!r} is not one of {', '.join(CAPPED)}")
    if given.get("cpu_time") and device == "cuda":
        raise ValueError("--cpu-time says nothing of a GPU")
    cores = len(os.sched_getaffinity(0))
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads} must be at least 1")
    some = tuple(m.strip() for m in (modes or "").split(",") if m.strip())
    chosen = Options(device=device, threads=threads or cores, isa=isa, modes=some)
    if quick:
        chosen = replace(chosen, seconds=2.0)
    return replace(chosen, **{k: v for k, v in given.items() if v is not None})


def shapes_of(
    ops: list[str],
    device: torch.device,
    grid: str = "default",
    file: Path | None = None,
    single: list[str] | None = None,
    old: dict | None = None,
) -> dict[str, list[Shape]]:
    """The shapes to run, by op: those of ``file``, ``single`` ones, of an old report, or a grid.

    ValueError for ops, keys and values that do not fit.
    """
    for op in ops:
        bench.load(op)
    given: dict[str, list[Shape]] = {}
    if file is not None:
        given = json.loads(file.read_text())
        if not isinstance(given, dict):
            raise ValueError(f"{file} must be a JSON object: an op, and a list of its shapes")
    elif single:
        if len(ops) != 1:
            raise ValueError("--shape is of one op: fastrl bench OP --shape N=2048,dtype=float32")
        given = {ops[0]: [_shape(text, bench.load(ops[0]).defaults) for text in single]}
    elif old is not None and grid == "default":
        for point in old["points"]:
            given.setdefault(point["op"], []).append(point["shape"])
    else:
        return {op: bench.load(op).shapes(grid, device) for op in ops or bench.OPS}
    chosen = {op: [bench.load(op).complete(s) for s in some] for op, some in given.items()}
    if absent := [op for op in ops if op not in chosen]:
        raise ValueError(f"no shapes are given for {', '.join(absent)}")
    return {op: some for op, some in chosen.items() if not ops or op in ops}


def _shape(text: str, defaults: Shape) -> Shape:
    """KEY=VALUE,... with each value of the kind that its default has."""
    shape = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--shape {text!r}: {part!r} is not KEY=VALUE")
        try:
            shape[key] = value if isinstance(defaults.get(key), str) else json.loads(value.lower())
        except json.JSONDecodeError:
            raise ValueError(
                f"--shape {text!r}: {value!r} is not a number, true or false"
            ) from None
    return shape


def read(path: Path) -> dict:
    """A report that was written with --json; ValueError where it is not one."""
    try:
        old = json.loads(path.read_text())
        if old["points"] and not isinstance(old["points"][0]["bounds"], dict):
            raise KeyError("bounds")
        return old
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a report of fastrl bench --json ({error!r})") from error


def run(
    shapes: dict[str, list[Shape]],
    options: Options,
    console: Console,
    against: str | None = None,
    out: Path | None = None,
    plot: Path | None = None,
    old: dict | None = None,
    resume: bool = False,
) -> int:
    """Runs, shows and writes; 1 where ours was wrong or slower than in ``old``, else 0."""
    began = time.monotonic()
    wanted = None if against is None else peers.parse(against)
    earlier = read(out) if resume and out is not None and out.exists() else None
    found: dict = {}
    before = () if earlier is None else tuple(earlier["points"])

    def begin(what: str) -> None:
        console.print(f"{what} ...", style="dim", markup=False, highlight=False)

    for found in points.run(shapes, wanted, options, before, begin):
        if len(found["points"]) == len(before):
            report.show_start(found, console)
            if earlier is not None and (other := [k for k in SAME if earlier[k] != found[k]]):
                raise ValueError(f"--resume: {out} has another {', '.join(other)}")
        else:
            report.show_point(found["points"][-1], console)
        if out is not None:  # after every shape: who runs out of time keeps what was measured
            out.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"{time.monotonic() - began:.0f} s", highlight=False)
    if plot is not None:
        from fastrl.bench.plot import draw

        draw(found).savefig(plot, dpi=130)
    wrong = report.wrong(found)
    for line in wrong:
        console.print(f"[bold red]wrong[/bold red] {line}", highlight=False)
    if old is None:
        return int(bool(wrong))
    rows = report.compare(old, found)
    report.show_comparison(rows, console)
    slower = report.regressions(rows)
    console.print(f"{len(slower)} regressions" if slower else "no regression", highlight=False)
    return int(bool(wrong or slower))
