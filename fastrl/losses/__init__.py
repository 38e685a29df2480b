"""Losses and advantages: pure functions on tensors, each with its formula, shapes and paper."""

from fastrl.losses.advantages import grpo_advantages
from fastrl.losses.imitation import sft_loss
from fastrl.losses.policy import kl_estimate, policy_loss
from fastrl.losses.reduction import REDUCTIONS, token_weights

__all__ = [
    "REDUCTIONS",
    "grpo_advantages",
    "kl_estimate",
    "policy_loss",
    "sft_loss",
    "token_weights",
]
