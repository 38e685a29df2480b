"""Whom the ops are raced against, where each comes from, and what is installed."""

import importlib.metadata
import importlib.util
import shutil
from dataclasses import dataclass

import torch

from fastrl import installation
from fastrl.kernels import native


@dataclass(frozen=True)
class Peer:
    """``package`` is what to import, ``name`` what it is installed by where that is another.

    ``besides``: packages that it is raced with.
    """

    about: str
    package: str = "torch"
    name: str = ""
    besides: tuple[str, ...] = ()


PEERS = {
    "eager": Peer("plain PyTorch"),
    "torch": Peer("PyTorch's own fused op"),
    "compile": Peer("torch.compile of plain PyTorch"),
    "trl": Peer("TRL", "trl"),
    "cce": Peer("cut-cross-entropy", "cut_cross_entropy"),
    "liger": Peer("Liger-Kernel, GPU only", "liger_kernel"),
    "torchao": Peer("torchao", "torchao"),
    "bitsandbytes": Peer("bitsandbytes", "bitsandbytes"),
    "hf": Peer("Hugging Face transformers", "transformers"),
    "openvino": Peer("OpenVINO GenAI", "openvino_genai"),
    "llamacpp": Peer("llama.cpp", "llama_cpp", "llama-cpp-python", besides=("gguf",)),
}


def missing(peer: str, device: torch.device) -> str | None:
    """Why a peer cannot run here, or None."""
    if peer == "fastrl":
        return native.why_missing or None if device.type == "cpu" else None
    it = PEERS[peer]
    for package, name in {it.package: it.name, **dict.fromkeys(it.besides, "")}.items():
        if importlib.util.find_spec(package) is None:
            return f"not installed: {installation.get(name or package)}"
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
    packages = ["fastrl", "triton", *dict.fromkeys(it.name or it.package for it in PEERS.values())]
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
