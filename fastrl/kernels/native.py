"""Which implementation of an op can run here, and the little that all of them share.

The one place that imports the compiled module ``fastrl._C``. With ``FASTRL_NATIVE=off`` in the
environment it is not loaded even where it was built; with ``on`` its absence is an error at import.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastrl import installation

IMPLS = ("auto", "reference", "cpu", "triton", "cuda", "flash")

# What "auto" tries on a device, fastest first. Elsewhere there is only the reference.
FAST = {"cpu": ("cpu", "flash"), "cuda": ("cuda", "triton", "flash")}

FLASH_ATTN = ("2.7", "2.8")  # whose functions we know


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and why it is missing."""
    wanted = os.environ.get("FASTRL_NATIVE", "auto")
    if wanted not in ("auto", "on", "off"):
        raise ValueError(f"FASTRL_NATIVE={wanted!r} is not one of auto, on, off")
    if wanted == "off":
        return None, "FASTRL_NATIVE=off in the environment"
    try:
        _C = importlib.import_module("fastrl._C")
    except ImportError as error:
        missing = importlib.util.find_spec("fastrl._C") is None
        without = "install g++, then" if shutil.which("c++") is None else "now that there is one,"
        why = (
            "fastrl was installed without its compiled module (no C++ compiler at that time, or "
            f"FASTRL_NATIVE=off); {without} {installation.rebuild()}"
            if missing
            else f"the compiled module does not load: {error}"
        )
        if wanted == "on":
            raise ImportError(f"FASTRL_NATIVE=on, but {why}") from error
        return None, why
    _C.isa()  # a FASTRL_ISA that cannot run here raises now, not in the middle of a run
    return _C, ""


_module, why_missing = _load()
_HAS_CUDA = _module is not None and _module.build_info()["cuda"]
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def module() -> ModuleType:
    """``fastrl._C``; RuntimeError with the reason where it is missing."""
    if _module is None:
        raise RuntimeError(f"the compiled kernels are missing: {why_missing}")
    return _module


def unavailable(impl: str, device: torch.device) -> str | None:
    """Why ``impl`` cannot run on tensors of ``device``, or None if it can."""
    if impl == "reference":
        return None
    if impl == "triton":
        if not _HAS_TRITON:
            return f"triton is not installed; {installation.get('triton')}"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the tensors are on {device}; Triton needs them on a GPU"
        return None
    if impl == "flash":
        return None if device.type == "cpu" else _no_flash(device)
    if device.type != impl:
        return f"the tensors are on {device}"
    if _module is None:
        return why_missing
    if impl == "cuda" and not _HAS_CUDA:
        return "fastrl was built without CUDA; put nvcc on PATH and reinstall with FASTRL_CUDA=on"
    return None


@cache
def flash_attn_version() -> str | None:
    """Of the flash-attn package; None where it is not installed."""
    try:
        return importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return None


def _no_flash(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device}"
    version = flash_attn_version()
    if version is None and not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without flash attention, and flash-attn is not installed"
    if version is not None and ".".join(version.split(".")[:2]) not in FLASH_ATTN:
        return (
            f"flash-attn {version} is installed, and its functions are known for "
            f"{' and '.join(FLASH_ATTN)} alone; install one of those or none"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"flash attention needs a GPU of sm_80 or later, got sm_{major}{minor}"
    return None


def choose(
    op: str,
    impl: str,
    device: torch.device,
    has: tuple[str, ...],
    prefer: tuple[str, ...] = (),
) -> str:
    """The implementation that ``op`` runs: ``impl`` itself, or for "auto" the fastest there is.

    ``has`` names the implementations this op has besides the reference; ``prefer`` those to try
    before the usual ones of the device. Raises ValueError for an
    ``impl`` that is unknown or, with the reason, cannot run here. "auto" warns once where it falls
    back to the reference although the op has something faster for that device.
    """
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl={impl!r} is unknown; use one of {', '.join(IMPLS)}")
    if impl == "auto":
        fast = [i for i in (*prefer, *FAST.get(device.type, ())) if i in has]
        for candidate in fast:
            if unavailable(candidate, device) is None:
                return candidate
        if fast:
            reason = unavailable(fast[0], device)
            _warn_once(f"{op} runs on the slow reference implementation: {reason}")
        return "reference"
    have = impl == "reference" or impl in has
    reason = unavailable(impl, device) if have else f"{op} has no such implementation"
    if reason is not None:
        usable = [i for i in ("reference", *has) if unavailable(i, device) is None]
        raise ValueError(
            f"{op}: impl={impl!r} is unavailable: {reason}; available: {', '.join(usable)}"
        )
    return impl


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions that multiply bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _module is not None and bool({"avx512_bf16", "amx"} & set(_module.cpu_isas()))


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@cache
def float_kind(dtype: torch.dtype):
    """The same as ``fastrl._C.Float``."""
    return getattr(module().Float, str(dtype).removeprefix("torch."))


def threads() -> int:
    """How many threads a CPU kernel may use."""
    return torch.get_num_threads()


def stream(device: torch.device) -> int:
    """torch's current stream on ``device``, for a CUDA launcher."""
    return torch.cuda.current_stream(device).cuda_stream


def check(op: str, code: int) -> None:
    """RuntimeError with CUDA's own words when a launcher returned an error code."""
    if code:
        raise RuntimeError(f"{op}: CUDA error {code}: {module().cuda_error(code)}")
