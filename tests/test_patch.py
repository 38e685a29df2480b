"""`fastrl.patch`: finding, checking, comparing and putting back, on a package made on the spot."""

import importlib
import subprocess
import sys
import warnings

import pytest
import torch

import fastrl
from fastrl import integrations
from fastrl.integrations.comparison import PatchError
from fastrl.integrations.patching import Declined, Patch, Registration, Replacement

MATHS = """
import torch
calls = []

def scaled(x, factor=2.0, *, root=False):
    calls.append(x)
    return (factor * x).sqrt() if root else factor * x

class Layer:
    def forward(self, x):
        return x + 1

class Base(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad

REGISTRY = {"scaled": scaled}

def register(name):
    def add(function):
        REGISTRY[name] = function
        return function
    return add
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A package `fastrl_lab`: maths, user (imports by name) and late (the same, not loaded)."""
    folder = tmp_path / "fastrl_lab"
    folder.mkdir()
    for name, text in {
        "__init__": "__version__ = '1.5'",
        "maths": MATHS,
        "user": "from fastrl_lab.maths import scaled\nfrom fastrl_lab.maths import scaled as again",
        "late": "from fastrl_lab.maths import scaled",
        "needy": "import a_package_that_is_not_there",
    }.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("fastrl_lab.user")
    yield sys.modules["fastrl_lab.maths"]
    for name in [m for m in sys.modules if m.split(".")[0] == "fastrl_lab"]:
        del sys.modules[name]


def scaled(x, factor=2.0, *, root=False):
    return (factor * x).sqrt() if root else factor * x


def entry(function=scaled, **options):
    return Replacement("fastrl_lab.maths.scaled", function, **options)


def test_every_binding_is_replaced_and_put_back(lab):
    user, original = sys.modules["fastrl_lab.user"], lab.scaled
    patch = Patch("fastrl_lab", [entry()])
    late = importlib.import_module("fastrl_lab.late")
    ours = lab.scaled
    assert ours is not original
    assert [user.scaled, user.again, late.scaled, lab.REGISTRY["scaled"]] == [ours] * 4
    assert set(patch.replaced) == {
        "fastrl_lab.maths.scaled",
        "fastrl_lab.user.scaled",
        "fastrl_lab.user.again",
        "fastrl_lab.maths.REGISTRY['scaled']",
    }
    assert all(r == (original, ours) for r in patch.replaced.values())
    patch.undo()
    patch.undo()  # nothing left to do
    assert [lab.scaled, user.scaled, user.again, late.scaled] == [original] * 4
    assert {"scaled": original} == lab.REGISTRY


def test_methods_autograd_functions_and_registrations(lab):
    def forward(self, x):
        return x + 1

    def triple(x):
        return 3 * x

    known = [
        Replacement("fastrl_lab.maths.Layer.forward", forward),
        Replacement(
            "fastrl_lab.maths.Base.apply", triple, declared="fastrl_lab.maths.Base.forward"
        ),
    ]
    added = [Registration("fastrl_lab.maths.register", "fastrl_lab.maths.REGISTRY", "ours", triple)]
    before = lab.Layer.forward
    with Patch("fastrl_lab", known, added) as patch:
        x = torch.ones(2, requires_grad=True)
        assert lab.Layer().forward(x).tolist() == [2, 2]
        lab.Base.apply(x).sum().backward()
        assert x.grad.tolist() == [3, 3]
        assert lab.REGISTRY["ours"] is triple
        assert patch.replaced["fastrl_lab.maths.REGISTRY['ours']"] == (None, triple)
        with pytest.raises(PatchError, match=r"REGISTRY\['ours'\] is taken"):
            Patch("fastrl_lab", [], added)
    assert lab.Layer.forward is before
    assert "apply" not in vars(lab.Base)
    assert set(lab.REGISTRY) == {"scaled"}


