"""Runs points of bench_logprob.py, each in processes of its own (point.py), within limits."""

import json
import math
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import measure
import peak
from baselines import bytes_needed

HERE = Path(__file__).parent

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


def environment(isa: str | None, threads: int) -> dict[str, str]:
    """What a point's process gets besides this one's environment."""
    chosen = {"OMP_NUM_THREADS": str(threads)}
    if isa is not None:
        chosen |= {"FASTRL_ISA": isa} | CAPPED[isa]
        chosen |= {"MKL_ENABLE_INSTRUCTIONS": MKL[isa]} if isa in MKL else {}
    return chosen


class Stopped(Exception):
    """A point's process ended early; its text says why."""


class TooSlow(Stopped):
    """A call that did not end in time."""


def events(task: dict, env: dict, silence: float):
    """The events of a point's process; Stopped if it fails or is silent for too long."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "point.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | env,
        text=True,
    )
    lines: queue.Queue = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=lambda: [*map(lines.put, process.stdout), lines.put(None)]),
        threading.Thread(target=lambda: errors.extend(process.stderr)),
    ]
    try:
        for reader in readers:
            reader.start()
        process.stdin.write(json.dumps(task))
        process.stdin.close()
        while (line := lines.get(timeout=silence)) is not None:
            yield json.loads(line)
        process.wait()
        readers[1].join()
        if process.returncode < 0:
            raise Stopped(f"killed by signal {-process.returncode}; too little memory?")
        if process.returncode:
            raise Stopped(errors[-1].strip()[:200] if errors else f"exit {process.returncode}")
    except queue.Empty:
        raise TooSlow(f"took more than {silence:.0f} s") from None
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join()


def size(point: dict) -> int:
    return math.prod(point["shape"])


def fitting(point: dict, variants: list[str], slow: dict) -> tuple[list[str], dict[str, str]]:
    """The variants that time and the free memory are enough for, and why not the others.

    ``slow`` holds the sizes at which one took too long in this run.
    """
    itemsize, free = 4 if point["dtype"] == "float32" else 2, measure.available()
    fit, not_fit = [], {}
    for name in variants:
        if size(point) >= slow.get((name, point["dtype"]), float("inf")):
            not_fit[name] = "took too long at a smaller size"
            continue
        need = bytes_needed(name, *point["shape"], itemsize, True, point["entropy"])
        if need < 0.9 * free:
            fit.append(name)
        else:
            not_fit[name] = f"needs about {need / 2**30:.0f} GB, {free / 2**30:.0f} GB are free"
    return fit, not_fit


def run_point(point: dict, variants: list[str], slow: dict, options, env: dict) -> dict:
    """Errors, times and extra memory of each variant, and why some are missing."""
    variants, skipped = fitting(point, variants, slow)
    found = {name: {"skipped": why} for name, why in skipped.items()}
    task = point | {
        "rounds": options.rounds,
        "threads": options.threads,
        "workspace_mb": options.workspace_mb,
        "seconds": options.point_seconds,
        "pause": options.pause_ms / 1e3,
    }
    result = {**point, "variants": found}
    left = list(variants)
    while left:
        started = None
        try:
            # A variant that hangs or is killed is left out, and the others start again.
            for event in events(task | {"what": "time", "variants": left}, env, task["seconds"]):
                if "reference" in event:
                    result["reference"], result["truth"] = event["reference"], event["own"]
                elif "started" in event:
                    started = event["started"]
                elif "variant" in event:
                    found[event.pop("variant")] = event
                elif "times" in event:
                    for name, times in event["times"].items():
                        found.setdefault(name, {})[event["mode"]] = times
            break
        except Stopped as why:
            if started is None:
                result["failed"] = str(why)
                return result
            found[started] = {"failed": str(why)}
            left.remove(started)
            if isinstance(why, TooSlow):
                slow[started, point["dtype"]] = size(point)
    for name in variants:
        if options.memory and "failed" not in found[name]:
            try:
                memory = task | {"what": "memory", "variants": [name]}
                for event in events(memory, env, task["seconds"]):
                    found[name]["extra_mb"] = event["extra_mb"]
            except Stopped as why:
                found[name]["memory_failed"] = str(why)
    return result


def start(options, env) -> dict:
    """The report without points."""
    task = {"what": "facts", "variants": options.variants, "threads": options.threads}
    (facts,) = events(task | {"workspace_mb": options.workspace_mb}, env, 120.0)
    peaks = peak.measure([options.threads]) if options.peak else None
    command = " ".join(["python", "bench/bench_logprob.py", *sys.argv[1:]])
    return {
        "command": command,
        "threads": options.threads,
        "environment": env,
        "pause_ms": options.pause_ms,
        **facts,
        "peaks": peaks,
        "points": [],
    }
