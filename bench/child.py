"""A shape of a race in a process of its own: a task in, events out, as JSON lines.

A process for each keeps a crash or a lack of memory to that shape, and lets the environment that
oneDNN and ATen read when they start be chosen for it.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastrl import bench
from fastrl.bench import measure, peak, peers
from fastrl.bench.race import Race, Shape, Variant
from fastrl.kernels import native

Emit = Callable[..., None]
LEAST_ROUNDS = 3  # below that there are no percentiles: only for what is very slow


def memory(
    race: Race,
    variant: Variant,
    shape: Shape,
    inputs: Any,
    modes: Sequence[str],
    device: torch.device,
) -> dict:
    """Extra MB of a variant in each mode: beyond what there was before, less what it returns.

    A small call comes first, so that libraries and threads are loaded; what compiles runs at full
    size first: its compiler is not what is asked for. What a variant keeps after a call counts,
    as it would in a trainer.
    """
    warm_up = inputs if variant.compiled else race.draw(race.small(shape), device)
    modes = [mode for mode in modes if mode not in variant.without]
    for mode in modes:
        race.call(variant, race.before(variant, warm_up, mode), mode)()
    del warm_up
    found = {}
    for mode in modes:
        call = race.call(variant, race.before(variant, inputs, mode), mode)
        extra, result = measure.extra_memory(call, device)
        found[mode] = max(0.0, (extra - _bytes(result)) / 2**20)
        del call, result
    return found


def _bytes(result: Any) -> int:
    """Of all tensors in what a call returned."""
    if isinstance(result, torch.Tensor):
        return result.numel() * result.element_size()
    if isinstance(result, dict):
        result = tuple(result.values())
    return sum(map(_bytes, result)) if isinstance(result, (tuple, list)) else 0


def race_at(task: dict, emit: Emit) -> None:
    """Events: for each variant "started", then its errors or why it failed; then times and figures.

    "started" comes before every call, so that the parent knows whose call does not end.
    """
    race, shape, device = bench.load(task["op"]), task["shape"], torch.device(task["device"])
    inputs = race.draw(shape, device)
    variants = race.variants(device)
    modes = task.get("modes", race.modes)
    ready = {}
    for name in task["variants"]:
        emit(started=name)
        event: dict[str, Any] = {"variant": name}
        try:
            if task["memory"] and measure.can_measure_memory(device):
                event["extra_mb"] = memory(race, variants[name], shape, inputs, modes, device)
            verdict = race.gate(variants[name], inputs, shape)
            event["errors"] = verdict.errors
            if verdict.wrong:
                event["wrong"] = verdict.wrong
            else:
                ready[name] = variants[name]
        except Exception as error:  # reported, not hidden
            lacks = isinstance(error, NotImplementedError) and not variants[name].ours
            text = str(error) if lacks else f"{type(error).__name__}: {error}"
            event["skipped" if lacks else "failed"] = text.partition("\n")[0][:200]
        emit(**event)
    share = task["seconds"] / len(modes) / max(1, len(ready))
    best: dict[str, dict[str, float]] = {name: {} for name in ready}
    for mode in modes:
        calls, rounds, once = {}, {}, {}
        for name, variant in ready.items():
            if mode in variant.without:
                continue
            calls[name] = partial(
                _once, race, variant, inputs, mode, device, task, partial(emit, started=name)
            )
            each = calls[name]()  # what it loads or compiles does not count
            if each < share or variant.compiled:
                each = max(calls[name](), 1e-9)
            if each < share:
                rounds[name] = max(LEAST_ROUNDS, min(task["rounds"], int(share / each)))
            else:  # beside the seconds that a call takes, what it loads is little
                rounds[name], once[name] = 0, measure.statistics_of([each])
        times = once | measure.take_turns(calls, rounds)
        for name, of in times.items():
            best[name][mode] = of["best"]
        emit(mode=mode, times=times)
    for name, variant in ready.items():
        emit(figures=race.figures(variant, inputs, shape, best[name]), of=name)


def _once(race, variant, inputs, mode, device, task, announce) -> float:
    """Seconds of a call, some after the one before and after the parent knows of it.

    OpenMP's threads spin for some milliseconds when their work is done, and the parent's wake up to
    read: both would take cores from the call.
    """
    announce()
    call = race.call(variant, race.before(variant, inputs, mode), mode)
    time.sleep(task["pause"])
    return measure.seconds(call, device, task.get("cpu_time", False))


def facts(task: dict, emit: Emit) -> None:
    """Event: the machine, versions, instruction set and what it can do at most."""
    device = torch.device(task["device"])
    emit(
        machine=measure.machine(),
        versions=peers.versions(),
        isa=None if native.why_missing else native.module().isa(),
        peaks=peak.probe(device, task["threads"]) if task["peak"] else {},
    )


def bound_memory() -> None:
    """Makes an allocation that would not fit fail here, before the kernel kills something."""
    if measure.available() < float("inf"):
        limit = measure.status("VmData") + int(0.95 * measure.available())
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def main() -> None:
    task = json.load(sys.stdin)
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an event
    torch.set_num_threads(task["threads"])
    if task["device"] == "cpu":
        bound_memory()

    def emit(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    {"facts": facts, "race": race_at}[task["what"]](task, emit)


if __name__ == "__main__":
    main()
