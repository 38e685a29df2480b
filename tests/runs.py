"""What tests compare of two runs, and a run that was stopped on its way."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrl import train
from fastrl.train import loop
from fastrl.train.tracking import read_jsonl


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def finals(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of all models that a run ended with."""
    return {
        f"{path.name} {name}": tensor
        for path in run.glob("final*")
        for name, tensor in load_file(path / "model.safetensors").items()
    }


def stop_and_resume(config, folder: Path, stop_at: int, monkeypatch) -> None:
    """A run that Ctrl-C ends at a step, and that then goes on."""
    step = loop._step

    def stopping(work, progress, *rest):
        if progress.step == stop_at:
            raise KeyboardInterrupt
        return step(work, progress, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, folder)
    train.resume(folder)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steady(run: Path) -> list[dict]:
    clocks = ("seconds", "rollout_seconds", "tokens_per_second")
    return [
        {k: v for k, v in r.items() if k not in clocks} for r in read_jsonl(run / "metrics.jsonl")
    ]
