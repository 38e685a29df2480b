"""The package and its native build, as far as that is quick; packaging.sh installs wheels."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_proof import run_python

from fastrl.kernels import native

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    native.why_missing != "", reason=f"no native module: {native.why_missing}"
)


def setup_py(*command, **environment):
    """Runs setup.py with nothing but ``environment``."""
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_op_families_are_mapped_and_kernels_stays_free():
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "tests/__init__.py").exists()
    for family in (ROOT / "kernels").glob("*/__init__.py"):
        name = family.parent.name
        found = run_python(f"import fastrl.kernels.{name} as m; print(m.__file__)").strip()
        assert Path(found).name == "__init__.py" and Path(found).parent.name == name


def test_hugging_faces_kernels_wins_over_our_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("whose = 'theirs'\n")
    code = f"import sys; sys.path[:0] = ['', {str(tmp_path)!r}]\n"
    code += f"import os; os.chdir({str(ROOT)!r})\n"
    code += "import kernels, fastrl.kernels\n"
    code += "assert kernels.whose == 'theirs' and callable(fastrl.kernels.gae)"
    run_python(code)


def test_python_and_cpp_name_the_same_op_families():
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        if (ROOT / "kernels" / source.stem).exists():
            assert (ROOT / "csrc/cpu" / f"{source.stem}.cpp").exists()
    for source in (ROOT / "csrc").rglob("*.*"):
        text = source.read_text()
        assert "torch/" not in text and "ATen" not in text, f"{source} includes PyTorch"
        assert "pybind11" not in text or source.name.startswith("bindings")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_says_what_every_target_does():
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == targets.split()


# ---- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["FASTRL_NATIVE", "FASTRL_CUDA"])
def test_an_unknown_build_choice_raises(variable, tmp_path):
    environment = {"PATH": str(Path("/usr/bin")), variable: "yes"}
    done = setup_py("-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path), **environment)
    assert done.returncode != 0
    assert f"{variable}='yes' is not one of auto, on, off" in done.stderr


@pytest.mark.parametrize("wanted", ["auto", "on", "off"])
def test_without_a_compiler(wanted, tmp_path):
    environment = {"PATH": str(tmp_path), "FASTRL_NATIVE": wanted}
    done = setup_py("-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path), **environment)
    assert (done.returncode == 0) == (wanted != "on"), done.stderr
    assert ("UserWarning: no C++ compiler found" in done.stderr) == (wanted == "auto")
    if wanted == "on":
        assert "FASTRL_NATIVE=on, but no C++ compiler was found" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


# ---- at run time ---------------------------------------------------------------------------------


@needs_native
def test_build_info():
    info = native.module().build_info()
    assert info["compiler"] and info["isas"][0] == "generic"
    assert native.module().isa() in native.module().cpu_isas()
    assert set(native.module().cpu_isas()) <= set(info["isas"])
    assert info["cuda"] == ("sm_90a" in info["cuda_archs"])


@needs_native
def test_every_usable_instruction_set_can_be_forced():
    for isa in native.module().cpu_isas():
        code = "from fastrl.kernels import native; print(native.module().isa())"
        assert run_python(code, FASTRL_ISA=isa).strip() == isa


@needs_native
def test_an_instruction_set_that_cannot_run_raises():
    code = "import fastrl.kernels"
    with pytest.raises(
        AssertionError, match="FASTRL_ISA=sse9 is unknown; use one of generic, avx2"
    ):
        run_python(code, FASTRL_ISA="sse9")
    for isa in {"avx2", "avx512", "amx"} - set(native.module().cpu_isas()):
        with pytest.raises(
            AssertionError, match=f"FASTRL_ISA={isa} cannot run: .*usable here: gen"
        ):
            run_python(code, FASTRL_ISA=isa)


def test_native_off_runs_on_the_reference_and_says_why():
    run_python(
        "import pytest, torch\n"
        "from fastrl.kernels import gae\n"
        "x = torch.ones(2, 3)\n"
        "with pytest.warns(RuntimeWarning, match='slow reference.*FASTRL_NATIVE=off'):\n"
        "    gae(x, x)\n"
        "import warnings; warnings.simplefilter('error')\n"
        "gae(x, x)  # warned once\n"
        "with pytest.raises(ValueError, match=\"'cpu' is unavailable: FASTRL_NATIVE=off\"):\n"
        "    gae(x, x, impl='cpu')\n"
        "import sys; assert 'fastrl._C' not in sys.modules\n",
        FASTRL_NATIVE="off",
    )


def test_a_wrong_native_choice_at_run_time_raises():
    with pytest.raises(AssertionError, match="FASTRL_NATIVE='no' is not one of auto, on, off"):
        run_python("import fastrl.kernels", FASTRL_NATIVE="no")


def test_choose(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda impl, device: {"cpu": "gone"}.get(impl))
    assert native.choose("op", "reference", CPU, ("cpu",)) == "reference"
    with pytest.raises(ValueError, match=r"op: impl='cpu' is unavailable: gone; available: ref"):
        native.choose("op", "cpu", CPU, ("cpu",))
    with pytest.raises(ValueError, match="op has no such implementation"):
        native.choose("op", "triton", CPU, ("cpu",))
    with pytest.warns(RuntimeWarning, match="op runs on the slow reference implementation: gone"):
        assert native.choose("op", "auto", CPU, ("cpu",)) == "reference"
    assert native.choose("op", "auto", torch.device("cuda"), ("triton", "cuda")) == "cuda"
    assert native.choose("op", "auto", torch.device("meta"), ("cpu",)) == "reference"
