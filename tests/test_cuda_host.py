"""The header that runs csrc/cuda on the host: while it is wrong, the op tests prove nothing."""

import shutil

import gpu_proof
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
POINTER = "p = lambda x: ctypes.c_void_p(x.ctypes.data)\n"
REVERSE = POINTER + (
    "x = np.arange(120, dtype=np.float32)\n"
    "assert lib.reverse(p(x), 3, 40, {floats}, {guarded}) == 0\n"
    "out['x'] = x"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    library = gpu_proof.build_on_host("selftest.cpp", folder)
    return lambda code, **arrays: gpu_proof.run_on_host(library, code, folder, **arrays)


def test_shared_memory_shuffles_and_atomics_sum(run):
    x = np.arange(1000, dtype=np.float32)
    code = POINTER + (
        "total = np.zeros(1, np.float32)\nassert lib.sum(p(x), 1000, p(total)) == 0\n"
        "out['total'] = total"
    )
    assert run(code, x=x)["total"] == x.sum()


def test_primitives(run):
    code = POINTER + "rows = np.zeros((10, 32), np.int32)\nlib.lanes(p(rows))\nout['rows'] = rows"
    rows, lane = run(code)["rows"], np.arange(32)
    assert (rows[0] == 3).all()
    assert (rows[1] == lane // 8 * 8 + 1).all()
    assert (rows[2] == np.where(lane < 27, lane + 5, lane)).all()
    assert (rows[3] == np.where(lane >= 5, lane - 5, lane)).all()
    assert (rows[4].view(np.uint32) == 0xAAAAAAAA).all()
    assert (rows[5] == 1).all() and (rows[6] == 31).all() and (rows[7, :16] == 120).all()
    assert rows[7, 16:].tolist() == [
        100 * ((i & -i).bit_length()) + i.bit_count() for i in range(16, 32)
    ]
    nearest_even = np.round(lane / 2) / 128  # bfloat16 has 7 bits behind the point here
    assert (rows[8] == (1000 * (1 + nearest_even)).astype(int)).all()
    nearest_even = np.round(lane / 2) / 1024  # half has 10
    assert np.abs(rows[9] - 10000 * (1 + nearest_even)).max() <= 1


@pytest.mark.parametrize("backwards", [False, True])
def test_a_missing_barrier_shows(run, backwards, monkeypatch):
    if backwards:
        monkeypatch.setenv("CUDA_HOST_BACKWARDS", "1")
    turned = np.arange(120).reshape(3, 40)[:, ::-1].ravel()
    assert (run(REVERSE.format(floats=40, guarded=True))["x"] == turned).all()
    assert not (run(REVERSE.format(floats=40, guarded=False))["x"] == turned).all()


def test_dynamic_shared_memory_has_an_end(run):
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        run(REVERSE.format(floats=39, guarded=True))


def test_a_barrier_that_never_completes_is_named(run):
    with pytest.raises(AssertionError, match=r"thread 0: __syncwarp[\s\S]*waits for ever"):
        run("lib.stuck()")


def test_an_empty_grid_is_an_error(run):
    run("assert lib.empty() == 9")
