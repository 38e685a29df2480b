"""Whom the ops are raced against, where each comes from, and what is installed."""

import importlib.metadata
import importlib.util
import shutil
from dataclasses import dataclass

import torch

from fastrl.kernels import native


@dataclass(frozen=True)
class Peer:
    """``package`` is what to import (a program where it has no module), ``get`` what brings it."""

    about: str
    package: str = "torch"
    get: str = ""
    program: bool = False


PEERS = {
    "eager": Peer("plain PyTorch"),
    "torch": Peer("PyTorch's own fused op"),
    "compile": Peer("torch.compile of plain PyTorch"),
    "trl": Peer("TRL", "trl", "pip install 'fastrl[trl]'"),
    "cce": Peer("cut-cross-entropy", "cut_cross_entropy", "pip install 'fastrl[bench]'"),
    "liger": Peer("Liger-Kernel, GPU only", "liger_kernel", "pip install liger-kernel"),
    "torchao": Peer("torchao", "torchao", "pip install torchao"),
    "bitsandbytes": Peer("bitsandbytes", "bitsandbytes", "pip install 'fastrl[bnb]'"),
    "hf": Peer("Hugging Face transformers", "transformers", "pip install transformers"),
    "openvino": Peer("OpenVINO", "openvino", "pip install openvino"),
    "llamacpp": Peer(
        "llama.cpp", "llama-batched-bench", "build github.com/ggml-org/llama.cpp", program=True
    ),
}


def missing(peer: str, device: torch.device) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer == "fastrl":
        return native.why_missing or None if device.type == "cpu" else None
    it = PEERS[peer]
    if it.program:
        return None if shutil.which(it.package) else f"{it.package} is not on PATH: {it.get}"
    if importlib.util.find_spec(it.package) is None:
        return f"not installed: {it.get}"
    if peer == "compile" and device.type == "cpu" and not shutil.which("g++"):
        return "torch.compile needs a C++ compiler: apt-get install g++"
    return None


def parse(against: str) -> list[str]:
    """The peers of a list with commas; ValueError for an unknown one."""
    names = [name.strip() for name in against.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--against {name!r} is unknown; choose from {', '.join(PEERS)}")
    return names


def versions() -> dict[str, str]:
    """Of fastrl and of the packages of all peers that are installed."""
    packages = ["fastrl", "triton", *dict.fromkeys(it.package for it in PEERS.values())]
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
