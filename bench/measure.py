"""What the benchmarks measure with: turns on the clock, memory, facts about the machine."""

import ctypes
import os
import platform
import random
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds(call: Callable[[], Any], device: torch.device, cpu_time: bool = False) -> float:
    """How long a call takes, all of it done; what it returns is dropped after that.

    With ``cpu_time`` what its process's threads took together, waiting for a core left out.
    """
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        took = start.elapsed_time(end) / 1e3
    else:
        clock = time.process_time if cpu_time else time.perf_counter
        began = clock()
        result = call()
        took = clock() - began
    del result
    return took


def take_turns(
    calls: dict[str, Callable[[], float]], rounds: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Statistics of what each call returns (seconds) in its number of rounds.

    Every round makes each call once, so that a disturbance hits all of them, in an order of its
    own, so that what a call leaves in the caches does.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    for turn in range(max(rounds.values(), default=0)):
        for name in shuffle.sample(list(calls), len(calls)):
            if turn < rounds[name]:
                times[name].append(calls[name]())
    return {name: statistics_of(t) for name, t in times.items() if t}


def statistics_of(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile and best of some seconds, and how many there are."""
    p20, median, p80 = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {
        "median": median.item(),
        "p20": p20.item(),
        "p80": p80.item(),
        "best": min(times),
        "rounds": len(times),
    }


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024


def can_measure_memory(device: torch.device) -> bool:
    """On a CPU the kernel's high-water mark has to be there and be set back: Linux."""
    return device.type == "cuda" or os.access("/proc/self/clear_refs", os.W_OK)


def extra_memory(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The bytes that a call takes at most beyond what was there before, and what it returned."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    return status("VmHWM") - before, result


def available() -> float:
    """Bytes of memory that can be had without swapping; no bound where Linux does not say."""
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.exists() else ""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else float("inf")


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


def typed(arguments: list[str]) -> str:
    """The command line of ``arguments``: files by their names, as their folders say nothing."""
    return shlex.join(["fastrl", *(re.sub(r"[^=]*/", "", argument) for argument in arguments)])


def commit() -> str | None:
    """The commit of the source tree this runs from, "+" where it was changed; None without one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed: the version says what it is
        return None
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