def test_a_renamed_symbol_raises_and_nothing_is_replaced(lab):
    original = lab.scaled
    for name, error in (
        ("fastrl_lab.maths.renamed", PatchError),
        ("fastrl_lab.moved.scaled", PatchError),
        ("fastrl_lab.maths.Layer.gone", PatchError),
        ("fastrl_lab.needy.scaled", ModuleNotFoundError),  # it is there, but does not import
    ):
        match = "1.5: it moved" if error is PatchError else "not_there"
        with pytest.raises(error, match=match):
            Patch("fastrl_lab", [entry(), Replacement(name, scaled)])
        assert lab.scaled is original


def test_a_changed_signature_raises(lab):
    def renamed(y, factor=2.0, *, root=False): ...
    def other_default(x, factor=1.0, *, root=False): ...
    def fewer(x, factor=2.0): ...
    def positional(x, factor=2.0, root=False): ...

    for function in (renamed, other_default, fewer, positional):
        with pytest.raises(PatchError, match=r"other parameters than fastrl knows: \(x, factor"):
            Patch("fastrl_lab", [entry(function)])


def test_a_second_patch_raises_until_the_first_is_undone(lab):
    with Patch("fastrl_lab", [entry()]), pytest.raises(PatchError, match="is fastrl's already"):
        Patch("fastrl_lab", [entry()])
    Patch("fastrl_lab", [entry()]).undo()


def test_undo_after_somebody_else_replaced_it(lab):
    patch, original = Patch("fastrl_lab", [entry()]), lab.scaled
    lab.scaled = other = lambda x: x
    with pytest.raises(PatchError, match="undo that first"):
        patch.undo()
    assert lab.scaled is other
    lab.scaled = original
    patch.undo()


def test_an_error_inside_the_block_puts_back_too(lab):
    original = lab.scaled
    with pytest.raises(KeyError), Patch("fastrl_lab", [entry()]):
        raise KeyError
    assert lab.scaled is original


def test_only(lab):
    layer = Replacement("fastrl_lab.maths.Layer.forward", lambda self, x: x + 1)
    with Patch("fastrl_lab", [entry(), layer], only=["forward"]) as patch:
        assert list(patch.replaced) == ["fastrl_lab.maths.Layer.forward"]
    with pytest.raises(PatchError, match=r"called other; there is fastrl_lab\.maths\.scaled"):
        Patch("fastrl_lab", [entry()], only=["other"])
    with pytest.raises(PatchError, match="nothing to replace"):
        Patch("fastrl_lab", [entry()], only=[])
    with pytest.raises(ValueError, match="must be a list"):
        Patch("fastrl_lab", [entry()], only="scaled")


def test_compared_on_the_first_call_of_each_kind_and_then_left_alone(lab):
    def count(times, *args, **kwargs):
        lab.calls.clear()
        for _ in range(times):
            assert torch.equal(lab.scaled(*args, **kwargs), scaled(*args, **kwargs))
        return len(lab.calls)

    x = torch.rand(5)
    with Patch("fastrl_lab", [entry()]):
        assert count(3, x) == 1
        assert count(3, torch.rand(99)) == 0  # another size
        assert count(2, x, 3.0) == 0  # another number
        assert count(2, x, root=True) == 1  # another option
        assert count(2, x.bfloat16()) == 1
        assert count(2, x.clone().requires_grad_()) == 1
        with torch.no_grad():
            assert count(2, x) == 1


