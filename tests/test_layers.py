"""Norms, rotations, gated activations, layers made of them: by hand, float64, models, bits."""

import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model

from fastrl.kernels import glu, native, rmsnorm, rope
from fastrl.kernels.checks import ACTIVATIONS
from fastrl.models import add_lora, backbone, completion_logprobs, group_logprobs
from fastrl.models.attention import shared_attention
from fastrl.models.layers import runs_through_ops
from fastrl.models.logprobs import pack_groups, packed_states, row_states

CPU = torch.device("cpu")
IMPLS = [i for i in ("reference", "cpu") if native.unavailable(i, CPU) is None]
every_impl = pytest.mark.parametrize("impl", IMPLS)
needs_cpu = pytest.mark.skipif("cpu" not in IMPLS, reason=f"no cpu kernels: {native.why_missing}")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
# Odd ones, one row, and past the rows of a task and the elements of a block.
SIZES = [(1, 3), (3, 7), (5, 16), (130, 33), (40, 1025), (9, 2, 64)]


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=g)).to(dtype)


def with_gradients(function, *leaves):
    """The results, and the gradients of leaves with upstream gradients that differ everywhere."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [draw(*x.shape, seed=7).to(x) for x in outputs]
    return [x.detach() for x in outputs], torch.autograd.grad(outputs, leaves, upstream)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()


def check_as_exact_as_reference(impl, function, *leaves):
    """Errors against float64 at most twice those of the reference in the same dtype."""
    exact = with_gradients(lambda *x: function("reference", *x), *(x.double() for x in leaves))
    plain = with_gradients(lambda *x: function("reference", *x), *leaves)
    ours = with_gradients(lambda *x: function(impl, *x), *leaves)
    for kind in (0, 1):
        for got, reference, want in zip(ours[kind], plain[kind], exact[kind], strict=True):
            assert got.dtype == reference.dtype and got.shape == want.shape
            assert relative(got, want) <= 2 * relative(reference, want) + 2e-6


# ---- by hand -------------------------------------------------------------------------------------


@every_impl
def test_rmsnorm_by_hand(impl):
    x, residual = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    weight = torch.tensor([2.0, 0.5])
    y, h = rmsnorm(x, weight, residual=residual, eps=0.5, impl=impl)
    assert h.tolist() == [[3.0, 4.0], [0.0, 0.0]]
    root = 13.0**0.5  # mean of squares 12.5, and eps
    torch.testing.assert_close(y, torch.tensor([[6.0 / root, 2.0 / root], [0.0, 0.0]]))
    y, same = rmsnorm(h, weight, eps=0.5, weight_offset=1.0, impl=impl)
    torch.testing.assert_close(y[0], torch.tensor([9.0 / root, 6.0 / root]))
    assert same is h


@every_impl
def test_rope_by_hand(impl):
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert rope(x, cos, sin, impl=impl).tolist() == [[[-3.0, 2.0, 1.0, 4.0]]]
    normed = rope(x, cos, sin, norm_weight=torch.full((4,), 2.0), eps=0.0, impl=impl)
    root = 7.5**0.5
    expected = torch.tensor([[[-6.0 / root, 4.0 / root, 2.0 / root, 8.0 / root]]])
    torch.testing.assert_close(normed, expected)


@every_impl
def test_glu_by_hand(impl):
    gate, up = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([5.0, 2.0, 3.0])
    e = torch.e
    expected = torch.tensor([0.0, 2 / (1 + 1 / e), -3 / (1 + e)])
    torch.testing.assert_close(glu(gate, up, impl=impl), expected)
    # GELU's tanh approximation at 1 is 0.841192, at -1 that less 1.
    got = glu(gate, up, activation="gelu_tanh", impl=impl)
    torch.testing.assert_close(got, torch.tensor([0.0, 1.682384, -0.476424]), rtol=0, atol=2e-6)


# ---- against float64 -----------------------------------------------------------------------------


def check_rmsnorm(size, dtype, impl="cpu", device="cpu"):
    x, residual = (draw(*size, dtype=dtype, seed=seed).to(device) for seed in (0, 1))
    weight = draw(size[-1], dtype=dtype, seed=2).to(device)

    def added(impl, x, weight, residual):
        return rmsnorm(x, weight, residual=residual, impl=impl)

    def alone(impl, x, weight):
        return rmsnorm(x, weight, weight_offset=1.0, eps=1e-3, impl=impl)[0]

    check_as_exact_as_reference(impl, added, x, weight, residual)
    check_as_exact_as_reference(impl, alone, x, weight)


@needs_cpu
@every_dtype
@pytest.mark.parametrize("size", SIZES)
def test_rmsnorm(size, dtype):
    check_rmsnorm(size, dtype)


def check_rope(size, dtype, impl="cpu", device="cpu"):
    x = draw(*size, dtype=dtype).to(device)
    weight = draw(size[-1], dtype=dtype, seed=1).to(device)
    angles = draw(size[0], size[-1] // 2, seed=2, scale=3.0).to(device)

    def plain(impl, x):
        like = angles.double() if x.dtype == torch.float64 else angles
        return rope(x, like.cos(), like.sin(), impl=impl)

    def normed(impl, x, weight):
        like = angles.double() if x.dtype == torch.float64 else angles
        return rope(x, like.cos(), like.sin(), norm_weight=weight, weight_offset=1.0, impl=impl)

    check_as_exact_as_reference(impl, plain, x)
    check_as_exact_as_reference(impl, normed, x, weight)


@needs_cpu
@every_dtype
@pytest.mark.parametrize("size", [(1, 1, 2), (3, 2, 6), (70, 3, 32), (9, 4, 80), (300, 1, 256)])
def test_rope(size, dtype):
    check_rope(size, dtype)


def check_glu(size, activation, dtype, impl="cpu", device="cpu"):
    gate = draw(*size, dtype=dtype, scale=4.0).to(device)
    up = draw(*size, dtype=dtype, seed=1).to(device)

    def function(impl, gate, up):
        return glu(gate, up, activation=activation, impl=impl)

    check_as_exact_as_reference(impl, function, gate, up)


@needs_cpu
@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [*SIZES, (9001,)])
def test_glu(size, activation, dtype):
    check_glu(size, activation, dtype)


def check_activations_far_out(activation, impl="cpu", device="cpu"):
    gate = torch.tensor([-1e30, -1e19, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 1e19, 1e30])
    gate = gate.to(device)
    up = torch.ones_like(gate)
    (got,), (to_gate, to_up) = with_gradients(
        lambda g, u: glu(g, u, activation=activation, impl=impl), gate, up
    )
    (want,), (want_gate, want_up) = with_gradients(
        lambda g, u: glu(g, u, activation=activation, impl="reference"), gate.double(), up.double()
    )
    finite = want_gate.isfinite()  # PyTorch's own derivative of GELU is NaN where a cube overflows
    for x, y in ((got, want), (to_gate[finite], want_gate[finite]), (to_up, want_up)):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-30)
    assert to_gate.isfinite().all()


@needs_cpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(activation):
    check_activations_far_out(activation)


# ---- which gradients, which bits -----------------------------------------------------------------


@every_impl
def test_only_wanted_gradients(impl):
    x, weight = draw(5, 8), draw(8)
    grad = torch.autograd.grad
    leaf = x.clone().requires_grad_()
    wanted = grad(rmsnorm(leaf, weight, impl=impl)[0].sum(), leaf)[0]
    scale = weight.clone().requires_grad_()
    torch.testing.assert_close(
        grad(rmsnorm(leaf, scale, impl=impl)[0].sum(), [leaf, scale])[0], wanted
    )
    # The sum alone, then the norm alone, of a residual addition.
    residual = draw(5, 8, seed=1).requires_grad_()
    y, h = rmsnorm(leaf, scale, residual=residual, impl=impl)
    assert torch.equal(grad(h.sum(), residual, retain_graph=True)[0], torch.ones(5, 8))
    left, right = grad(y.sum(), [leaf, residual])
    assert torch.equal(left, right)
    assert not rmsnorm(x, weight, impl=impl)[0].requires_grad


@needs_cpu
def test_a_row_has_its_own_bits_and_threads_do_not_matter():
    x, residual, weight = draw(301, 96), draw(301, 96, seed=1), draw(96, seed=2)
    angles = draw(301, 16, seed=3)

    def everything(rows=slice(None)):
        parts = [
            lambda x, r, w: rmsnorm(x, w, residual=r),
            lambda x, r, w: rope(
                x.view(-1, 3, 32),
                angles[rows].cos(),
                angles[rows].sin(),
                norm_weight=w[:32].contiguous(),
            ),
            lambda x, r, w: glu(x, r) + 0 * w.sum(),
        ]
        return [with_gradients(part, x[rows], residual[rows], weight) for part in parts[:1]] + [
            with_gradients(lambda x, w, part=part: part(x, residual[rows], w), x[rows], weight)
            for part in parts[1:]
        ]

    torch.set_num_threads(1)
    one = everything()
    torch.set_num_threads(3)
    three = everything()
    for (a, ga), (b, gb) in zip(one, three, strict=True):
        assert all(map(torch.equal, (*a, *ga), (*b, *gb)))
    alone = everything(slice(200, 201))
    for (a, _), (b, _) in zip(one, alone, strict=True):
        assert all(torch.equal(x[200:201], y) for x, y in zip(a, b, strict=True))


@needs_cpu
def test_opcheck():
    x, weight = draw(5, 2, 8).requires_grad_(), draw(8).requires_grad_()
    cos, sin = draw(5, 4).cos(), draw(5, 4).sin()
    ops = torch.ops.fastrl
    torch.library.opcheck(ops.rmsnorm, (x, weight, x.detach(), 1e-6, 0.0, "cpu"))
    torch.library.opcheck(ops.rope, (x, cos, sin, weight, 1e-6, 0.0, "cpu"))
    torch.library.opcheck(ops.glu, (x, draw(5, 2, 8).requires_grad_(), "silu", "cpu"))


def test_nothing_to_do():
    empty = torch.empty(0, 8)
    assert rmsnorm(empty, torch.ones(8))[0].shape == (0, 8)
    assert glu(empty, empty).shape == (0, 8)
    assert rope(torch.empty(0, 2, 8), torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rmsnorm(x.long(), torch.ones(8)), "rmsnorm: x must be float32, bfloat16"),
        (lambda x: rmsnorm(x, torch.ones(7)), r"weight must be floating point \[8\]"),
        (lambda x: rmsnorm(x, torch.ones(8), residual=x[:1]), "residual must be like x"),
        (lambda x: rmsnorm(x, torch.ones(8), impl="cuda"), "has no such implementation"),
        (lambda x: rope(x, x, x), r"x must be \[T, heads, D\] with D even"),
        (lambda x: rope(x[None], x, x), r"cos must be float32 of shape \(1, 4\)"),
        (lambda x: glu(x, x.double()), "up must be like gate"),
        (lambda x: glu(x, x, activation="relu"), "activation='relu' is unknown"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 8))


# ---- models --------------------------------------------------------------------------------------


def packed_batch():
    g = torch.Generator().manual_seed(0)
    prompts = [[5, 6, 7, 8], [5, 6, 7, 8], [9], [9], [9], list(range(10, 31))]
    ids = torch.randint(VOCAB, (6, 11), generator=g)
    mask = torch.arange(11) < torch.tensor([11, 3, 7, 0, 1, 9])[:, None]
    return prompts, ids, mask


def own_states(model, packed):
    """By the model's own layers."""
    with shared_attention(model):
        return backbone(model)(
            input_ids=packed.input_ids,
            position_ids=packed.layout.positions()[None],
            group_layout=packed.layout,
            use_cache=False,
        ).last_hidden_state[0]


