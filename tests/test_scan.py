"""Advantages and returns: numbers, layouts, masks, arguments. GPU code: test_scan_gpu.py."""

import hashlib
import itertools

import pytest
import torch
from gpu_proof import run_python

import fastrl.kernels
from fastrl.kernels import discounted_returns, gae, native, vtrace

TOKENS = {
    "gae": ("rewards", "values"),
    "discounted_returns": ("rewards",),
    "vtrace": ("rewards", "values", "logprobs", "old_logprobs"),
}
OPTIONS = {
    "gae": {"gamma": 0.97, "lam": 0.9},
    "discounted_returns": {"gamma": 0.97},
    "vtrace": {"gamma": 0.97, "lam": 0.9, "rho_bar": 1.2, "c_bar": 0.9},
}
OPS = list(OPTIONS)
MASKS = (None, "left", "right", "inside", "everything")
CPU = torch.device("cpu")
NO_CPU_KERNEL = native.unavailable("cpu", CPU)
needs_cpu_kernel = pytest.mark.skipif(NO_CPU_KERNEL is not None, reason=str(NO_CPU_KERNEL))
HERE = ["reference"] + ["cpu"] * (NO_CPU_KERNEL is None)


def draw(rows, length, mask=None, bootstrap=True, seed=0):
    """Arguments of all ops by name, padded; ``mask`` names where tokens are masked."""
    g = torch.Generator().manual_seed(seed + 1000 * rows + length)
    case = {n: torch.randn(rows, length, generator=g) for n in TOKENS["vtrace"]}
    column = torch.arange(length)
    cut = torch.randint(0, length + 1, (rows, 1), generator=g)
    case["mask"] = {
        None: None,
        "left": column >= cut,
        "right": column < cut,
        "inside": torch.rand(rows, length, generator=g) < 0.7,
        "everything": column.expand(rows, length) < 0,
    }[mask]
    case["bootstrap"] = torch.randn(rows, generator=g) if bootstrap else None
    return case


def pack(case):
    """The same tokens packed; those of a case masked on the right."""
    mask = case["mask"]
    lengths = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1)])
    packed = {n: case[n][mask] for n in TOKENS["vtrace"]}
    return {**packed, "mask": None, "bootstrap": case["bootstrap"]} | {
        "cu_seqlens": lengths.cumsum(0).int()
    }


def run(op, case, impl, **options):
    """The outputs of ``op`` as a tuple."""
    at = {n: case.get(n) for n in ("mask", "cu_seqlens", "bootstrap")}
    function = getattr(fastrl.kernels, op)
    out = function(*(case[n] for n in TOKENS[op]), **{**OPTIONS[op], **options}, **at, impl=impl)
    return out if isinstance(out, tuple) else (out,)


def double(case):
    floating = {n: x for n, x in case.items() if x is not None and x.is_floating_point()}
    return {**case, **{n: x.double() for n, x in floating.items()}}


def assert_accurate(op, case, outputs):
    """Within twice the float32 reference's error against float64, and a small absolute term."""
    truth, plain = run(op, double(case), "reference"), run(op, case, "reference")
    for got, want, other in zip(outputs, truth, plain, strict=True):
        assert got.dtype == torch.float32 and want.dtype == torch.float64
        if want.numel():
            floor = 1e-6 * max(1.0, want.abs().max().item())
            allowed = 2 * (other - want).abs().max().item() + floor
            assert (got.cpu() - want).abs().max().item() <= allowed


def assert_same(left, right):
    assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def check(impl, rows, lengths, exact=False):
    """Every op over a grid against float64; exactly the reference's bits where asked."""
    for b, t, mask, bootstrap in itertools.product(rows, lengths, MASKS, (False, True)):
        case = draw(b, t, mask, bootstrap)
        for op in OPS:
            outputs = run(op, case, impl)
            assert_accurate(op, case, outputs)
            if exact and op != "vtrace":  # its exponential differs from torch's in the last place
                assert_same(outputs, run(op, case, "reference"))


def digest():
    """A hash of the CPU kernels' outputs, to compare instruction sets."""
    sha = hashlib.sha256()
    for rows, length, mask, bootstrap in itertools.product(
        (1, 17), (1, 33, 1000), MASKS, (False, True)
    ):
        case = draw(rows, length, mask, bootstrap)
        for op in OPS:
            for x in run(op, case, "cpu"):
                sha.update(x.numpy().tobytes())
    return sha.hexdigest()


