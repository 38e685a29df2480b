"""The thin trainer: recipes, one loop, checkpoints and tracking."""

import importlib
from typing import TYPE_CHECKING, Any

from fastrl.train.config import Config, ConfigError, parse_config
from fastrl.train.recipe import load_recipe, shipped_recipes

if TYPE_CHECKING:
    from fastrl.train.checkpoints import CheckpointError
    from fastrl.train.data import DataError
    from fastrl.train.interrupts import Interrupted
    from fastrl.train.loop import TrainingError, resume, run

LATER = {
    "CheckpointError": "checkpoints",
    "DataError": "data",
    "Interrupted": "interrupts",
    "TrainingError": "loop",
    "resume": "loop",
    "run": "loop",
}

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "Interrupted",
    "TrainingError",
    "load_recipe",
    "parse_config",
    "resume",
    "run",
    "shipped_recipes",
]


def __getattr__(name: str) -> Any:
    """What needs torch, at its first use: a mistake in a recipe is told without those seconds."""
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastrl.train.{LATER[name]}"), name)
