"""The thin trainer: recipes, one loop, checkpoints and tracking."""

from fastrl.train.checkpoints import CheckpointError
from fastrl.train.config import Config, ConfigError, parse_config
from fastrl.train.data import DataError
from fastrl.train.loop import TrainingError, resume, run
from fastrl.train.recipe import load_recipe, shipped_recipes
from fastrl.train.report import read_metrics, write_report

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "TrainingError",
    "load_recipe",
    "parse_config",
    "read_metrics",
    "resume",
    "run",
    "shipped_recipes",
    "write_report",
]
