"""shared_prefix_attention by flash attention: PyTorch's for CPUs, and stand-ins for the GPU's.

The stand-ins compute in float64 what flash-attn and PyTorch document, from nothing but what they
are given, and round it to the dtype of the inputs. Their signatures are the originals': PyTorch's
by its own dispatcher, flash-attn's (2.7 and 2.8) written down here.
"""

import itertools
import math
import sys
import types
import warnings
from functools import partial

import gpu_proof
import pytest
import torch
from test_attention import MIXED, assert_accurate, draw, every_dtype, run, same

from fastrl.kernels import GroupLayout, native, shared_prefix_attention
from fastrl.kernels.attention import flash

HALF = (torch.bfloat16, torch.float16)
HEADS = [(2, 2, 32), (4, 1, 64), (16, 1, 80), (3, 1, 20), (2, 1, 256)]
# An empty prompt, empty completions, one completion, none, one token each.
SMALL = ([17, 70, 0, 3, 1], [[1, 9, 40], [20], [5, 0, 33], [], [1]])


def check(inputs, layout, times=1.0, **options):
    """As `assert_accurate`, with an error of `times` twice the reference's."""
    exact = [x.double() for x in inputs]
    truth, plain, got = (
        run(x, layout, impl, **options)
        for x, impl in ((exact, "reference"), (inputs, "reference"), (inputs, "flash"))
    )
    for name, mine, other, want in zip(
        ("out", "lse", "q", "k", "v"), got, plain, truth, strict=True
    ):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        norm = want.norm().clamp(min=1e-30)
        errors = [((x.double() - want).norm() / norm).item() for x in (mine, other)]
        assert errors[0] <= times * 2 * errors[1] + 3e-7, (name, *errors)


# ---- on a CPU ------------------------------------------------------------------------------------


def test_by_hand():
    # Keys log 1, log 2, log 4, log 3 give the weights 1, 2, 4, 3 to a query of 1.
    layout = GroupLayout.from_lengths([1], [[2, 1]])
    q, k, v = torch.zeros(3, 4, 1, 8)
    q[:, 0, 0] = 1.0
    k[:, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 3.0]).log()
    v[:, 0, 0] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    v.requires_grad_()
    out, lse = shared_prefix_attention(q, k, v, layout, scale=1.0, return_lse=True, impl="flash")
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([1.0, 21 / 3, 421 / 7, 3001 / 4]))
    torch.testing.assert_close(lse[:, 0], torch.tensor([1.0, 3.0, 7.0, 4.0]).log())
    out[:, 0, 0].sum().backward()  # of each value, the weights it has in all rows
    weights = [1 + 1 / 3 + 1 / 7 + 1 / 4, 2 / 3 + 2 / 7, 4 / 7, 3 / 4]
    torch.testing.assert_close(v.grad[:, 0, 0], torch.tensor(weights))


@every_dtype
@pytest.mark.parametrize("heads", HEADS)
def test_error_is_at_most_twice_the_references(dtype, heads):
    layout = GroupLayout.from_lengths(*(MIXED if heads[0] < 8 else SMALL))
    check(draw(layout, *heads, dtype), layout, scale=0.1)


@every_dtype
def test_lengths(dtype):
    for lengths in (
        *(([1], [[1]]), ([0], [[140]]), ([129], [[1] * 3]), ([64], [[64, 128]])),
        *(([1] * 9, [[1, 1]] * 9), ([193], [[1] * 70]), ([450], [[1, 2, 200, 3]])),
    ):
        layout = GroupLayout.from_lengths(*lengths)
        check(draw(layout, 6, 2, 40, dtype), layout)


def test_extreme_scores():
    layout = GroupLayout.from_lengths([200], [[30, 40]])
    q, k, v = draw(layout, 2, 1, 64, size=16.0)
    v = v / 16
    k[7] = 40.0
    for inputs in ((q, k, v), (q.abs(), -k.abs(), v)):
        outputs = run(inputs, layout, "flash")
        assert all(torch.isfinite(x).all() for x in outputs)
        assert_accurate(inputs, layout, outputs, tiny=3e-5)


