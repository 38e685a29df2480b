"""Rewards: verifiers, reward functions and quantized reward models."""

from fastrl.reward.checkpoint import Checkpoint, RewardModelError
from fastrl.reward.functions import (
    RewardError,
    RewardFunction,
    load_reward_function,
    score_completions,
)
from fastrl.reward.model import QuantizedRewardModel

__all__ = [
    "Checkpoint",
    "QuantizedRewardModel",
    "RewardError",
    "RewardFunction",
    "RewardModelError",
    "load_reward_function",
    "score_completions",
]