# ---- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", HERE)
def test_by_hand(impl):
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 0.25]])
    at = {"gamma": 0.5, "impl": impl, "bootstrap": torch.tensor([4.0])}
    # deltas: 1 + .5 - .5 = 1; 0 + .125 - 1 = -.875; 2 + 2 - .25 = 3.75
    advantages, returns = gae(rewards, values, lam=0.5, **at)
    assert advantages.tolist() == [[1.015625, 0.0625, 3.75]]
    assert returns.tolist() == [[1.515625, 1.0625, 4.0]]
    assert discounted_returns(rewards, **at).tolist() == [[2.0, 2.0, 4.0]]
    # ratios 2, 1/2, 1: rho = c = 1, 1/2, 1. Gaps: 3.75; -.4375 + .25 * 3.75; 1 + .5 * .5
    new = torch.tensor([[2.0, 0.5, 1.0]]).log()
    targets, advantages = vtrace(rewards, values, new, torch.zeros(1, 3), **at)
    torch.testing.assert_close(targets, torch.tensor([[1.75, 1.5, 4.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[1.25, 0.5, 3.75]]))


@needs_cpu_kernel
def test_cpu_against_float64_and_bit_for_bit():
    check("cpu", (1, 17), (1, 2, 31, 33, 1000), exact=True)
    check("cpu", (333,), (1, 33), exact=True)


@needs_cpu_kernel
def test_cpu_large_batch_bit_for_bit():
    case = draw(333, 1000, "inside")
    for op in ("gae", "discounted_returns"):
        assert_same(run(op, case, "cpu"), run(op, case, "reference"))


@pytest.mark.parametrize("impl", HERE)
def test_lam_and_gamma_one_give_return_minus_value(impl):
    case = draw(17, 33, "inside")
    advantages, returns = run("gae", case, impl, gamma=1.0, lam=1.0)
    (total,) = run("discounted_returns", case, impl, gamma=1.0)
    torch.testing.assert_close(returns, total)
    torch.testing.assert_close(advantages, (total - case["values"]) * case["mask"])


@pytest.mark.parametrize("impl", HERE)
def test_vtrace_on_policy_is_gae(impl):
    case = draw(17, 33, "inside")
    case["old_logprobs"] = case["logprobs"]
    targets, _ = run("vtrace", case, impl, rho_bar=1.0, c_bar=1.0)
    torch.testing.assert_close(targets, run("gae", case, impl)[1])


@pytest.mark.parametrize("impl", HERE)
def test_vtrace_survives_extreme_ratios(impl):
    case = draw(3, 9)
    case["logprobs"][0, 2], case["old_logprobs"][0, 2] = 0.0, -200.0
    case["logprobs"][1, 2], case["old_logprobs"][1, 2] = -200.0, 0.0
    assert_accurate("vtrace", case, run("vtrace", case, impl))
    case["logprobs"][2, 2] = float("nan")
    assert run("vtrace", case, impl)[0][2, 2].isnan()


# ---- layouts and masks -------------------------------------------------------------------------


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("op", OPS)
def test_packed_equals_padded(op, impl):
    case = draw(17, 33, "right")
    padded = run(op, case, impl)
    assert_same(run(op, pack(case), impl), [x[case["mask"]] for x in padded])


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("op", OPS)
def test_masked_tokens_are_transparent(op, impl):
    case = draw(17, 333, "inside")
    outputs = run(op, case, impl)
    for row in range(17):
        keep = case["mask"][row]
        short = {n: case[n][row, keep][None] for n in TOKENS["vtrace"]}
        short["bootstrap"] = case["bootstrap"][row, None]
        assert_same([x[row, keep][None] for x in outputs], run(op, short, impl))
        assert all((x[row, ~keep] == 0).all() for x in outputs)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("op", OPS)
def test_what_masked_tokens_hold_does_not_matter(op, impl):
    clean = draw(18, 33, "inside")
    clean["mask"][3] = False
    dirty = {n: x.clone() for n, x in clean.items()}
    for i, name in enumerate(TOKENS["vtrace"]):
        dirty[name][~clean["mask"]] = (float("nan"), float("inf"), float("-inf"), 1e30)[i]
    outputs = run(op, dirty, impl)
    assert_same(outputs, run(op, clean, impl))
    assert all((x[3] == 0).all() for x in outputs)


@needs_cpu_kernel
@pytest.mark.parametrize("op", OPS)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(op):
    case = draw(333, 200, "inside")
    outputs = run(op, case, "cpu")
    for row in (0, 7, 8, 200, 332):
        alone = {n: x[row, None] for n, x in case.items()}
        assert_same([x[row, None] for x in outputs], run(op, alone, "cpu"))
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert_same(outputs, run(op, case, "cpu"))


@needs_cpu_kernel
def test_every_instruction_set_computes_the_same_bits():
    code = "from test_scan import *; print(digest())"
    digests = {run_python(code, FASTRL_ISA=isa) for isa in native.module().cpu_isas()}
    assert digests == {digest() + "\n"}


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("op", OPS)
def test_empty_and_strided_inputs(op, impl):
    for rows, length in ((0, 5), (3, 0), (0, 0)):
        assert all(x.shape == (rows, length) for x in run(op, draw(rows, length), impl))
    nothing = {n: torch.zeros(0) for n in TOKENS["vtrace"]}
    for offsets in ([0], [0, 0, 0]):
        nothing["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
        assert all(x.shape == (0,) for x in run(op, nothing, impl))
    case = draw(17, 33, "inside")
    strided = {n: x.t().contiguous().t() if x.dim() == 2 else x for n, x in case.items()}
    assert_same(run(op, strided, impl), run(op, case, impl))


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("op", OPS)
def test_dtypes_and_gradients(op, impl):
    case = draw(3, 33)
    half = {n: None if x is None else x.bfloat16() for n, x in case.items()}
    widened = {n: None if x is None else x.float() for n, x in half.items()}
    assert_same(run(op, half, impl), run(op, widened, impl))
    wanted = torch.float64 if impl == "reference" else torch.float32
    assert all(x.dtype == wanted for x in run(op, double(case), impl))
    case["rewards"].requires_grad_()
    assert not any(x.requires_grad for x in run(op, case, impl))


# ---- arguments and torch -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rewards", torch.zeros(3), r"rewards must be \[B, T\].*\(3,\)"),
        ("values", torch.zeros(2, 4), r"values must have shape \(2, 3\), got \(2, 4\)"),
        ("values", torch.zeros(2, 3, dtype=torch.long), "values must be floating.*int64"),
        ("mask", torch.ones(2, 3), "mask must be bool, got torch.float32"),
        ("mask", torch.ones(2, dtype=torch.bool), r"mask must have shape \(2, 3\), got \(2,\)"),
        ("bootstrap", torch.zeros(3), r"bootstrap must have shape \(2,\), got \(3,\)"),
        ("values", torch.zeros(2, 3, device="meta"), "values is on meta.*rewards are on cpu"),
        ("impl", "fast", "impl='fast' is unknown; use one of auto, reference, cpu, triton, cuda"),
        ("impl", "cuda", "impl='cuda' is unavailable: the tensors are on cpu.*available: ref"),
    ],
)
def test_wrong_arguments_are_named(name, value, says):
    arguments = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), name: value}
    with pytest.raises(ValueError, match=says):
        gae(**arguments)