def test_other_values_raise_and_name_function_and_difference(lab):
    def off(by):
        def scaled(x, factor=2.0, *, root=False):
            return factor * x + by

        return entry(scaled)

    x = torch.ones(4)
    with Patch("fastrl_lab", [off(0.5)]), pytest.raises(PatchError) as error:
        lab.scaled(x)
    assert str(error.value).startswith(
        "fastrl_lab.maths.scaled: fastrl's output differs from the original's by 0.5 "
    )
    assert "torch.float32 (allowed 0.0002)" in str(error.value)  # 1e-4 of the largest, 2
    with Patch("fastrl_lab", [off(1e-4)]):
        assert lab.scaled(x).tolist() == (2 * x + 1e-4).tolist()
    with Patch("fastrl_lab", [off(0.05)]):  # 16 bits explain more
        lab.scaled(x.bfloat16())
        with pytest.raises(PatchError):
            lab.scaled(x)
    with Patch("fastrl_lab", [off(float("nan"))]), pytest.raises(PatchError, match="by nan"):
        lab.scaled(x)


def test_other_gradients_raise(lab):
    def wrong(x, factor=2.0, *, root=False):
        return factor * x.detach() + 0.9 * factor * (x - x.detach())

    def none(x, factor=2.0, *, root=False):
        return factor * x.detach()

    x = torch.ones(4, requires_grad=True)
    with Patch("fastrl_lab", [entry(wrong)]):
        with pytest.raises(PatchError, match=r"gradient of x differs from the original's by 0\.2"):
            lab.scaled(x)
        with torch.no_grad():
            lab.scaled(x)  # its values are right
    with (
        Patch("fastrl_lab", [entry(none)]),
        pytest.raises(PatchError, match="the original has one, fastrl's has none"),
    ):
        lab.scaled(x)
    assert x.grad is None


def test_gradients_in_16_bits_are_compared_in_norm(lab):
    def of_share(share):
        def scaled(x, factor=2.0, *, root=False):
            return factor * x.detach() + share * factor * (x - x.detach())

        return entry(scaled)

    x = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    with Patch("fastrl_lab", [of_share(0.75)]):
        lab.scaled(x)
    with (
        Patch("fastrl_lab", [of_share(0.5)]),
        pytest.raises(PatchError, match=r"gradient of x, in norm, differs .* torch\.bfloat16"),
    ):
        lab.scaled(x)


def test_other_shapes_and_counts_raise(lab):
    def two(x, factor=2.0, *, root=False):
        return factor * x, x

    def shorter(x, factor=2.0, *, root=False):
        return factor * x[:1]

    def nothing(x, factor=2.0, *, root=False):
        return None

    for other, match in (
        (two, "returns 1 values, fastrl's 2"),
        (shorter, r"output is \(4,\), fastrl's \(1,\)"),
        (nothing, "is None on one side alone"),
    ):
        with Patch("fastrl_lab", [entry(other)]), pytest.raises(PatchError, match=match):
            lab.scaled(torch.ones(4))


def test_declined_calls_go_to_the_original_with_one_warning(lab):
    def picky(x, factor=2.0, *, root=False):
        if root:
            raise Declined("roots are not for us")
        if factor < 0:
            raise Declined
        return factor * x

    with Patch("fastrl_lab", [entry(picky)]):
        with pytest.warns(RuntimeWarning, match=r"scaled runs as without fastrl: roots are not"):
            assert lab.scaled(torch.full((1,), 8.0), root=True).tolist() == [4.0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lab.scaled(torch.full((1,), 8.0), root=True).tolist() == [4.0]
            assert lab.scaled(torch.ones(1), -1.0).tolist() == [-1.0]


def test_frameworks(monkeypatch):
    with pytest.raises(ValueError, match="framework='torch' is unknown; use one of trl, verl"):
        fastrl.patch("torch")
    monkeypatch.setitem(integrations.SUPPORTED, "fastrl_lab", ">=1")
    with pytest.raises(ImportError, match="not installed; pip install fastrl_lab"):
        fastrl.patch("fastrl_lab")
    monkeypatch.setitem(integrations.SUPPORTED, "torch", "<1.0")
    with pytest.raises(PatchError, match=r"torch 2\S* is installed, and fastrl knows <1.0"):
        fastrl.patch("torch")


def test_importing_fastrl_imports_nothing_heavy():
    code = "import fastrl, sys; fastrl.patch; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
