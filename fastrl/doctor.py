"""What this machine has, which implementation each op uses here and why, and what is missing."""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from fastrl import installation
from fastrl.bench.measure import machine
from fastrl.kernels import IMPLEMENTATIONS, native

# Package, and what is lost without it.
OPTIONAL = {
    "reasoning_gym": "none of its tasks, which all shipped recipes but hf_grpo train on",
    "trl": "no patching of TRL's trainers, no race against them",
    "datasets": "no parquet files; JSON lines still work",
    "tensorboard": "no such tracker; metrics.jsonl is always there",
}
GPU_OPTIONAL = {"triton": "on a GPU ops fall back to CUDA or plain PyTorch"}
# What each instruction set adds for the kernels.
ADDS = {
    "generic": "plain C++, for any CPU",
    "avx2": "8 floats at a time",
    "avx512": "16 floats at a time",
    "avx512_vnni": "int8 dot products, four times the floats' rate",
    "avx512_bf16": "bf16 dot products, twice the floats' rate",
    "amx": "bf16 and int8 tiles, about ten times the floats' rate",
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return next(iter(done.stdout.splitlines()), command[0])


def _compiler() -> str | None:
    named = os.environ.get("CXX", "").split()[:1]
    path = next(filter(None, map(shutil.which, [*named, "c++", "g++", "clang++"])), None)
    return None if path is None else _first_line(path, "--version")


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "release" in line]
    return f"{path}, {lines[0].split('release')[-1].strip()}" if lines else path


def _gpus() -> list[str]:
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        of = torch.cuda.get_device_properties(i)
        found.append(f"{of.name}, sm_{of.major}{of.minor}, {of.total_memory / 2**30:.0f} GB")
    return found


def _backends() -> list[str]:
    """What connects the processes of torchrun."""
    if not dist.is_available():
        return []
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return [name for name, there in found.items() if there]


def _instruction_sets() -> list[dict[str, Any]]:
    """Each one that the build has: whether it runs here, and which is in use; every op has all."""
    if native.why_missing:
        return []
    compiled, here = native.module().build_info()["isas"], native.module().cpu_isas()
    names = dict.fromkeys([*ADDS, *compiled])
    return [
        {
            "name": name,
            "adds": ADDS.get(name, ""),
            "compiled": name in compiled,
            "runs_here": name in here,
            "in_use": name == native.module().isa(),
        }
        for name in names
    ]


def _ops() -> list[dict[str, Any]]:
    """For each op and device: what "auto" runs, why, and what is faster but not to be had."""
    found = []
    for op, has in IMPLEMENTATIONS.items():
        for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
            at = torch.device(device)
            fast = [i for i in native.FAST[device] if i in has]
            usable = [i for i in fast if native.unavailable(i, at) is None]
            chosen = usable[0] if usable else "reference"
            better = fast[: fast.index(chosen)] if chosen in fast else fast
            if better:
                reasons = {i: native.unavailable(i, at) for i in better}
                short = {native.why_missing: "no native kernels"}
                why = "; ".join(f"{i}: {short.get(r or '', r)}" for i, r in reasons.items())
            elif not fast:
                why = "plain PyTorch; no kernel for this device exists yet"
            elif chosen == "cpu":
                why = f"C++, {native.module().isa()}"
            else:
                why = "the first of " + ", ".join(fast)
            found.append(
                {"op": op, "device": device, "impl": chosen, "why": why, "slow": bool(better)}
            )
    missing = native.unavailable("cpu", torch.device("cpu"))
    why = "C++ for Llama, Mistral, Qwen2, Qwen3, Gemma 2; others as Hugging Face has them"
    if missing:
        why = "cpu: no native kernels"
    impl = "Hugging Face" if missing else "cpu"
    decode = {"op": "RolloutEngine", "device": "cpu", "impl": impl, "why": why}
    return [*found, decode | {"slow": missing is not None}]


