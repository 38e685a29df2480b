"""OpenRLHF: what `fastrl.patch("openrlhf")` replaces."""

import inspect
from functools import partial
from typing import Any

from torch import Tensor

from fastrl.integrations.comparison import compare_tensors
from fastrl.integrations.kernels import entropy_of_logits, need_kernel
from fastrl.integrations.patching import Registration, Replacement
from fastrl.kernels import discounted_returns, gae, logprob_from_logits

UTILS = "openrlhf.models.utils"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker"


def replacements() -> list[Replacement]:
    from openrlhf.models import utils

    return [
        # The original divides the logits by the temperature in place.
        Replacement(
            f"{UTILS}.log_probs_from_logits",
            log_probs_from_logits,
            compare=partial(compare_tensors, copy=True),
        ),
        # As written: compiling it takes longer than the comparison is worth.
        Replacement(
            f"{UTILS}.compute_entropy",
            compute_entropy,
            compare=partial(compare_tensors, original=inspect.unwrap(utils.compute_entropy)),
        ),
        Replacement(f"{MAKER}.get_advantages_and_returns", get_advantages_and_returns),
        Replacement(f"{MAKER}.get_cumulative_returns", get_cumulative_returns),
    ]


def registrations() -> list[Registration]:
    return []


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    need_kernel("logprob_from_logits", logits)
    return logprob_from_logits(logits, labels, temperature=temperature).logprob


def compute_entropy(logits: Tensor) -> Tensor:
    return entropy_of_logits(logits)


def get_advantages_and_returns(
    self: Any,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor | None,
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    need_kernel("gae", values, rewards)
    # Masked tokens count as steps of reward and value 0, so they are zeroed, not left out.
    if action_mask is not None:
        values, rewards = action_mask * values, action_mask * rewards
    return gae(rewards, values, gamma=gamma, lam=lambd)


def get_cumulative_returns(
    self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float
) -> Tensor:
    need_kernel("discounted_returns", rewards)
    if action_mask is not None:
        rewards = action_mask * rewards
    return discounted_returns(rewards, gamma=gamma)
