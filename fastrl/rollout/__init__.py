"""Generation: prompts in, groups of completions with their log-probs out."""

from fastrl.rollout.engine import RolloutEngine
from fastrl.rollout.sampling import GroupLayout, Rollouts, SamplingParams

__all__ = ["GroupLayout", "RolloutEngine", "Rollouts", "SamplingParams"]
