"""Runs races shape by shape, each in a process of its own (child.py), within limits."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastrl import bench
from fastrl.bench import measure, peak, peers
from fastrl.bench.race import Race, Shape, describe
from fastrl.kernels import native

# What holds PyTorch to the instruction set that ours is held to; read when it is imported.
CAPPED = {
    "generic": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_vnni": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
}
MKL = {"avx2": "AVX2", "avx512": "AVX512", "avx512_vnni": "AVX512", "avx512_bf16": "AVX512"}
# Variables of threads and of memory that change times and are a user's to set.
TIMING = ("OMP_", "GOMP_", "KMP_", "MALLOC_", "LD_PRELOAD")


@dataclass(frozen=True)
class Options:
    """How to run: ``seconds`` for the rounds of a shape, of which each variant gets its share.

    ``silence`` is how long a call may take, ``limit`` after how many seconds no shape starts any
    more, ``rounds`` the most of each variant; each call comes ``pause`` seconds after the last.
    With ``cpu_time`` the seconds of a call are those its threads spent on a core. Without
    ``modes`` each race has all of its own.
    """

    device: str = "cpu"
    threads: int = 1
    isa: str | None = None
    seconds: float = 4.0
    rounds: int = 30
    pause: float = 0.01
    silence: float = 120.0
    limit: float = float("inf")
    memory: bool = True
    peak: bool = True
    cpu_time: bool = False
    modes: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """What changes times: of this process, and what a shape's gets besides."""
        chosen = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(TIMING)}
        chosen["OMP_NUM_THREADS"] = str(self.threads)
        if self.isa is not None:
            chosen |= {"FASTRL_ISA": self.isa} | CAPPED[self.isa]
            chosen |= {"MKL_ENABLE_INSTRUCTIONS": MKL[self.isa]} if self.isa in MKL else {}
        return chosen


class Stopped(Exception):
    """A shape's process ended early; its text says why."""


class TooSlow(Stopped):
    """A call that did not end in time."""


