"""linear_logprob in CUDA: compiled where nvcc is, and run on the host."""

import shutil

import gpu_proof
import numpy as np
import pytest
import torch
from logprob_checks import (
    DTYPES,
    SMALL,
    check_accurate,
    check_chunks,
    check_each_output_alone,
    check_extreme_logits,
    check_ignored_and_empty,
    check_layouts,
    check_opcheck_and_compile,
    check_workspace,
)
from logprob_host import Host

from fastrl.kernels import native


@pytest.mark.skipif(gpu_proof.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_cuda_compiles_without_spills(arch, tmp_path):
    costs = gpu_proof.compile_cuda("logprob.cu", arch, tmp_path)
    assert len(costs) == 11  # fold for 3 types; gradient: 3 from logits, 5 from a workspace
    for cost in costs:
        print(cost)
        cost.check(registers=64)


needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return gpu_proof.build_on_host("logprob.cpp", tmp_path_factory.mktemp("host"))


# Random logits in tiles, folded; then the gradient of each, from the logits and from the workspace.
FOLD = """
from logprob_host import Host, address as at
host = Host(library)
n, vocab = product.shape
stripes, widths, kind = -(-columns // 64), -(-columns // 4) * 4, getattr(host.Float, dtype)
element, scale = (np.float32, 1) if dtype == "float32" else (np.uint16, 1 + 32767 * (kind == 2))
running = [np.full(n, np.nan, np.float32) for _ in range(4)]
exps = np.full((n, stripes * 64), 7, element)  # of the first tile alone
highest = np.full((stripes, n), np.nan, np.float32)
kept = host.kept_args(at(exps), kind, stripes * 64, at(highest), n, scale)
nothing = host.kept_args(0, kind, 0, 0, 0, 1.0)
def logits(first, with_product=True):
    here = product[:, first:first + columns]
    tile = np.full(n * widths - short, np.nan, np.float32)
    np.lib.stride_tricks.as_strided(tile, here.shape, (4 * widths, 4))[:] = here
    return tile, host.tile_args(
        n, here.shape[1], first, at(tile) if with_product else 0, widths, at(bias),
        at(inv_temperature), at(target), 1.5, 6.0)
for first in range(0, vocab, columns):
    tile, a = logits(first)
    args = host.linear_logprob_fold_args(a, kept if first == 0 else nothing, *map(at, running))
    assert host.linear_logprob_fold_cuda(args, 0) == 0
highest_z, total, weighted, at_target = running
lse = (highest_z + np.log(total)).astype(np.float32)
entropy = (np.log(total) - weighted / total).astype(np.float32)
logprob = (at_target - highest_z - np.log(total)).astype(np.float32)
out = {"logprob": logprob, "lse": lse, "entropy": entropy}
def gradient(first, source, kind, element):
    tile, a = logits(first, source is nothing)
    g = np.full((n, widths), 9, element)
    args = host.linear_logprob_gradient_args(
        *(a, source, at(logprob), at(lse), at(entropy), at(of_p), at(of_spread), at(of_target)),
        *(at(g), kind, widths))
    assert host.linear_logprob_gradient_cuda(args, 0) == 0
    made = min(columns, vocab - first)
    assert not g[:, made:-(-made // 4) * 4].any(), "padding of a vector is written as 0"
    assert (g[:, -(-made // 4) * 4:] == 9).all(), "nothing is written beyond it"
    return g[:, :made]
parts = [gradient(first, nothing, kind, element) for first in range(0, vocab, columns)]
out["gradient"] = np.concatenate(parts, 1)
out["kept"] = gradient(0, kept, kind, element)
out["kept_unrounded"] = gradient(0, kept, 0, np.float32)
"""


def widened(x, dtype):
    if dtype == "float32":
        return torch.from_numpy(x)
    return torch.from_numpy(x.view(np.int16)).view(getattr(torch, dtype)).float()


@needs_gxx
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("n", "vocab", "columns"), [(1, 1, 64), (3, 151, 151), (2, 1009, 448), (2, 9001, 8192)]
)
def test_cuda_runs_on_the_host(library, tmp_path, n, vocab, columns, dtype, backwards, monkeypatch):
    if backwards:
        monkeypatch.setenv("CUDA_HOST_BACKWARDS", "1")
    product = (3 * torch.randn(n, vocab)).requires_grad_()
    bias, inverse = torch.randn(vocab), 1 / (torch.rand(n) + 0.5)
    target, upstream = torch.randint(vocab, (n,)), torch.randn(3, n)
    wide = product.double()
    z = 6 * torch.tanh(1.5 * (wide + bias.double()) / 6) * inverse.double().unsqueeze(1)
    lse = z.logsumexp(1)
    logprob = z.log_softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
    entropy = lse - (z.softmax(1) * z).sum(1)
    truth = torch.stack([logprob, lse, entropy])
    (want,) = torch.autograd.grad((truth * upstream).sum(), product)
    chain = inverse * 1.5
    made = gpu_proof.run_on_host(
        library,
        f"library, columns, dtype, short = {str(library)!r}, {columns}, {dtype!r}, 0\n" + FOLD,
        tmp_path,
        product=product.detach().numpy(),
        bias=bias.numpy(),
        inv_temperature=inverse.numpy(),
        target=target.numpy(),
        of_p=((upstream[1] - upstream[0]) * chain).numpy(),
        of_spread=(upstream[2] * chain).numpy(),
        of_target=(upstream[0] * chain).numpy(),
    )
    for name, x in zip(("logprob", "lse", "entropy"), truth.detach(), strict=True):
        torch.testing.assert_close(
            torch.from_numpy(made[name]).double(), x, rtol=1e-5, atol=1e-5, msg=name
        )
    rounding = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    gradient = widened(made["gradient"], dtype)
    tiny = 1e-6  # a vocabulary of one token has no gradient
    assert (gradient - want).norm() < rounding * want.norm() + tiny
    first = want[:, :columns]
    for kept in (widened(made["kept"], dtype), torch.from_numpy(made["kept_unrounded"])):
        assert (kept - first).norm() < 2 * rounding * first.norm() + tiny


