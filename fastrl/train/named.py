"""What a recipe names, looked for before torch is imported: a misspelt path is told at once."""

from typing import Any

from fastrl.hub import find_folder
from fastrl.reward.functions import load_reward_function
from fastrl.train.config import Config
from fastrl.train.mistakes import DataError


def check_named(config: Config) -> None:
    """Raise where a data file, a model's directory or a reward function is not there.

    `DataError`, `ValueError`, `fastrl.reward.RewardError`. Names on the hub are not asked for.
    """
    for file in (config.data.train_file, config.data.eval_file):
        if file is not None and not file.is_file():
            raise DataError(f"data file {str(file)!r} does not exist")
    for reward in config.rewards:
        if reward.model is None and reward.function != "reasoning_gym":
            load_reward_function(reward.function)
    stages: list[Any] = list(config.stages.values())
    models = [config.model.path, config.model.tokenizer, *(r.model for r in config.rewards)]
    models += [getattr(stage, "teacher", None) for stage in stages]
    for model in models:
        if model is not None:
            find_folder(model)
