"""What this machine can do at most: arithmetic in registers, reading and copying memory.

python -m fastrl.bench.peak [--threads 1 2] [--json FILE]   every instruction set of the CPU

The probe is in the compiled module (csrc/cpu/peak.cpp), once for each instruction set. Other
processes on the machine lower the figures: run it where nothing else runs.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastrl.bench import measure
from fastrl.bench.race import Work
from fastrl.kernels import native

# The figures that bound a matrix product of a dtype, the best that there is; what has no
# instructions of its own is computed in float32.
BOUND = {
    "float32": ("float32",),
    "bfloat16": ("bf16_tiles", "bf16_dot", "float32"),
    "float16": ("fp16", "float32"),
    "int8": ("int8_tiles", "int8_dot", "float32"),
}


def probe(device: torch.device, threads: int, seconds: float = 0.3) -> dict[str, float]:
    """1e9 operations or bytes a second by name, on the instruction set in use; {} without `_C`.

    A multiplication and an addition are two operations; a copy counts what it reads and what it
    writes. Takes about ``seconds`` for each figure.
    """
    if device.type == "cuda":
        return _gpu(device)
    return {} if native.why_missing else dict(native.module().peak_cpu(threads, seconds))


def _gpu(device: torch.device) -> dict[str, float]:
    """cuBLAS on square matrices, and a copy: what programs reach, not what the data sheet says."""

    def best(call):
        return min(measure.seconds(call, device) for _ in range(10))

    found = {}
    for name, dtype, n in (
        ("float32", torch.float32, 4096),
        ("bf16_tiles", torch.bfloat16, 8192),
        ("fp16", torch.float16, 8192),
    ):
        a = torch.randn(n, n, device=device, dtype=dtype)
        found[name] = 2e-9 * n**3 / best(lambda a=a: a @ a)
    a = torch.ones(8192, 8192, device=device, dtype=torch.int8)
    found["int8_tiles"] = 2e-9 * 8192**3 / best(lambda: torch._int_mm(a, a.t()))
    x = torch.empty(2**30, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    found["copy"] = 2e-9 * x.numel() / best(lambda: y.copy_(x))
    return found


def flops(peaks: dict[str, float], dtype: str) -> float:
    """Operations a second at most in a matrix product of ``dtype``."""
    return next(peaks[name] for name in BOUND[dtype] if name in peaks) * 1e9


def bandwidth(peaks: dict[str, float]) -> float:
    """Bytes a second at most; on a CPU read, as tensors lie, in pages of 4 KB."""
    return peaks.get("read_4k_pages", peaks.get("copy", 0.0)) * 1e9


def floor(peaks: dict[str, float], work: Work) -> dict[str, Any]:
    """Seconds that nothing goes below here, max(operations / peak, bytes / bandwidth), and which.

    What stays in the caches can be below the second.
    """
    times = {
        "operations": work.operations / flops(peaks, work.dtype),
        "bytes": work.bytes / bandwidth(peaks),
    }
    by = max(times, key=times.__getitem__)
    return {"floor": times[by], "by": by}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    found: dict[str, dict[str, dict[str, float]]] = {}
    code = "import sys, json, torch; from fastrl.bench import peak; n, s = sys.argv[1:]; "
    code += "print(json.dumps(peak.probe(torch.device('cpu'), int(n), float(s))))"
    for isa in native.module().cpu_isas():  # an instruction set is chosen once in a process
        for threads in sorted(set(options.threads)):
            command = [sys.executable, "-c", code, str(threads), str(options.seconds)]
            env = {**os.environ, "FASTRL_ISA": isa}
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            found.setdefault(isa, {})[str(threads)] = json.loads(done.stdout)
            for name, value in found[isa][str(threads)].items():
                unit = "GB/s" if "pages" in name else "1e9 op/s"
                print(f"{isa:12s} {threads:3d} threads {name:16s} {value:10.1f} {unit}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
