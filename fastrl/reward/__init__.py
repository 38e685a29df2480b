"""Rewards: verifiers and reward functions."""

from fastrl.reward.functions import (
    RewardError,
    RewardFunction,
    load_reward_function,
    score_completions,
)

__all__ = ["RewardError", "RewardFunction", "load_reward_function", "score_completions"]
