"""Generation: prompts in, groups of completions with their log-probs out."""

from fastrl.rollout.cache import Branch
from fastrl.rollout.engine import RolloutEngine
from fastrl.rollout.sampling import (
    Engine,
    Group,
    GroupStop,
    Rollouts,
    SamplingParams,
    join_rollouts,
)
from fastrl.rollout.vllm import ServerError, VllmEngine

__all__ = [
    "Branch",
    "Engine",
    "Group",
    "GroupStop",
    "RolloutEngine",
    "Rollouts",
    "SamplingParams",
    "ServerError",
    "VllmEngine",
    "join_rollouts",
]
