"""Rewards: verifiers, reward functions and quantized reward models."""

from fastrl.reward.checkpoint import Checkpoint, RewardModelError
from fastrl.reward.fidelity import Fidelity, fidelity_report
from fastrl.reward.functions import (
    RewardError,
    RewardFunction,
    load_reward_function,
    score_completions,
)
from fastrl.reward.model import QuantizedRewardModel

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
