"""Rewards: verifiers, reward functions and quantized reward models."""

import importlib
from typing import TYPE_CHECKING, Any

from fastrl.reward.functions import (
    RewardError,
    RewardFunction,
    load_reward_function,
    score_completions,
)

if TYPE_CHECKING:
    from fastrl.reward.checkpoint import Checkpoint, RewardModelError
    from fastrl.reward.fidelity import Fidelity, fidelity_report
    from fastrl.reward.model import QuantizedRewardModel

LATER = {
    "Checkpoint": "checkpoint",
    "Fidelity": "fidelity",
    "QuantizedRewardModel": "model",
    "RewardModelError": "checkpoint",
    "fidelity_report": "fidelity",
}

__all__ = [
    "Checkpoint",
    "Fidelity",
    "QuantizedRewardModel",
    "RewardError",
    "RewardFunction",
    "RewardModelError",
    "fidelity_report",
    "load_reward_function",
    "score_completions",
]


def __getattr__(name: str) -> Any:
    """What needs torch, at its first use: a misspelt function is told without those seconds."""
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastrl.reward.{LATER[name]}"), name)