def test_empty_layouts():
    for lengths in (([], []), ([0], [[0, 0]])):
        layout = GroupLayout.from_lengths(*lengths)
        q, k, v = draw(layout, 4, 2, 32)
        q.requires_grad_()
        out = shared_prefix_attention(q, k, v, layout, impl="flash")
        out.sum().backward()
        assert out.shape == q.grad.shape == (0, 4, 32)


def test_a_broken_completion_does_not_spread():
    layout = GroupLayout.from_lengths([30], [[9, 5, 12]])
    inputs = draw(layout, 2, 1, 32)
    want = shared_prefix_attention(*inputs, layout, impl="flash")
    rest = torch.ones(56, dtype=torch.bool)
    rest[39:44] = False
    for x in inputs:
        x[39:44] = float("nan")
    out = shared_prefix_attention(*inputs, layout, impl="flash")
    torch.testing.assert_close(out[rest], want[rest])
    assert out[~rest].isnan().all()


def test_repeats_bit_for_bit_and_takes_any_strides():
    layout = GroupLayout.from_lengths([90, 5], [[30, 1, 64], [9]])
    inputs = draw(layout, 4, 2, 32, torch.bfloat16)
    want = run(inputs, layout, "flash")
    assert same(run(inputs, layout, "flash"), want)
    fused = torch.cat(inputs, dim=1)
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    assert same(run(views, layout, "flash"), want)
    leaf = inputs[0].clone().requires_grad_()
    out = shared_prefix_attention(leaf, *inputs[1:], layout, impl="flash")
    out.sum().backward()  # an expanded gradient
    assert same([out.detach()], want[:1]) and torch.isfinite(leaf.grad).all()


def test_each_output_alone_has_its_gradient():
    layout = GroupLayout.from_lengths([20, 3], [[9, 4], [7]])
    inputs = [x.requires_grad_() for x in draw(layout, 4, 2, 24)]
    for which in (0, 1):
        got, want = (
            torch.autograd.grad(
                shared_prefix_attention(*inputs, layout, return_lse=True, impl=impl)[which]
                .square()
                .sum(),
                inputs[: 3 - which],  # a logsumexp knows no values
            )
            for impl in ("flash", "reference")
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_opcheck_and_compile():
    layout = GroupLayout.from_lengths([5, 0], [[3, 0], [2]])
    inputs = [x.requires_grad_() for x in draw(layout, 4, 2, 32)]
    arguments = (*inputs, *layout, 0.2, 0.0, 0, "flash", True)
    torch.library.opcheck(torch.ops.fastrl.shared_prefix_attention.default, arguments)
    compiled = torch.compile(shared_prefix_attention, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad((f(*inputs, layout, impl="flash") ** 2).sum(), inputs)
        for f in (shared_prefix_attention, compiled)
    ]
    assert same(*gradients)


def test_auto_takes_it_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(native, "_module", None)
    layout = GroupLayout.from_lengths([20], [[9, 30]])
    inputs = draw(layout, 4, 2, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = shared_prefix_attention(*inputs, layout)
        assert same([out], [shared_prefix_attention(*inputs, layout, impl="flash")])
    native._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow reference"):
        out = shared_prefix_attention(*inputs, layout, window=9)
    assert same([out], [shared_prefix_attention(*inputs, layout, window=9, impl="reference")])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 9}, "impl='flash' has no sliding window, got window=9"),
        ({"softcap": 5.0}, "flash-attn on a GPU alone, got softcap=5.0"),
    ],
)
def test_what_it_cannot_do_is_named(options, says):
    layout = GroupLayout.from_lengths([5], [[2, 1]])
    with pytest.raises(ValueError, match=says):
        shared_prefix_attention(*draw(layout, 2, 1, 32), layout, impl="flash", **options)
    with pytest.raises(ValueError, match=r"offsets must .*end at the number of tokens, T=7"):
        shared_prefix_attention(*torch.zeros(3, 7, 1, 32), layout, impl="flash")
    with pytest.raises(ValueError, match=r"q must be float32.*got torch.float64"):
        inputs = draw(layout, 2, 1, 32, torch.float64)
        shared_prefix_attention(*inputs, layout, impl="flash")


