"""The GPU code of the scans: proofs that need no GPU, and tests for where there is one."""

import itertools
import shutil
from importlib.util import find_spec

import gpu_proof
import numpy as np
import pytest
import torch
from test_scan import OPS, OPTIONS, TOKENS, assert_accurate, assert_same, check, draw, pack, run

from fastrl.kernels import native

GPU_IMPLS = ("triton", "cuda")

# ---- Triton --------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
FLOATS = ("gamma", "gamma_lam", "rho_bar", "c_bar")
TYPES = {"mask": "*i1", "cu_seqlens": "*i32", "length": "i64", **dict.fromkeys(FLOATS, "fp32")}


def check_interpreted():
    """Run in a process with TRITON_INTERPRET=1: odd sizes, masks and a packed batch."""
    check("triton", (1,), (1,))
    check("triton", (3,), (33,))
    for op in OPS:  # more than one block
        long = draw(1, 1100, "inside")
        assert_accurate(op, long, run(op, long, "triton"))
    case = draw(5, 70, "right")
    for op in OPS:
        assert_same(
            run(op, pack(case), "triton"), [x[case["mask"]] for x in run(op, case, "triton")]
        )


@needs_triton
def test_triton_interpreted():
    gpu_proof.run_python("from test_scan_gpu import *; check_interpreted()", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles_without_spills(op, capability):
    from fastrl.kernels.scan.triton_kernels import BLOCK, KERNELS, WARPS

    kernel = KERNELS[op]
    for masked, packed, bootstrap in ((False, False, False), (True, True, True)):
        given = {"mask": masked, "cu_seqlens": packed, "bootstrap": bootstrap}
        flags = {"MASKED": masked, "PACKED": packed, "BOOTSTRAP": bootstrap, "BLOCK": BLOCK}
        constants = flags | {name: None for name, there in given.items() if not there}
        arguments = [n for n in kernel.arg_names if n not in constants]
        signature = {n: TYPES.get(n, "*fp32") for n in arguments}
        gpu_proof.compile_triton(
            kernel, signature, constants, capability=capability, num_warps=WARPS
        ).check(registers=128)


# ---- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.skipif(gpu_proof.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_cuda_compiles_without_spills(arch, tmp_path):
    costs = gpu_proof.compile_cuda("scan.cu", arch, tmp_path)
    assert len(costs) == len(OPS)
    for cost in costs:
        print(cost)
        cost.check(registers=128)


HOST = """
P, L, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
address = lambda x: x.ctypes.data if x.size else None
class Segments(ctypes.Structure):
    _fields_ = [("count", L), ("length", L), ("offsets", P), ("mask", P), ("bootstrap", P)]
def call(name, arrays, coefficients, segments):
    fields = [("at", Segments)] + [(f"p{i}", P) for i in range(len(arrays))]
    fields += [(f"f{i}", F) for i in range(len(coefficients))]
    Args = type("Args", (ctypes.Structure,), {"_fields_": fields})
    args = Args(segments, *map(address, arrays), *map(float, coefficients))
    assert getattr(lib, name)(ctypes.byref(args)) == 0
"""


def run_on_host(library, folder, op, case, outputs):
    """The .cu's outputs for ``case``, from buffers that were full of NaN."""
    gamma_lam = {"lam": OPTIONS[op]["gamma"] * OPTIONS[op]["lam"]} if op != OPS[1] else {}
    rewards, packed = case["rewards"], case.get("cu_seqlens")
    at = {n: case.get(n) for n in ("mask", "cu_seqlens", "bootstrap")}
    made = gpu_proof.run_on_host(
        library,
        HOST
        + f"tokens = [{', '.join(TOKENS[op])}]\n"
        + f"results = [np.full_like(rewards, np.nan) for _ in range({outputs})]\n"
        + "segments = Segments(*map(int, shape), *map(address, (cu_seqlens, mask, bootstrap)))\n"
        + f"call({op!r}, tokens + results, coefficients, segments)\n"
        + "out = {str(i): x for i, x in enumerate(results)}",
        folder,
        shape=np.array(rewards.shape if packed is None else (len(packed) - 1, 0)),
        coefficients=np.array([*{**OPTIONS[op], **gamma_lam}.values()]),
        **{n: case[n].numpy() for n in TOKENS["vtrace"]},
        **{n: np.zeros(0) if x is None else x.numpy() for n, x in at.items()},
    )
    return tuple(torch.from_numpy(x) for x in made.values())


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return gpu_proof.build_on_host("scan.cpp", tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backwards", [False, True])
def test_cuda_runs_on_the_host(library, tmp_path, op, backwards, monkeypatch):
    if backwards:
        monkeypatch.setenv("CUDA_HOST_BACKWARDS", "1")
    cases = [draw(1, 1), draw(5, 31, "left"), draw(3, 333, "inside"), draw(2, 700, "right")]
    cases += [draw(3, 33, "everything"), draw(2, 40, "inside", bootstrap=False)]
    cases += [pack(draw(9, 70, "right"))]
    for case in cases:
        outputs = len(run(op, case, "reference"))
        assert_accurate(op, case, run_on_host(library, tmp_path, op, case, outputs))


def test_the_host_build_finds_what_a_gpu_would_hide(library, tmp_path):
    """Values one token short of the rewards: the process dies of an access beyond the end."""
    case = draw(1, 400)
    case["values"] = case["values"][:, 1:].contiguous()
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        run_on_host(library, tmp_path, "gae", case, outputs=2)


# ---- on a GPU ------------------------------------------------------------------------------------


def on_gpu(case):
    return {n: None if x is None else x.cuda() for n, x in case.items()}


@gpu_proof.needs_gpu
@pytest.mark.parametrize("impl", GPU_IMPLS)
@pytest.mark.parametrize("op", OPS)
def test_gpu_against_float64(op, impl):
    if (reason := native.unavailable(impl, torch.device("cuda"))) is not None:
        pytest.skip(reason)
    for b, t, mask in itertools.product((1, 17, 333), (1, 33, 1000), (None, "left", "inside")):
        case = draw(b, t, mask)
        assert_accurate(op, case, run(op, on_gpu(case), impl))
    case = draw(17, 333, "right")
    padded = run(op, on_gpu(case), impl)
    assert_accurate(op, pack(case), run(op, on_gpu(pack(case)), impl))
    row = {n: None if x is None else x[7, None] for n, x in on_gpu(case).items()}
    assert_same([x[7, None] for x in padded], run(op, row, impl))
    empty = on_gpu(draw(0, 5))
    assert all(x.shape == (0, 5) for x in run(op, empty, impl))


@gpu_proof.needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_gpu_compile(op):
    case = on_gpu(draw(17, 333, "inside"))
    compiled = torch.compile(lambda case: run(op, case, "auto"), fullgraph=True)
    assert_same(run(op, case, "auto"), compiled(case))
