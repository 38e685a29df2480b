"""What this machine can do at most: arithmetic in registers, reading and copying memory.

python bench/peak.py [--threads 1 2] [--json FILE]

Compiles peak.cpp with the project's flags for every instruction set that the CPU has, so it needs
g++. Other processes on the machine lower the figures: run it where nothing else runs.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# What /proc/cpuinfo calls the last thing that each instruction set adds.
NEEDS = {
    "avx2": "avx2",
    "avx512": "avx512vl",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_bf16",
}
# The figure that bounds a matrix product, of the figures of its instruction set.
BOUND = {
    ("amx", "bfloat16"): "bf16_tiles",
    ("avx512_bf16", "bfloat16"): "bf16_dot",
}


def instruction_sets() -> list[str]:
    """Those of CMakeLists.txt that this CPU has, slowest first."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", cpuinfo.read_text())) if cpuinfo.exists() else set()
    return ["generic", *(isa for isa, flag in NEEDS.items() if flag in flags)]


def compiler_flags(isa: str) -> list[str]:
    """The flags that CMakeLists.txt compiles ``isa`` with."""
    cmake = (HERE.parent / "CMakeLists.txt").read_text()
    common = re.search(r"LANGUAGE:CXX>:([^>]*)>", cmake).group(1).split(";")

    def of(name):
        found = re.search(rf"set\(FASTRL_FLAGS_{name} ([^)]*)\)", cmake).group(1)
        return re.sub(r"\$\{FASTRL_FLAGS_(\w+)\}", lambda m: of(m[1]), found)

    return ["-std=c++17", *common, *([] if isa == "generic" else of(isa).split())]


def measure(threads: list[int], seconds=0.5) -> dict:
    """1e9 operations (`compute`, by instruction set) and bytes (`memory`) a second, by threads.

    A multiplication and an addition are two operations; a copy counts what it reads and what it
    writes. Takes about ``seconds`` for each figure. Raises RuntimeError where g++ is missing or the
    program does not build.
    """
    isas = instruction_sets()
    counts = [str(n) for n in sorted(set(threads))]
    result = {"compute": {isa: {} for isa in isas}, "memory": {}}
    with tempfile.TemporaryDirectory() as folder:
        for isa in isas:
            program = f"{folder}/peak_{isa}"
            _run("g++", *compiler_flags(isa), "-pthread", str(HERE / "peak.cpp"), "-o", program)
            for n in counts:
                result["compute"][isa][n] = _figures(program, n, seconds, "compute")
        for n in counts:
            result["memory"][n] = _figures(program, n, seconds, "memory")
    return result


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is missing: install a C++ compiler") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)} failed:\n{error.stderr}") from error


def _figures(program: str, threads: str, seconds: float, what: str) -> dict[str, float]:
    lines = _run(program, threads, str(seconds), what).splitlines()
    return {name: float(value) for name, value in map(str.split, lines)}


def flops(peaks: dict, isa: str, threads: int, dtype: str) -> float:
    """Operations a second at most in a matrix product of ``dtype`` on ``isa``.

    Without instructions for them, 16-bit types are computed in float32.
    """
    return peaks["compute"][isa][str(threads)][BOUND.get((isa, dtype), "float32")] * 1e9


def bandwidth(peaks: dict, threads: int) -> float:
    """Bytes a second at most from memory, read; tensors lie in pages of 4 KB unless asked."""
    return peaks["memory"][str(threads)]["read_4k_pages"] * 1e9


def operations(tokens, width, vocab, backward: bool, kept=0.0) -> float:
    """Operations of linear_logprob: 2NHV forward; 8NHV with the backward, which has two products

    of its own and computes the logits again, except for the share ``kept`` of them: 8NHV - 2NHV
    kept. ``tokens`` are those not ignored.
    """
    return 2.0 * tokens * width * vocab * (4 - kept if backward else 1)


def traffic(tokens, width, vocab, itemsize: int, backward: bool) -> float:
    """Bytes that have to move: forward W and hidden read once, (V + N) H itemsize.

    With the backward both are read twice and each of their gradients is written once: three times
    that. Statistics ([N]) are not counted, nor what is kept for the backward.
    """
    return float((vocab + tokens) * width * itemsize * (3 if backward else 1))


def floor(peaks, isa, threads, shape, dtype, backward: bool, kept=0.0) -> float:
    """Seconds that no implementation of this arithmetic goes below on this machine.

    max(operations / peak, traffic / bandwidth), with ``shape`` (tokens not ignored, width, vocab).
    """
    itemsize = 4 if dtype == "float32" else 2
    return max(
        operations(*shape, backward, kept) / flops(peaks, isa, threads, dtype),
        traffic(*shape, itemsize, backward) / bandwidth(peaks, threads),
    )


def table(peaks: dict) -> str:
    """The figures as text, a column for each number of threads."""
    counts = list(peaks["memory"])
    lines = [f"{'':32s}" + "".join(f"{n + ' threads':>14s}" for n in counts)]
    for isa, by_threads in peaks["compute"].items():
        for name in by_threads[counts[0]]:
            values = "".join(f"{by_threads[n][name]:14.1f}" for n in counts)
            lines.append(f"{isa + ' ' + name + ', 1e9 op/s':32s}{values}")
    for name in peaks["memory"][counts[0]]:
        values = "".join(f"{peaks['memory'][n][name]:14.1f}" for n in counts)
        lines.append(f"{name + ', GB/s':32s}{values}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    peaks = measure(options.threads, options.seconds)
    print(table(peaks))
    if options.json:
        options.json.write_text(json.dumps(peaks, indent=2) + "\n")


if __name__ == "__main__":
    main()