def states_and_gradients(model, function, batch):
    states = function(model, batch)
    upstream = draw(*states.shape, seed=3).to(states)
    parameters = {n: p for n, p in backbone(model).named_parameters() if p.requires_grad}
    return states, dict(
        zip(parameters, torch.autograd.grad(states, [*parameters.values()], upstream), strict=True)
    )


def check_family(family, dtype, device="cpu", **changes):
    """Packed states and gradients against the model's own forward, both against float64."""
    model = tiny_model(family, dtype, **changes).to(device)
    prompts, ids, mask = packed_batch()
    packed = pack_groups(prompts, ids.to(device), mask.to(device))
    assert runs_through_ops(model)
    states, gradients = states_and_gradients(model, packed_states, packed)
    own, own_gradients = states_and_gradients(model, own_states, packed)
    wide = tiny_model(family, dtype, **changes).to(device).double()
    exact, exact_gradients = states_and_gradients(wide, own_states, packed)
    assert not runs_through_ops(wide)
    assert states.dtype == dtype
    slack = 2e-6 if dtype == torch.float32 else 1e-3
    assert relative(states, exact) <= 1.5 * relative(own, exact) + slack
    for name, want in exact_gradients.items():
        error, usual = relative(gradients[name], want), relative(own_gradients[name], want)
        assert gradients[name].dtype == dtype and error <= 2 * usual + slack, name


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_each_family(family, dtype):
    check_family(family, dtype)