def test_why_it_cannot_run(monkeypatch):
    gpu = torch.device("cuda")
    said = partial(native.unavailable, "flash", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    monkeypatch.setattr(native, "flash_attn_version", lambda: None)
    assert "PyTorch was built without flash attention" in said()
    for version in ("2.7.4.post1", "2.8.3"):
        monkeypatch.setattr(native, "flash_attn_version", lambda version=version: version)
        assert said() is None
    for version in ("2.5.8", "3.0.0"):
        monkeypatch.setattr(native, "flash_attn_version", lambda version=version: version)
        assert f"flash-attn {version} is installed" in said() and "2.7 and 2.8" in said()
    monkeypatch.setattr(native, "flash_attn_version", lambda: None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert said() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "sm_80 or later, got sm_75" in said()
    assert native.unavailable("flash", torch.device("meta")) == "the tensors are on meta"


# ---- stand-ins for the GPU's ---------------------------------------------------------------------


def sequences(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """Each one's queries and keys, as long as the bounds are what the kernels want."""
    for x, bounds, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        assert x.is_contiguous() and x.shape[2] % 8 == 0 and x.dtype in HALF
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(x)
        assert bounds.diff().min() > 0 and bounds.diff().max() == longest
    pairs = (itertools.pairwise(x.tolist()) for x in (cu_seqlens_q, cu_seqlens_k))
    return [(slice(*a), slice(*b)) for a, b in zip(*pairs, strict=True)]


def scores(q, k, causal, scale, softcap):
    """[H, queries, keys] float64, and the slope of a capped score."""
    share = q.shape[1] // k.shape[1]
    keys = k.double().repeat_interleave(share, 1)
    s = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    slope = torch.ones_like(s)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
        slope = 1 - (s / softcap) ** 2
    if causal:
        assert len(q) == len(k)
        s = s.masked_fill(torch.ones(s.shape[1:]).tril() == 0, -math.inf)
    return s, slope


def attend(q, k, v, bounds, causal, scale, softcap=0.0):
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for rows, keys in sequences(q, k, *bounds):
        s, _ = scores(q[rows], k[keys], causal, scale, softcap)
        values = v[keys].double().repeat_interleave(q.shape[1] // k.shape[1], 1)
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(-1), values).to(q.dtype)
        lse[:, rows] = s.logsumexp(-1).float()
    return out, lse


def attend_backward(dout, q, k, v, out, lse, bounds, causal, scale, softcap=0.0):
    assert dout.shape == out.shape == q.shape and lse.shape == (q.shape[1], len(q))
    assert dout.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
    gradients = tuple(torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    for rows, keys in sequences(q, k, *bounds):
        s, slope = scores(q[rows], k[keys], causal, scale, softcap)
        p = torch.exp(s - lse[:, rows].double().unsqueeze(-1))
        g, o = dout[rows].double(), out[rows].double()
        values, wide = (x[keys].double().repeat_interleave(share, 1) for x in (v, k))
        dp = torch.einsum("qhd,khd->hqk", g, values)
        ds = p * (dp - (g * o).sum(-1).T.unsqueeze(-1)) * slope * scale
        gradients[0][rows] = torch.einsum("hqk,khd->qhd", ds, wide)
        for total, by_head in (
            (gradients[1], torch.einsum("hqk,qhd->khd", ds, q[rows].double())),
            (gradients[2], torch.einsum("hqk,qhd->khd", p, g)),
        ):
            total[keys] = by_head.unflatten(1, (-1, share)).sum(2)
    return tuple(x.to(q.dtype) for x in gradients)


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
):
    assert dropout_p == 0.0 and window_size_left == window_size_right == -1
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return *attend(q, k, v, bounds, causal, softmax_scale, softcap), None, None


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
):
    assert dropout_p == 0.0 and window_size_left == window_size_right == -1
    assert alibi_slopes is None and deterministic
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    found = attend_backward(dout, q, k, v, out, softmax_lse, bounds, causal, softmax_scale, softcap)
    for into, x in zip((dq, dk, dv), found, strict=True):
        into.copy_(x)


def _aten_forward(
    q,
    k,
    v,
    cu_q,
    cu_k,
    max_q,
    max_k,
    dropout_p,
    causal,
    debug,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
    seqused_k=None,
    alibi_slopes=None,
    block_table=None,
    num_splits=None,
):
    assert dropout_p == 0.0 and not debug and window_size_left is window_size_right is None
    out, lse = attend(q, k, v, (cu_q, cu_k, max_q, max_k), causal, scale)
    return out, lse, q.new_empty(0), q.new_empty(0), q.new_empty(0)


def _aten_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    cu_q,
    cu_k,
    max_q,
    max_k,
    dropout_p,
    causal,
    rng_state,
    unused,
    *,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    assert dropout_p == 0.0 and window_size_left is window_size_right is None
    assert torch.are_deterministic_algorithms_enabled()
    return attend_backward(dout, q, k, v, out, lse, (cu_q, cu_k, max_q, max_k), causal, scale)


@pytest.fixture(params=["package", "torch"])
def on_a_gpu(request, monkeypatch):
    """CPU tensors take a GPU's way, to a stand-in at its end."""
    if request.param == "package":
        package = types.ModuleType("flash_attn")
        package.flash_attn_interface = types.SimpleNamespace(
            _flash_attn_varlen_forward=_flash_attn_varlen_forward,
            _flash_attn_varlen_backward=_flash_attn_varlen_backward,
        )
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setattr(flash, "kernels", lambda device: flash.OfPackage)
        yield request.param
        return
    monkeypatch.setattr(flash, "kernels", lambda device: flash.OfTorch)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _aten_forward, "CPU")
        library.impl("_flash_attention_backward", _aten_backward, "CPU")
        yield request.param


@pytest.mark.parametrize("dtype", HALF)
def test_gpu_way(on_a_gpu, dtype):
    for heads in HEADS:
        layout = GroupLayout.from_lengths(*SMALL)
        check(draw(layout, *heads, dtype), layout, times=1.5)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("on_a_gpu", ["package"], indirect=True)
def test_gpu_way_with_a_softcap(on_a_gpu):
    layout = GroupLayout.from_lengths(*SMALL)
    check(draw(layout, 4, 2, 32, torch.bfloat16), layout, times=1.5, softcap=3.0)


def test_which_kernels_a_gpu_takes(monkeypatch):
    for version, want in ((None, flash.OfTorch), ("2.8.3", flash.OfPackage)):
        monkeypatch.setattr(flash, "flash_attn_version", lambda version=version: version)
        assert flash.kernels(torch.device("cuda")) is want
        assert flash.kernels(torch.device("cpu")) is flash.OnCPU


# ---- on a GPU ------------------------------------------------------------------------------------


@gpu_proof.needs_gpu
@pytest.mark.parametrize("dtype", HALF)
def test_gpu_against_float64(dtype):
    if (reason := native.unavailable("flash", torch.device("cuda"))) is not None:
        pytest.skip(reason)
    for lengths, heads in itertools.product((MIXED, SMALL, ([450], [[1, 2, 200, 3]])), HEADS):
        layout = GroupLayout.from_lengths(*lengths, "cuda")
        inputs = [x.cuda() for x in draw(layout, *heads, dtype)]
        check(inputs, layout, times=2.0)
        assert same(*(run(inputs, layout, "flash") for _ in range(2)))
        if flash.kernels(inputs[0].device) is flash.OfPackage:
            check(inputs, layout, times=2.0, softcap=3.0)
    with pytest.raises(ValueError, match="takes bfloat16 and float16 alone on a GPU"):
        shared_prefix_attention(*(x.float() for x in inputs), layout, impl="flash")
