"""linear_logprob on a CPU: what its forward keeps for the backward, and where, changes no bit."""

import pytest
import torch
from lm_head import needs_cpu, problem

from fastrl.kernels import linear_logprob

pytestmark = needs_cpu


def keeps(out):
    """What the forward of `out` keeps; see kernels/logprob/library.py."""
    node = out.logprob.grad_fn
    while not hasattr(node, "settings"):
        node = node.next_functions[0][0]
    return node.settings[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "which"), [(3300, "logprob"), (3300, "all"), (6400, "all")])
def test_workspace_changes_no_bit(dtype, n, which):
    """Nothing kept and a walk for each gradient, some blocks kept, all: with ignored rows."""
    hidden, weight, target = problem(n, 24, 1009, dtype)
    weight = weight / 5
    target[::3] = -100
    upstream = torch.randn(n)

    def run(workspace_mb, needs=(True, True)):
        inputs = [
            x.detach().requires_grad_(n) for x, n in zip((hidden, weight), needs, strict=True)
        ]
        options = {"temperature": 0.8, "entropy": True, "impl": "cpu", "workspace_mb": workspace_mb}
        out = linear_logprob(*inputs, target, **options)
        loss = (out.logprob * upstream).sum()
        if which == "all":
            loss = loss + (out.entropy * upstream)[:900].sum() - 0.1 * out.lse.sum()
        loss.backward()
        return [x.grad for x in inputs]

    least = run(0)
    assert all(x.abs().sum() > 0 for x in least)
    for workspace_mb in (7.5, 9, 64):
        assert all(torch.equal(a, b) for a, b in zip(run(workspace_mb), least, strict=True))
    assert torch.equal(run(64, (False, True))[1], least[1])
    with pytest.raises(ValueError, match="workspace_mb=-1 must be 0 or more"):
        run(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "h", "v"),
    [(1, 96, 60), (129, 33, 777), (300, 64, 1009), (2500, 70, 1200), (6400, 70, 777)],
)
def test_in_weights_gradient_changes_no_bit(dtype, n, h, v):
    """All exponentials there, or some of them, of all tokens in one go and in several."""
    hidden, weight, target = problem(n, h, v, dtype)
    target[1::3] = -100
    upstream = torch.randn(n)

    def run(inplace, needs=(True, True), **options):
        inputs = [
            x.detach().requires_grad_(n) for x, n in zip((hidden, weight), needs, strict=True)
        ]
        out = linear_logprob(
            *inputs, target, temperature=0.8, impl="cpu", inplace_backward=inplace, **options
        )
        assert keeps(out) == ("in_gradient" if inplace and needs[1] else "exponentials")
        (out.logprob * upstream + 0.1 * out.lse).sum().backward()
        return [*out[:2], *(x.grad for x in inputs)]

    want = run(False, workspace_mb=0)
    for got in (run(True, workspace_mb=0), run(True, (False, True), workspace_mb=0)):
        for a, b in zip(got, want, strict=True):
            assert a is None or torch.equal(a, b)


def test_in_weights_gradient_where_there_is_more_room():
    hidden, weight, target = problem(700, 64, 2048)  # 5.5 MB of logits, 0.5 of weight

    def kept(rows=700, inplace=True, **options):
        out = linear_logprob(
            hidden[:rows], weight, target[:rows], inplace_backward=inplace, **options
        )
        return keeps(out)

    weight.requires_grad_()
    assert kept(workspace_mb=0.9) == "in_gradient"
    assert kept(workspace_mb=0.9, inplace=False) == "exponentials"
    assert kept(workspace_mb=1.1) == "exponentials"  # all of the gradient's room, and more
    assert kept(8, workspace_mb=0.9) == "in_gradient"
    assert kept(8, workspace_mb=1.2) == "exponentials"  # all that there is
    for exact in ({"softcap": 6.0}, {"bias": torch.randn(2048)}, {"entropy": True}):
        assert kept(workspace_mb=0, **exact) == "exponentials"
    hidden.requires_grad_()
    weight.requires_grad_(False)
    assert kept(workspace_mb=0) == "means"


def test_in_weights_gradient_there_is_one_backward():
    hidden, weight, target = problem(300, 64, 1009)
    weight.requires_grad_(), hidden.requires_grad_()
    out = linear_logprob(hidden, weight, target, workspace_mb=0, inplace_backward=True)
    loss = out.logprob.sum()
    loss.backward(retain_graph=True)
    kept = weight.grad.clone()
    with pytest.raises(RuntimeError, match="inplace_backward=True, for one backward alone"):
        loss.backward()
    assert torch.equal(weight.grad, kept)


def test_in_weights_gradient_there_is_one_backward_with_saved_tensors_elsewhere():
    """Where hooks hold them, autograd does not look for what was modified in place."""
    hidden, weight, target = problem(300, 64, 1009)
    weight.requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        out = linear_logprob(hidden, weight, target, workspace_mb=0, inplace_backward=True)
    out.logprob.sum().backward(retain_graph=True)
    kept = weight.grad.clone()
    weight.grad = None
    linear_logprob(hidden, weight, target).logprob.sum().backward()
    assert torch.equal(weight.grad, kept)
    with pytest.raises(RuntimeError, match="for one backward alone"):
        out.logprob.sum().backward()


def test_in_weights_gradient_with_accumulation_and_without_rows():
    hidden, weight, target = problem(300, 64, 1009)
    weight.requires_grad_()

    def add(target, inplace):
        out = linear_logprob(hidden, weight, target, workspace_mb=0, inplace_backward=inplace)
        out.logprob.sum().backward()

    grads = []
    for inplace in (False, True):
        weight.grad = None
        add(target, inplace)
        add(target.roll(7), inplace)
        add(torch.full_like(target, -100), inplace)
        grads.append(weight.grad)
    assert torch.equal(*grads)


def test_compiled_with_inplace_backward():
    hidden, weight, target = problem(300, 64, 1009)
    weight.requires_grad_()

    def loss(weight):
        out = linear_logprob(
            hidden, weight, target, impl="cpu", workspace_mb=0, inplace_backward=True
        )
        return out.logprob.sum()

    (want,) = torch.autograd.grad(loss(weight), weight)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(weight), weight)
    assert torch.equal(got, want)


def test_opcheck():
    hidden, weight, target = problem(40, 8, 110)
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), target, None, None)
    settings = (0.8, 0.0, 1.0, -100, "cpu", 0, "in_gradient")
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastrl.linear_logprob, (*arguments, *settings), test_utils=parts
    )
    results = torch.ops.fastrl.linear_logprob(*arguments, *settings)
    *statistics, kept = (x.detach() for x in results)
    upstream = [torch.randn(40) for _ in range(3)]
    fixed = [None if x is None else x.detach() for x in arguments]
    needed = [True, True, False]
    torch.library.opcheck(
        torch.ops.fastrl.linear_logprob_bwd_,
        (*fixed, *settings, kept, *statistics, *upstream, needed),
        test_utils=("test_schema", "test_faketensor"),
    )
