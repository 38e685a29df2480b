"""Recipes as YAML: read from a file or the package, changed by overrides, written back."""

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fastrl.train.config import Config, ConfigError, parse_config


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("fastrl.recipes")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def load_recipe(recipe: str, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read a recipe (a YAML file or a shipped one's name) and apply `key.path=value` overrides.

    Raises `ConfigError` for a file that is missing or not a mapping, a malformed override and bad
    values.
    """
    path = Path(recipe)
    if path.is_file():
        text = path.read_text()
    elif recipe.removesuffix(".yaml") in shipped_recipes():
        text = (
            resources.files("fastrl.recipes") / f"{recipe.removesuffix('.yaml')}.yaml"
        ).read_text()
    else:
        raise ConfigError(
            f"recipe {recipe!r} is neither a file nor a shipped recipe "
            f"({', '.join(shipped_recipes())})"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe!r} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {recipe!r} must be a mapping of settings")
    for override in overrides:
        _apply(values, override)
    return parse_config(values)


def _apply(values: dict[str, Any], override: str) -> None:
    path, found, text = override.partition("=")
    if not found or not path.strip():
        raise ConfigError(f"--set {override!r} must look like key.path=value")
    *parents, last = path.strip().split(".")
    at: Any = values
    for i, key in enumerate(parents):
        at = (
            at[int(key)]
            if isinstance(at, list) and key.isdigit() and int(key) < len(at)
            else (at.setdefault(key, {}) if isinstance(at, dict) else None)
        )
        if not isinstance(at, dict | list):
            raise ConfigError(
                f"--set {override!r}: {'.'.join(parents[: i + 1])!r} is not a section"
            )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from None
    if isinstance(at, list):
        if not last.isdigit() or int(last) >= len(at):
            raise ConfigError(f"--set {override!r}: {last!r} is not an index below {len(at)}")
        at[int(last)] = value
    else:
        at[last] = value


def dump_config(config: Config) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
