"""What the benchmarks share: taking turns, extra memory, and facts about the machine."""

import ctypes
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def take_turns(
    calls: dict[str, Callable[[], float]],
    seconds: float,
    least: int,
    most: dict[str, int] | None = None,
    pause: float = 0.0,
) -> dict[str, dict[str, float]]:
    """Median and best of what the calls return (seconds), and how often each was made.

    Every round makes each call once, so that a disturbance hits all of them, in an order of its
    own, so that what a call leaves in the caches does. It ends after ``seconds`` but not before
    ``least`` rounds; ``most`` bounds the rounds that a call takes part in. Each call comes
    ``pause`` seconds after the one before: OpenMP's threads spin for some milliseconds when their
    work is done and would take the cores from whatever does not use OpenMP.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, end, rounds = list(calls), time.perf_counter() + seconds, 0
    shuffle = random.Random(0)
    last = max(most.values(), default=0) if most is not None else float("inf")
    while rounds < last and (rounds < least or time.perf_counter() < end):
        for name in shuffle.sample(names, len(names)):
            if most is None or rounds < most[name]:
                time.sleep(pause)
                times[name].append(calls[name]())
        rounds += 1
    return {
        name: {"median": statistics.median(t), "best": min(t), "rounds": len(t)}
        for name, t in times.items()
        if t
    }


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024


def resident() -> int:
    """Bytes of this process in memory, after the allocator gave back what it could."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_of(call: Callable[[], object]) -> tuple[int, object]:
    """The most bytes that this process had in memory during ``call``, and what it returned.

    Linux only: the kernel's high-water mark is set back before.
    """
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    return _status("VmHWM"), result


def available() -> int:
    """Bytes of memory that can be had without swapping."""
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024


def machine() -> dict:
    """Processor, its features that matter here, threads, memory and versions; no date, no name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""

    def field(name):
        found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
        return found.group(1) if found else ""

    return {
        "cpu": field("model name") or platform.processor() or platform.machine(),
        "family": " ".join(
            f"{name} {field(name)}" for name in ("vendor_id", "cpu family", "model")
        ),
        "flags": [f for f in field("flags").split() if re.match("avx|amx|fma|f16c|sse4", f)],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
