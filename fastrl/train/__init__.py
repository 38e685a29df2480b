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
    from fastrl.train.report import read_metrics, write_report

LATER = {
    "CheckpointError": "checkpoints",
    "DataError": "data",
    "Interrupted": "interrupts",
    "TrainingError": "loop",
    "read_metrics": "report",
    "resume": "loop",
    "run": "loop",
    "write_report": "report",
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
    "read_metrics",
    "resume",
    "run",
    "shipped_recipes",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """What needs torch, at its first use: a mistake in a recipe is told without those seconds."""
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastrl.train.{LATER[name]}"), name)