@needs_gxx
def test_the_host_build_finds_what_a_gpu_would_hide(library, tmp_path):
    """A tile whose rows end before their last vector: the process dies of an access beyond it."""
    zeros, ones = np.zeros((1, 65), np.float32), np.ones(65, np.float32)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        gpu_proof.run_on_host(
            library,
            f"library, columns, dtype, short = {str(library)!r}, 65, 'float32', 3\n" + FOLD,
            tmp_path,
            product=zeros,
            **{n: ones for n in ("bias", "inv_temperature", "of_p", "of_spread", "of_target")},
            target=np.zeros(1, np.int64),
        )


@pytest.fixture
def cuda_on_the_host(tmp_path_factory, monkeypatch):
    """kernels/logprob/cuda.py on CPU tensors, its kernels run by the host's build."""
    from fastrl.kernels.logprob import cuda

    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("plain")
    host = Host(gpu_proof.build_on_host("logprob.cpp", folder, sanitize=False))
    for where in (cuda, native):
        monkeypatch.setattr(where, "module", lambda: host)
    monkeypatch.setattr(cuda, "stream", lambda device: 0)
    monkeypatch.setattr(native, "unavailable", lambda impl, device: None)
    monkeypatch.setattr(cuda, "COLUMNS", 256)
    monkeypatch.setattr(cuda, "TILE_BYTES", 4 * 256 * 16)


def test_the_cuda_path_on_the_host(cuda_on_the_host):
    for dtype in DTYPES:
        check_accurate("cuda", 5, 33, 605, dtype)
        check_workspace("cuda", dtype, 3, 32, 700)
    check_each_output_alone("cuda")
    check_extreme_logits("cuda")
    check_opcheck_and_compile("cuda")


@pytest.mark.slow
def test_the_cuda_path_on_the_host_at_length(cuda_on_the_host):
    for dtype in DTYPES:
        for shape in SMALL:
            check_accurate("cuda", *shape, dtype)
        check_workspace("cuda", dtype)
    check_ignored_and_empty("cuda")
    check_layouts("cuda")
    check_chunks("cuda")
