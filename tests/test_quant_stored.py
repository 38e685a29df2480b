"""Quantized weights as they are stored: state dicts, sizes, bitsandbytes' format."""

import functools

import pytest
import torch
from test_quant import DTYPES, IMPLS, SCHEMES, draw, every_impl, make

from fastrl.kernels import QuantizedWeight, dequantize, quantize, weight_from_bitsandbytes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict(scheme, tmp_path):
    from safetensors.torch import load_file, save_file

    qweight = make(draw(1, 33, 70)[1], scheme)
    save_file(qweight.state_dict("layer."), tmp_path / "w.safetensors")
    loaded = QuantizedWeight.from_state_dict(load_file(tmp_path / "w.safetensors"), "layer.")
    assert loaded.shape == (33, 70) and loaded.compute == qweight.compute
    assert torch.equal(dequantize(loaded), dequantize(qweight))
    assert loaded.to("cpu").nbytes == qweight.nbytes
    state = qweight.state_dict()
    with pytest.raises(ValueError, match="state dict has no 'data'"):
        QuantizedWeight.from_state_dict({n: t for n, t in state.items() if n != "data"})
    with pytest.raises(ValueError, match=r"scale must be torch.float32 \(33,\)"):
        QuantizedWeight.from_state_dict({**state, "scale": state["scale"][:-1]})
    with pytest.raises(ValueError, match="scale holds NaN"):
        QuantizedWeight.from_state_dict({**state, "scale": state["scale"] * float("nan")})


def test_bytes():
    weight = torch.zeros(128, 1024)
    count = weight.numel()
    assert quantize(weight).nbytes == count + 4 * 128
    assert quantize(weight, "fp8").nbytes == count + 4 * 128
    assert quantize(weight, "nf4").nbytes == count // 2 + 4 * count // 64 + 4 * 128 + 64
    nested = count // 2 + count // 64 + 4 * count // 64 // 256 + 4 * 128 + 64 + 1024 + 4
    assert quantize(weight, "nf4", nested=True).nbytes == nested


def blob(rows=64, columns=128, nested=True, dtype=torch.bfloat16):
    """What bitsandbytes saves of a Linear4bit without bias, its state beside it."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = draw(1, rows, columns, dtype)[1]
    data, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    tensors = {"up.weight." + n: t for n, t in state.as_dict(packed=True).items()}
    want = functools.partial(bnb.dequantize_4bit, data, state)
    return weight, {"up.weight": data, **tensors}, state, want


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (33, 192), (17, 70), (5, 7), (300, 1024)], ids=str)
def test_nf4_has_the_bits_of_bitsandbytes(shape, nested):
    for dtype in DTYPES:
        weight, tensors, state, unpack = blob(*shape, nested, dtype)
        qweight = weight_from_bitsandbytes(tensors, "up.weight")
        for out in DTYPES:
            state.dtype = out
            for impl in IMPLS:
                assert torch.equal(dequantize(qweight, out, impl=impl), unpack()), (dtype, out)
        ours = quantize(weight, "nf4", nested=nested)
        assert torch.equal(ours.data, qweight.data)
        if not nested:
            assert torch.equal(ours.absmax, qweight.absmax)
        elif ours.absmax.numel() > 1:  # a tie between two of the 256 values may fall either way
            assert (ours.absmax.int() - qweight.absmax.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("up.weight", lambda t: t[:-1], r"data must be torch.uint8 \(4096,\)"),
        ("up.weight", None, "no 'up.weight'"),
        ("up.weight.absmax", lambda t: t[1:], r"absmax must be torch.uint8 \(128,\)"),
        ("up.weight.absmax", None, "no 'up.weight.absmax'"),
        ("up.weight.quant_map", lambda t: t.flip(0), "must be the 16 values of NF4"),
        ("up.weight.quant_map", lambda t: t[:8], "must be the 16 values of NF4"),
        ("up.weight.nested_absmax", lambda t: t * float("nan"), "nested_absmax holds NaN"),
        ("up.weight.nested_quant_map", lambda t: t[:16], r"nested_code must be .*\(256,\)"),
        ("up.weight.quant_state.bitsandbytes__nf4", None, "no .*bitsandbytes__nf4"),
        ("up.weight.quant_state.bitsandbytes__nf4", lambda t: t[1:], "must be JSON"),
    ],
)
def test_wrong_blobs_are_named(name, change, says):
    _, tensors, _, _ = blob()
    tensors = {n: t for n, t in tensors.items() if n != name} | (
        {} if change is None else {name: change(tensors[name])}
    )
    with pytest.raises(ValueError, match=says):
        weight_from_bitsandbytes(tensors, "up.weight")


def test_fp4_blob_is_refused():
    tensors = {"w": torch.zeros(8, 1).byte(), "w.quant_state.bitsandbytes__fp4": torch.zeros(1)}
    with pytest.raises(ValueError, match="it is fp4, and only nf4 is read"):
        weight_from_bitsandbytes(tensors, "w")


@every_impl
def test_llm_int8_blob(impl):
    data = torch.tensor([[127, -3, 0], [5, -127, 1]], dtype=torch.int8)
    tensors = {"a.weight": data, "a.SCB": torch.tensor([1.27, 254.0])}
    qweight = weight_from_bitsandbytes(tensors, "a.weight")
    want = torch.tensor([[1.27, -0.03, 0.0], [10.0, -254.0, 2.0]])
    torch.testing.assert_close(dequantize(qweight, impl=impl), want)
    for scb in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=r"a.SCB must be \[2\]"):
            weight_from_bitsandbytes({**tensors, "a.SCB": scb}, "a.weight")
