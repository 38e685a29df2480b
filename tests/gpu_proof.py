"""Proofs about GPU code that need no GPU; every op's tests use them.

- ``run_python``: a snippet in a fresh process, for what is fixed at import (TRITON_INTERPRET,
  FASTRL_ISA, FASTRL_NATIVE).
- ``round_bf16_when_interpreted``: makes Triton's interpreter round to bf16 as a GPU does.
- ``compile_triton``: a Triton kernel ahead of time, with what it costs.
- ``compile_cuda``: a .cu with nvcc, warnings as errors, with what each kernel costs.
- ``build_on_host``, ``run_on_host``: a .cu built by g++ with tests/cuda_host, run under
  AddressSanitizer.
- ``needs_gpu``: marks a test as one for a machine with a GPU, and skips it elsewhere.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"


def needs_gpu(test):
    """Marks ``test`` with ``gpu`` and skips it where torch sees no CUDA device."""
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
    return pytest.mark.gpu(missing(test))


@dataclass(frozen=True)
class Cost:
    """What one thread of a kernel takes, and a block in shared memory."""

    kernel: str
    registers: int
    local: int  # bytes of spills and of the stack
    shared: int  # bytes, static and dynamic
    ptx: str = ""

    def check(
        self,
        *,
        registers: int = 255,
        shared: int = 227 * 1024,
        local: int = 0,
        wgmma: bool = False,
    ) -> None:
        """Asserts limits kept and, if asked, Hopper's matrix products, not waiting for each other.

        By default nothing may spill.
        """
        assert self.local <= local, f"{self.kernel} spills {self.local} bytes"
        assert self.registers <= registers, f"{self.kernel}: {self.registers} registers"
        assert self.shared <= shared, f"{self.kernel}: {self.shared} bytes of shared memory"
        if wgmma:
            assert "wgmma.mma_async" in self.ptx, f"{self.kernel} has no wgmma"
            assert "serialized" not in _assembler_says(self.ptx), f"{self.kernel}: wgmma waits"


def run_python(code: str, **environment: str) -> str:
    """Runs ``code`` in tests/ in a new interpreter; its output, AssertionError if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TESTS,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{environment} exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def round_bf16_when_interpreted() -> None:
    """From here on Triton's interpreter rounds float32 to bf16 where by itself it truncates.

    The error of a kernel that rounds between two products is then that of a GPU.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        x = np.ascontiguousarray(x)
        if (source, target) == (tl.float32, tl.bfloat16):
            floats = torch.from_numpy(x.view(np.float32))
            return floats.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return (x.view(np.uint16).astype(np.uint32) << 16).reshape(x.shape)
        return convert(x, source, target, mode)

    interpreter._convert_float = rounded


def compile_triton(
    kernel: object,
    signature: dict[str, str],
    constants: dict[str, object],
    *,
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
    fusion: bool = True,
    aligned: tuple[str, ...] = (),
) -> Cost:
    """Compiles a ``@triton.jit`` kernel for ``capability`` (80, 90).

    ``signature`` gives Triton's type of each argument ("*fp32", "i64", ...) in order, ``constants``
    the value of each tl.constexpr and of each pointer that is None; ``aligned`` names the pointers
    and sizes that are multiples of 16, as Triton finds out at a launch. Without ``fusion`` no
    product is rounded together with a sum.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    compiled = triton.compile(
        ASTSource(kernel, {n: types[n] for n in names}, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            "maxnreg": maxnreg,
            "enable_fp_fusion": fusion,
        },
    )
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        done = subprocess.run([cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", done.stdout)}
    return Cost(
        kernel=kernel.__name__,
        registers=usage["REG"],
        local=usage["STACK"] + usage["LOCAL"],
        shared=max(usage["SHARED"], compiled.metadata.shared),
        ptx=compiled.asm["ptx"],
    )


def _assembler_says(ptx: str) -> str:
    """What ptxas reports of PTX for Hopper, such as products that wait for one another."""
    from triton.backends.nvidia.compiler import get_ptxas

    takes_arch = bool(inspect.signature(get_ptxas).parameters)  # since Triton 3.6
    ptxas = (get_ptxas(90) if takes_arch else get_ptxas()).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [ptxas, "-arch=sm_90a", "-v", source, "-o", source.with_suffix(".cubin")],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def nvcc() -> str | None:
    """The CUDA compiler, where there is one."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def compile_cuda(source: str, arch: str, folder: Path) -> list[Cost]:
    """Compiles csrc/cuda/``source`` for "80" or "90a", warnings as errors."""
    done = subprocess.run(
        [
            *(nvcc(), "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v"),
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            *("-Xcompiler", "-Wall", "-c", CSRC / "cuda" / source, "-o", folder / "out.o"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [
        Cost(
            kernel=block.split("'")[1],
            registers=_sum(r"Used (\d+) registers", block),
            local=_sum(r"(\d+) bytes (?:stack frame|spill)", block),
            shared=_sum(r"(\d+) bytes smem", block),
        )
        for block in done.stderr.split("Compiling entry function ")[1:]
    ]


def _sum(pattern: str, text: str) -> int:
    return sum(int(n) for n in re.findall(pattern, text))


def build_on_host(source: str, folder: Path, *, sanitize: bool = True) -> Path:
    """tests/cuda_host/``source``, which includes a .cu, as a library, by default with sanitizers.

    Without them a process that did not start under AddressSanitizer can load it too.
    """
    library = folder / "libhost.so"
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all") if sanitize else ()
    done = subprocess.run(
        [
            *("g++", "-std=c++17", "-O1", "-g", "-fPIC", "-shared"),
            *checks,
            *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
            *("-I", TESTS / "cuda_host", TESTS / "cuda_host" / source, "-o", library),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return library


def run_on_host(library: Path, code: str, folder: Path, **arrays: np.ndarray) -> dict:
    """Runs ``code`` under AddressSanitizer with ``lib`` (ctypes) and the ``arrays`` by name.

    The code fills a dict ``out`` of arrays, which is returned. Arrays are allocated one by one, so
    that an access beyond any of them is found.
    """
    given, made = folder / "given.npz", folder / "made.npz"
    np.savez(given, **arrays)
    script = (
        "import ctypes, numpy as np\n"
        f"lib = ctypes.CDLL({str(library)!r})\n"
        f"globals().update(np.load({str(given)!r}))\n"
        f"out = {{}}\n{code}\n"
        f"np.savez({str(made)!r}, **out)\n"
    )
    asan = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    run_python(
        script,
        LD_PRELOAD=asan.stdout.strip(),
        ASAN_OPTIONS="detect_leaks=0",
        PYTHONMALLOC="malloc",
    )
    with np.load(made) as loaded:
        return dict(loaded)