def events(task: dict, options: Options) -> Iterator[dict]:
    """The events of a shape's process; Stopped if it fails or is silent for too long."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastrl.bench.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **options.environment},
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    stdout, stderr = process.stdout, process.stderr
    readers = [
        threading.Thread(target=lambda: [*map(lines.put, stdout), lines.put(None)]),
        threading.Thread(target=lambda: errors.extend(stderr)),
    ]
    try:
        for reader in readers:
            reader.start()
        process.stdin.write(json.dumps(task | {"device": options.device}))
        process.stdin.close()
        while (line := lines.get(timeout=options.silence)) is not None:
            yield json.loads(line)
        process.wait()
        readers[1].join()
        if process.returncode < 0:
            raise Stopped(f"killed by signal {-process.returncode}; too little memory?")
        if process.returncode:
            raise Stopped(errors[-1].strip()[:200] if errors else f"exit {process.returncode}")
    except queue.Empty:
        raise TooSlow(f"took more than {options.silence:.0f} s") from None
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join()


def field(
    race: Race, against: list[str] | None, device: torch.device
) -> tuple[list[str], dict[str, str]]:
    """The variants that run: ours and the peers that are here; and why a peer does not.

    Without ``against`` all peers, but on a CPU without what is costly.
    """
    names, absent = [], {}
    for name, variant in race.variants(device).items():
        if against is not None and not variant.ours and variant.peer not in against:
            continue
        why = peers.missing(variant.peer, device)
        if why is None and against is None and variant.costly and device.type == "cpu":
            why = f"takes long: fastrl bench {race.op} --against {variant.peer}"
        if why is None:
            names.append(name)
        else:
            absent[variant.peer if why.startswith("not installed") else name] = why
    if not any(v.ours for v in race.variants(device).values()):
        absent[f"fastrl's {race.op}"] = native.why_missing or f"it has no kernel for {device} yet"
    return names, absent


def timed(race: Race, options: Options) -> tuple[str, ...]:
    """The modes that a race is run in; ValueError for one that it does not have."""
    for mode in options.modes:
        if mode not in race.modes:
            raise ValueError(f"--modes {mode!r}: {race.op} has {', '.join(race.modes)}")
    return options.modes or race.modes


def size(race: Race, shape: Shape) -> float:
    """Operations, by which shapes are ordered."""
    return race.work(shape, race.modes[-1]).operations


def run_point(
    race: Race, shape: Shape, names: list[str], options: Options, slow: dict[str, float]
) -> dict:
    """Errors, times and extra memory of each variant, and why some are missing.

    ``slow`` holds the sizes at which a variant took too long, and gets those that do so here.
    """
    found: dict[str, dict[str, Any]] = {}
    variants = race.variants(torch.device(options.device))
    result: dict[str, Any] = {"op": race.op, "shape": shape, "variants": found}
    left = []
    for name in names:
        need = race.bytes_needed(name, shape)
        if size(race, shape) >= slow.get(name, float("inf")):
            found[name] = {"skipped": "took too long at a smaller size"}
        elif options.device == "cpu" and need > 0.9 * measure.available():
            free = measure.available() / 2**30
            why = f"needs about {need / 2**30:.0f} GB, {free:.0f} GB are free"
            found[name] = {"skipped": why}
        else:
            left.append(name)
    task = {"what": "race", "op": race.op, "shape": shape, "threads": options.threads}
    task |= {"rounds": options.rounds, "seconds": options.seconds, "pause": options.pause}
    task |= {"cpu_time": options.cpu_time, "modes": timed(race, options)}
    while left:
        started = None
        try:
            # A variant that hangs or is killed is left out, and the others start again.
            for event in events(task | {"memory": options.memory, "variants": left}, options):
                if "started" in event:
                    started = event["started"]
                elif "variant" in event:
                    found[event.pop("variant")] = event
                elif "times" in event:
                    for name, times in event["times"].items():
                        found[name][event["mode"]] = times
                elif event.get("figures"):
                    found[event["of"]]["figures"] = event["figures"]
            break
        except Stopped as why:
            if started is None:
                result["failed"] = str(why)
                break
            found[started] = {"failed": str(why)}
            left.remove(started)
            if isinstance(why, TooSlow):
                slow[started] = size(race, shape)
    for name, of in found.items():
        of["peer"] = variants[name].peer
    return result


def bounds(
    race: Race, shape: Shape, modes: tuple[str, ...], peaks: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """What each mode has to compute and move and, where the peaks are known, the least seconds."""
    found: dict[str, dict[str, Any]] = {}
    for mode in modes:
        work = race.work(shape, mode)
        found[mode] = {"operations": work.operations, "bytes": work.bytes}
        if peaks:
            found[mode] |= peak.floor(peaks, work)
    return found


def run(
    shapes: dict[str, list[Shape]],
    against: list[str] | None,
    options: Options,
    before: tuple[dict, ...] = (),
    begin: Callable[[str], None] = lambda what: None,
) -> Iterator[dict]:
    """The report of the races in ``shapes`` (by op): first without a shape, then after every one.

    ``begin`` is told what runs next, which may take minutes.
    Shapes that are among the points of an earlier report, ``before``, are not run again.
    """
    device = torch.device(options.device)
    fields = {op: field(bench.load(op), against, device) for op in shapes}
    for op in shapes:
        timed(bench.load(op), options)
    if options.peak:
        begin("the machine's peak")
    task = {"what": "facts", "threads": options.threads, "peak": options.peak}
    (found,) = events(task, options)
    raced = {v.peer for op in shapes for v in bench.load(op).variants(device).values()}
    absent = {who: why for _, missing in fields.values() for who, why in missing.items()}
    none = f"nothing of {', '.join(shapes)} races it on {device} yet"
    report: dict[str, Any] = {
        "fastrl": found["versions"].get("fastrl"),
        "commit": measure.commit(),
        "command": measure.typed(sys.argv[1:]),
        "device": options.device,
        "threads": options.threads,
        "clock": "CPU time" if options.cpu_time else "wall",
        "environment": options.environment,
        **found,
        "missing": absent | {p: none for p in against or () if p not in raced},
        "points": list(before),
    }
    yield report
    end = time.monotonic() + options.limit
    done = [(p["op"], p["shape"]) for p in before]
    slow: dict[str, dict[str, float]] = {op: {} for op in shapes}
    for op, shape in in_turns(shapes):
        if (op, shape) in done:
            continue
        race = bench.load(op)
        if time.monotonic() > end:
            result = {"op": op, "shape": shape, "variants": {}, "skipped": "out of time"}
        else:
            begin(f"{op}: {describe(shape)}")
            result = run_point(race, shape, fields[op][0], options, slow[op])
        result["bounds"] = bounds(race, shape, timed(race, options), found["peaks"])
        report["points"].append(result)
        yield report


def in_turns(shapes: dict[str, list[Shape]]) -> Iterator[tuple[str, Shape]]:
    """The smallest shape of each op, then the next ones: a limit leaves out the largest of all."""
    ordered = {op: sorted(some, key=partial(size, bench.load(op))) for op, some in shapes.items()}
    for rank in range(max(map(len, ordered.values()), default=0)):
        for op, some in ordered.items():
            if rank < len(some):
                yield op, some[rank]
