"""linear_logprob on a GPU, and which of its implementations runs there."""

import gpu_proof
import pytest
import torch
from logprob_checks import (
    DTYPES,
    SMALL,
    assert_bits,
    check_accurate,
    check_bits_depend_on_no_other_row,
    check_chunks,
    check_each_output_alone,
    check_extreme_logits,
    check_ignored_and_empty,
    check_layouts,
    check_opcheck_and_compile,
    check_workspace,
    draw,
    far,
    run,
)

from fastrl.kernels import linear_logprob, native
from fastrl.kernels.logprob import measured

every_impl = pytest.mark.parametrize("impl", ["triton", "cuda"])


@pytest.fixture
def gpu_impl(impl):
    if (reason := native.unavailable(impl, torch.device("cuda"))) is not None:
        pytest.skip(reason)
    return impl


def test_the_choice_is_by_measurement(monkeypatch):
    assert measured.order(torch.bfloat16, 4096, 131072)[0] == measured.DEFAULT
    rows = (
        measured.Row("bfloat16", 4096, 131072, "cuda"),
        measured.Row("bfloat16", 1024, 32000, "triton"),
    )
    monkeypatch.setattr(measured, "TABLE", rows)
    for h, v, impl in (
        (4096, 131072, "cuda"),
        (3584, 152064, "cuda"),
        (896, 32003, "triton"),
        (1024, 16000, "triton"),
    ):
        order = measured.order(torch.bfloat16, h, v)
        assert order[0] == impl and set(order) == {"cuda", "triton"}
    assert measured.order(torch.float32, 4096, 131072)[0] == measured.DEFAULT


@gpu_proof.needs_gpu
@every_impl
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_against_float64(gpu_impl, dtype):
    for n, h, v in (*SMALL, (333, 896, 2003), (130, 4096, 32003), (2100, 64, 777)):
        check_accurate(gpu_impl, n, h, v, dtype, "cuda")


@gpu_proof.needs_gpu
@every_impl
def test_gpu_rules(gpu_impl):
    for dtype in DTYPES:
        check_workspace(gpu_impl, dtype, 333, 128, 5003, "cuda")
        if gpu_impl == "triton":
            check_bits_depend_on_no_other_row(dtype, "cuda")
    check_each_output_alone(gpu_impl, "cuda")
    check_extreme_logits(gpu_impl, "cuda")
    check_ignored_and_empty(gpu_impl, "cuda")
    check_layouts(gpu_impl, "cuda")
    check_chunks(gpu_impl, "cuda")
    check_opcheck_and_compile(gpu_impl, "cuda", backend="inductor")


@gpu_proof.needs_gpu
@every_impl
def test_gpu_under_cuda_graphs(gpu_impl):
    """The op waits for the device: torch.compile has to leave it out of what it records."""
    hidden, weight, target, *_ = draw(200, 64, 1009, torch.bfloat16, "cuda")
    target[::3] = -100

    def loss(hidden):
        return linear_logprob(hidden * 2, weight, target, impl=gpu_impl).logprob.sum() * 3

    compiled = torch.compile(loss, mode="reduce-overhead")
    for _ in range(3):
        assert compiled(hidden).item() == pytest.approx(loss(hidden).item(), rel=1e-5)


@gpu_proof.needs_gpu
@every_impl
def test_gpu_repeats_bit_for_bit(gpu_impl):
    inputs = draw(700, 896, 32003, torch.bfloat16, "cuda")
    first = run(*inputs[:4], gpu_impl, **inputs[4])
    for _ in range(3):
        assert_bits(run(*inputs[:4], gpu_impl, **inputs[4]), first)


@gpu_proof.needs_gpu
@every_impl
@pytest.mark.parametrize("setting", ["high", "highest"])
def test_gpu_float32_is_never_tf32(gpu_impl, setting):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        hidden, weight, target, upstream, _ = draw(200, 512, 3001, torch.float32, "cuda")
        got = run(hidden, weight, target, upstream, gpu_impl)
        assert torch.get_float32_matmul_precision() == setting
        wide = [x.double() for x in (hidden, weight)]
        truth = run(*wide, target, upstream, "reference")
    finally:
        torch.set_float32_matmul_precision(before)
    assert max(far(a, b) for a, b in zip(got, truth, strict=True)) < 3e-6


@gpu_proof.needs_gpu
@every_impl
def test_gpu_memory_is_bounded(gpu_impl):
    """Beyond the gradients: one chunk of gradients or logits, a float32 grad_hidden, statistics."""
    n, h, v = 8192, 1024, 131072
    hidden, weight, target, upstream, _ = draw(n, h, v, torch.bfloat16, "cuda")
    run(hidden[:8], weight, target[:8], [x[:8] for x in upstream], gpu_impl)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(hidden, weight, target, upstream, gpu_impl)
    extra = torch.cuda.max_memory_allocated() - before
    gradients = 2 * (hidden.nbytes + weight.nbytes)  # and copies that autograd may make
    assert extra < gradients + 2 * hidden.nbytes + 400 * 2**20 < n * v  # bytes: half of the logits


@gpu_proof.needs_gpu
@every_impl
def test_gpu_more_logits_than_int32_counts(gpu_impl):
    n, h, v = 16_500, 64, 131_072
    hidden, weight, target, upstream, _ = draw(n, h, v, torch.bfloat16, "cuda")
    target[-1] = v - 1
    got = run(hidden, weight, target, upstream, gpu_impl, workspace_mb=5000)
    some = torch.tensor([0, 1, n // 2, n - 2, n - 1], device="cuda")
    wide, few = [hidden[some].double(), weight.double()], [x[some] for x in upstream]
    want = run(*wide, target[some], few, "reference")
    for a, b in zip(got[:3], want[:3], strict=True):
        assert far(a[some], b) < 1e-5
    assert far(got[3][some], want[3]) < 2**-7