@pytest.mark.parametrize("offsets", [[1, 5], [0, 4], [0, 3, 2, 5], [0, 6], [-1, 5]])
def test_wrong_offsets_are_named(offsets):
    offsets = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens must start at 0.*N=5, got \["):
        discounted_returns(torch.zeros(5), cu_seqlens=offsets)
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32.*int64"):
        discounted_returns(torch.zeros(5), cu_seqlens=offsets.long())


def test_wrong_clipping_is_named():
    with pytest.raises(ValueError, match=r"rho_bar=0.0 must be positive"):
        vtrace(*torch.zeros(4, 2, 3), rho_bar=0.0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(op, packed):
    case = draw(3, 7, "right")
    case = pack(case) if packed else case
    at = (case["mask"], case.get("cu_seqlens"), case["bootstrap"])
    arguments = (*(case[n] for n in TOKENS[op]), *OPTIONS[op].values(), *at, "auto")
    torch.library.opcheck(getattr(torch.ops.fastrl, op).default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_compile_and_autocast(op):
    case = draw(5, 33, "inside")
    want = run(op, case, "auto")
    compiled = torch.compile(
        lambda case: run(op, case, "auto"), fullgraph=True, backend="aot_eager"
    )
    assert_same(want, compiled(case))
    assert_same(want, compiled(draw(5, 33, "inside")))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(want, run(op, case, "auto"))
