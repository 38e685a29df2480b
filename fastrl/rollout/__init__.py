"""Generation: prompts in, groups of completions with their log-probs out."""

from fastrl.rollout.cache import Branch
from fastrl.rollout.engine import RolloutEngine
from fastrl.rollout.sampling import Group, GroupLayout, Rollouts, SamplingParams

__all__ = ["Branch", "Group", "GroupLayout", "RolloutEngine", "Rollouts", "SamplingParams"]
