"""What tests compare of two runs."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from fastrl.train.tracking import read_jsonl


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steady(run: Path) -> list[dict]:
    clocks = ("seconds", "rollout_seconds", "tokens_per_second")
    return [
        {k: v for k, v in r.items() if k not in clocks} for r in read_jsonl(run / "metrics.jsonl")
    ]
