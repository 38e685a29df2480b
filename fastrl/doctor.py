"""What this machine has, which implementation each op uses here and why, and what is missing."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table

# Package, extra that brings it, what is lost without it.
OPTIONAL = (
    ("triton", "triton", "Triton kernels on a GPU; ops fall back to CUDA or the reference"),
    ("datasets", "data", "parquet files; JSON lines still work"),
    ("tensorboard", "track", "the tensorboard tracker; metrics.jsonl is always written"),
    ("trl", "trl", "comparisons with TRL"),
    ("pytest_benchmark", "bench", "the microbenchmarks in bench/"),
)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _compiler() -> str:
    path = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return "none found; apt-get install g++ (needed only to build the native kernels)"
    first = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines()
    return first[0] if first else path


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that this torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def print_diagnosis(console: Console) -> int:
    """Print the diagnosis; returns 0, or 1 where the ops run slower than this machine allows."""
    from fastrl.kernels import IMPLEMENTATIONS, native

    facts = Table(title="machine and packages", title_justify="left", show_header=False)
    build = {} if native.why_missing else native.module().build_info()
    for name, value in (
        ("fastrl", _version("fastrl")),
        ("python", sys.version.split()[0]),
        (
            "machine",
            f"{platform.machine()}, {os.cpu_count()} cores, torch uses "
            f"{torch.get_num_threads()} threads",
        ),
        ("GPU", _gpus()),
        ("C++ compiler", _compiler()),
        ("nvcc", shutil.which("nvcc") or "none"),
        *((p, _version(p)) for p in ("torch", "triton", "transformers", "peft")),
        ("native kernels", native.why_missing or "loaded"),
        *((k, str(v)) for k, v in build.items()),
        *((("ISA in use", native.module().isa()),) if build else ()),
    ):
        facts.add_row(name, value)
    console.print(facts)

    table = Table(title="ops on this machine", title_justify="left")
    for column in ("op", "device", "implementation", "why not a faster one"):
        table.add_column(column, overflow="fold")
    slow = False
    for op, has in IMPLEMENTATIONS.items():
        for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
            at = torch.device(device)
            fast = [i for i in native.FAST[device] if i in has]
            usable = [i for i in fast if native.unavailable(i, at) is None]
            chosen = usable[0] if usable else "reference"
            better = fast[: fast.index(chosen)] if chosen in fast else fast
            why = "; ".join(f"{i}: {native.unavailable(i, at)}" for i in better)
            slow |= bool(better)
            table.add_row(op, device, chosen, why or ("" if fast else "no faster one exists yet"))
    console.print(table)

    missing = [(p, extra, cost) for p, extra, cost in OPTIONAL if find_spec(p) is None]
    for package, extra, cost in missing:
        console.print(
            f"{package} is not installed: pip install 'fastrl[{extra}]' (without it: {cost})",
            markup=False,
        )
    return int(slow)