@needs_cpu
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_each_family(family):
    model = tiny_model(family)
    ids = torch.randint(VOCAB, (3, 13), generator=torch.Generator().manual_seed(0))
    own = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(row_states(model, ids), own, rtol=1e-4, atol=1e-4)
    assert row_states(model, ids[:0]).shape == (0, 13, 48)


@needs_cpu
def test_who_looks_on_or_changed_a_layer_gets_the_models_own_forward():
    model = tiny_model("qwen3")
    layer = backbone(model).layers[1]
    seen = []
    hook = layer.mlp.register_forward_hook(lambda *_: seen.append(1))
    assert not runs_through_ops(model)
    want = group_logprobs(model, packed_batch()).logprob
    assert seen
    hook.remove()
    assert runs_through_ops(model)
    torch.testing.assert_close(group_logprobs(model, packed_batch()).logprob, want)

    class Twice(type(layer.mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.mlp.__class__ = Twice
    assert not runs_through_ops(model)
    assert not torch.allclose(group_logprobs(model, packed_batch()).logprob, want)


@needs_cpu
def test_adapters_checkpoints_and_autocast():
    batch = packed_batch()
    model = add_lora(
        tiny_model("llama3"), rank=2, alpha=4, dropout=0.0, target_modules="all-linear", seed=0
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    assert runs_through_ops(model)
    packed = pack_groups(*batch)
    states, gradients = states_and_gradients(model, packed_states, packed)
    own, own_gradients = states_and_gradients(model, own_states, packed)
    torch.testing.assert_close(states, own, rtol=1e-4, atol=1e-4)
    assert all("lora" in name for name in gradients)
    for name, want in own_gradients.items():
        assert relative(gradients[name], want) < 1e-4, name

    model = tiny_model("gemma2").train()
    plain = states_and_gradients(model, packed_states, packed)
    model.gradient_checkpointing_enable()
    again = states_and_gradients(model, packed_states, packed)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][n], g) for n, g in again[1].items())

    model = tiny_model("qwen2")
    with torch.autocast("cpu", torch.bfloat16):
        states, own = packed_states(model, packed), own_states(model, packed)
    exact = own_states(tiny_model("qwen2").double(), packed)
    assert relative(states, exact) <= 1.5 * relative(own, exact)


@needs_cpu
def test_groups_and_padded_rows_agree():
    model = tiny_model("mistral")
    batch = packed_batch()
    together, apart = group_logprobs(model, batch), completion_logprobs(model, *batch)
    torch.testing.assert_close(together.logprob, apart.logprob, rtol=1e-5, atol=1e-5)
