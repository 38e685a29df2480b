"""The algorithms: each is a function that yields the updates of one step, read top to bottom."""

from collections.abc import Callable, Iterator

from fastrl.train import stages
from fastrl.train.algorithms.adversarial import adversarial, afd
from fastrl.train.algorithms.context import Context, stream_seed
from fastrl.train.algorithms.demonstrations import demonstration_loss, sft
from fastrl.train.algorithms.policy import grpo
from fastrl.train.algorithms.ppo import ppo
from fastrl.train.algorithms.preference import preference, spin
from fastrl.train.algorithms.ranking import ranking_loss, rankings, reward
from fastrl.train.algorithms.samples import distillation, raft
from fastrl.train.stages import Stage
from fastrl.train.update import Update

STEPS: dict[type[Stage], Callable[[Context, int], Iterator[Update]]] = {
    stages.SFT: sft,
    stages.IQLearn: sft,
    stages.Reward: reward,
    stages.AfD: afd,
    stages.GRPO: grpo,
    stages.PPO: ppo,
    stages.Adversarial: adversarial,
    stages.Preference: preference,
    stages.SPIN: spin,
    stages.Distillation: distillation,
    stages.RAFT: raft,
}

__all__ = [
    "STEPS",
    "Context",
    "demonstration_loss",
    "ranking_loss",
    "rankings",
    "stream_seed",
]
