"""linear_logprob in Triton: interpreted, and compiled for GPUs that are not here."""

from importlib.util import find_spec

import gpu_proof
import pytest
import torch
from logprob_checks import (
    DTYPES,
    SMALL,
    check_accurate,
    check_bits_depend_on_no_other_row,
    check_chunks,
    check_each_output_alone,
    check_extreme_logits,
    check_ignored_and_empty,
    check_layouts,
    check_opcheck_and_compile,
    check_workspace,
)

from fastrl.kernels.logprob import gpu

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def check_interpreted_numbers():
    """Run in a process with TRITON_INTERPRET=1, whose bf16 truncates where a GPU rounds."""
    for dtype in DTYPES:
        for shape in SMALL:
            off = 4.0 if dtype == torch.bfloat16 else None
            check_accurate("triton", *shape, dtype, of_gradients=off)
    check_each_output_alone("triton")
    check_extreme_logits("triton")


def check_interpreted_rules():
    for dtype in DTYPES:
        check_workspace("triton", dtype, 9, 40, 700)
    check_bits_depend_on_no_other_row(torch.bfloat16)
    check_ignored_and_empty("triton")
    check_layouts("triton")
    check_chunks("triton")
    check_opcheck_and_compile("triton")


@needs_triton
@pytest.mark.parametrize("check", ["numbers", "rules"])
def test_triton_interpreted(check):
    code = f"from test_logprob_triton import *; torch.manual_seed(0); check_interpreted_{check}()"
    gpu_proof.run_python(code, TRITON_INTERPRET="1")


INTEGERS = ("rows", "vocab", "width", "weight_stride", "tiles", "kept_tiles", "kept_rows")
INTEGERS += ("kept_stride", "first_tile", "first", "gradient_stride")
MULTIPLES = ("width", "weight_stride", "kept_stride", "gradient_stride")  # of 16, in practice
OPERANDS = ("hidden", "weight", "gradient", "kept_exps")


def triton_cost(name, capability, tile, dtype="bf16", described=False, whole=True, flags=()):
    """What a kernel costs when compiled for these flags ("BIAS", "SOFTCAP", "KEEP", "SUMS")."""
    from fastrl.kernels.logprob import triton_kernels
    from fastrl.kernels.logprob import triton_launch as t

    kernel = getattr(triton_kernels, name)
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(INTEGERS, "i32")
    types |= {"target": "*i64", "logit_scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(OPERANDS, f"*{dtype}")
    if described:
        types["hidden"] = f"tensordesc<{dtype}[{tile.m},{tile.k}]>"
        types["weight"] = f"tensordesc<{dtype}[{tile.n},{tile.k}]>"
    rows = {"_merge_kernel": t.MERGE[1], "_bwd_kept_kernel": t.KEPT_ROWS}.get(name, tile.m)
    constants = {
        **{"M": rows, "N": tile.n, "K": tile.k, "T": t.MERGE[0], "GROUP": t.GROUP, "KEPT": 1},
        **{"STRIPE": gpu.STRIPE, "DESCRIBED": described, "WHOLE": whole, "WIDE": False},
        **{flag: int(flag in flags) for flag in ("BIAS", "SOFTCAP", "KEEP", "SUMS")},
    }
    absent = {"bias": "BIAS", "sums": "SUMS"}
    if name == "_fwd_kernel":
        absent |= {"kept_exps": "KEEP", "kept_highest": "KEEP"}
    constants |= {n: None for n, flag in absent.items() if flag not in flags}
    constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
    arguments = [n for n in kernel.arg_names if n not in constants]
    multiples = MULTIPLES if whole else ("kept_stride", "gradient_stride")
    cost = gpu_proof.compile_triton(
        kernel,
        {n: types[n] for n in arguments},
        constants,
        capability=capability,
        num_warps=4 if name in ("_merge_kernel", "_bwd_kept_kernel") else tile.warps,
        num_stages=tile.stages,
        aligned=tuple(n for n in arguments if types[n][0] == "*" or n in multiples),
    )
    print(name, capability, tile, dtype, described, whole, flags, cost.registers, cost.shared)
    return cost


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_fwd_kernel", "_bwd_kernel"])
def test_triton_products_compile_without_spills(name, capability):
    from fastrl.kernels.logprob.triton_launch import ENGINE, FLOAT, HALF

    every = ("BIAS", "SOFTCAP", "KEEP", "SUMS")
    hopper = capability == 90
    for flags in ((), every):
        for dtype in ("bf16", "fp16"):
            cost = triton_cost(name, capability, HALF, dtype, flags=flags)
            cost.check(wgmma=hopper, shared=163 * 1024)  # sm_80's limit
    if hopper:
        for flags in ((), ("KEEP",), ("SUMS",), ("SOFTCAP",), every):
            cost = triton_cost(name, capability, ENGINE, described=True, flags=flags)
            # Triton 3.9 spills four registers of what follows the products with every option.
            cost.check(wgmma=True, local=16 if flags == every else 0)
            assert "cp.async.bulk.tensor" in cost.ptx
    triton_cost(name, capability, FLOAT, "fp32").check()
    # Widths that no vector divides: right, not fast, so that spills are only reported.
    print(triton_cost(name, capability, HALF, whole=False).local, "bytes local")


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_passes_compile_without_spills(capability):
    from fastrl.kernels.logprob.triton_launch import HALF

    triton_cost("_merge_kernel", capability, HALF).check(registers=128)
    for flags in ((), ("SOFTCAP", "SUMS")):
        triton_cost("_bwd_kept_kernel", capability, HALF, flags=flags).check(registers=128)


@needs_triton
def test_triton_compiles_once_for_all_values():
    """Neither the temperature nor the number of tokens is part of what Triton compiles for."""
    from fastrl.kernels.logprob import triton_kernels as t

    for kernel in (t._fwd_kernel, t._merge_kernel, t._bwd_kernel, t._bwd_kept_kernel):
        changing = {"rows", "vocab", "tiles", "kept_tiles", "kept_rows", "first_tile", "first"}
        special = {p.name for p in kernel.params if not p.do_not_specialize}
        assert not changing & special
        assert not {"temperature", "softcap"} & {p.name for p in kernel.params if p.is_constexpr}
