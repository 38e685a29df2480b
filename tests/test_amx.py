"""The AMX code on a CPU without AMX or bf16: the same C++, both emulated, in the ops' tests."""

import importlib.machinery
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_proof
import pybind11
import pytest

from fastrl.kernels import native

pytestmark = pytest.mark.slow  # compiles another module
ROOT = Path(__file__).resolve().parent.parent
# Emulated tiles take minutes for a matrix of many rows and no depth, for the largest grids, and for
# whole models: of these bf16 alone (the second dtype), which is what tiles multiply.
TESTS = {
    "test_attention.py": "lengths or bits or company or extreme",
    "test_decode.py": "(hidden_states and qwen2 or bits) and dtype1 or int8",
    "test_decode_int8.py": "hidden_states and (qwen2 or gemma2) and dtype0 or cache_line",
    "test_decode_lora.py": "(hidden_states and qwen2 or bits and sizes0) and dtype1",
    "test_logprob.py": "not more_logits_than_int32",
    "test_logprob_kept.py": "dtype1 or room or accumulation or one_backward",
    "test_logprob_means.py": "dtype1 and (bits or unlikely or certain) or what_is_kept",
    "test_quant.py": "bits and not bitsandbytes and not instruction_set or by_hand",
    "test_sample.py": "not beyond_one_group",
}


def why_not() -> str | None:
    if native.why_missing:
        return native.why_missing
    if "avx512_vnni" not in native.module().cpu_isas():
        return "what surrounds the tiles needs AVX-512 with VNNI"
    if shutil.which("cmake") is None and not (Path(sys.executable).parent / "cmake").exists():
        return "cmake is not installed"
    return None


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("amx")
    cmake = shutil.which("cmake") or str(Path(sys.executable).parent / "cmake")
    for command in (
        [
            *(cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"),
            *(
                "-DFASTRL_CUDA=off",
                "-DFASTRL_EMULATE_AMX=on",
                f"-DPython_EXECUTABLE={sys.executable}",
            ),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        [cmake, "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob(f"_C*{importlib.machinery.EXTENSION_SUFFIXES[0]}"))


@pytest.mark.parametrize("test", TESTS)
def test_ops_on_emulated_tiles(emulated, test):
    code = (
        "import importlib.util, pytest, sys\n"
        f"spec = importlib.util.spec_from_file_location('fastrl._C', {str(emulated)!r})\n"
        "sys.modules['fastrl._C'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sys.modules['fastrl._C'])\n"
        "assert sys.modules['fastrl._C'].isa() == 'amx'\n"
        f"code = pytest.main(['-q', '-p', 'no:cacheprovider', '-k', {TESTS[test]!r}, {test!r}])\n"
        "sys.exit(code)"
    )
    assert " passed" in gpu_proof.run_python(code, FASTRL_ISA="amx")