def _missing(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What is not here, the command that brings it, and what its lack costs."""
    found = []

    def add(what: str, get: str, costs: str) -> None:
        found.append({"what": what, "get": get, "costs": costs})

    if native.why_missing:
        off = os.environ.get("FASTRL_NATIVE") == "off"
        compiler = "" if facts["C++ compiler"] else "apt-get install g++, then "
        add(
            "native kernels",
            "unset FASTRL_NATIVE" if off else compiler + installation.rebuild(),
            "every op runs in plain PyTorch: several times slower, logits held in memory",
        )
    elif facts["GPU"] and not native.module().build_info()["cuda"]:
        add(
            "CUDA kernels",
            f"FASTRL_CUDA=on {installation.rebuild()}"
            + ("" if facts["nvcc"] else ", with nvcc on PATH"),
            "on the GPU ops fall back to Triton or plain PyTorch",
        )
    if facts["C++ compiler"] is None:
        add(
            "C++ compiler",
            "apt-get install g++",
            "neither fastrl's kernels nor torch.compile build",
        )
    for package, costs in (OPTIONAL | (GPU_OPTIONAL if facts["GPU"] else {})).items():
        if find_spec(package) is None:
            add(package, installation.get(package), costs)
    return found


def diagnose() -> dict[str, Any]:
    """The diagnosis: `facts`, `isas`, `ops`, `missing`, all of what JSON can hold."""
    at = machine()
    facts: dict[str, Any] = {
        "fastrl": _version("fastrl"),
        "python": sys.version.split()[0],
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())).strip(),
        "CPU": at["cpu"],
        "flags": " ".join(at["flags"]),
        "cores": f"{at['cores']}, torch uses {at['threads']} threads",
        "memory": f"{at['memory_gb']} GB",
        "GPU": ", ".join(_gpus()) or None,
        "C++ compiler": _compiler(),
        "nvcc": _nvcc(),
        "torch": torch.__version__,
        "torchrun": ", ".join(_backends()) or None,
        **{p: _version(p) for p in ("triton", "flash-attn", "transformers", "peft")},
        "native kernels": native.why_missing or "loaded",
    }
    if not native.why_missing:
        build = native.module().build_info()
        facts["built with"] = build["compiler"]
        facts["built for CUDA"] = build["cuda_archs"] or None
    settings = {k: v for k, v in os.environ.items() if k.startswith("FASTRL_")}
    facts["settings"] = " ".join(f"{k}={v}" for k, v in settings.items()) or None
    return {
        "facts": facts,
        "isas": _instruction_sets(),
        "ops": _ops(),
        "missing": _missing(facts),
    }


def _show(found: dict[str, Any], console: Console) -> None:
    facts = Table(title="machine and packages", title_justify="left", show_header=False)
    for name, value in found["facts"].items():
        facts.add_row(name, "none" if value is None else str(value))
    console.print(facts)
    if found["isas"]:
        isas = Table(title="instruction sets; every op is built for each", title_justify="left")
        for column in ("name", "built", "this CPU", "in use", "what it adds"):
            isas.add_column(column)
        for isa in found["isas"]:
            flags = ("yes" if isa[k] else "" for k in ("compiled", "runs_here", "in_use"))
            isas.add_row(isa["name"], *flags, isa["adds"], style="bold" if isa["in_use"] else None)
        console.print(isas)
    ops = Table(title="ops on this machine", title_justify="left", show_lines=True)
    longest = max(len(op["op"]) for op in found["ops"])
    ops.add_column("ops", overflow="fold", min_width=longest + len(","))
    for column in ("device", "implementation", "why"):
        ops.add_column(column, overflow="fold")
    alike: dict[tuple, list[str]] = {}
    for op in found["ops"]:
        key = (op["device"], op["impl"], op["why"], op["slow"])
        alike.setdefault(key, []).append(op["op"])
    for (device, impl, why, slow), names in alike.items():
        ops.add_row(", ".join(names), device, impl, why, style="yellow" if slow else None)
    console.print(ops)
    for missing in found["missing"]:
        console.print(
            f"missing: {missing['what']}; {missing['get']}   (without: {missing['costs']})",
            markup=False,
            highlight=False,
        )


def _selftest(console: Console, quiet: bool) -> list[dict[str, Any]]:
    from fastrl import selftest

    table = Table(
        title="self-test: each op's worst result against float64",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="error: relative, in the 2-norm, quantization included; of tokens, how many\n"
        "differ; of RolloutEngine, the largest of a log-prob\n"
        "limit: twice that of plain PyTorch in the same dtype, and 2e-6",
        caption_justify="left",
    )
    table.add_column("op", no_wrap=True)
    table.add_column("runs", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("worst result", overflow="fold", min_width=12)
    for column in ("error", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    results = []
    for result in selftest.run():
        error = None if math.isnan(result.error) else result.error
        results.append(asdict(result) | {"error": error, "verdict": result.verdict})
        style = {"WRONG": "bold red", "untested": "yellow"}.get(result.verdict)
        table.add_row(
            result.op,
            result.impl if result.device == result.impl else f"{result.impl} on {result.device}",
            *(result.verdict, result.wrong or result.what),
            *(f"{result.error:.1e}", f"{result.limit:.1e}"),
            style=style,
        )
    if not quiet:
        console.print(table)
    return results


def report(console: Console, *, selftest: bool = False, as_json: bool = False) -> int:
    """Print the diagnosis, or with `selftest` what running every op gave; as JSON, both.

    Returns 0 where all is well; 1 where an op runs slower than this machine allows or, with
    `selftest`, where one was wrong.
    """
    found = diagnose()
    code = int(any(op["slow"] for op in found["ops"]))
    if not as_json and not selftest:
        _show(found, console)
    if selftest:
        found["selftest"] = _selftest(console, quiet=as_json)
        code = int(any(r["verdict"] == "WRONG" for r in found["selftest"]))
    if as_json:
        console.print_json(json.dumps(found, allow_nan=False))
    return code
