"""Recipes as YAML: read from a file or the package, changed by overrides, written back."""

import difflib
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

    A recipe may begin with `extends: OTHER`, a file or a shipped recipe's name: what it does not
    say is said there. Its `stages` are those that it names, in its order; the stage of the same
    name in the other recipe, or the one that a stage's own `extends` names, gives the settings that
    it leaves out. Raises `ConfigError` for a file that
    is missing or not a mapping, recipes that extend each other, a malformed override and bad
    values.
    """
    values = _read(recipe, ())
    for override in overrides:
        _apply(values, override)
    return parse_config(values)


def _read(recipe: str, extending: tuple[str, ...], folder: Path | None = None) -> dict[str, Any]:
    path = Path(recipe) if folder is None else folder / recipe
    shipped = recipe.removesuffix(".yaml")
    if path.is_file():
        text, here, name = path.read_text(), path.parent, str(path.resolve())
    elif shipped in shipped_recipes():
        source = resources.files("fastrl.recipes") / f"{shipped}.yaml"
        text, here, name = source.read_text(), None, shipped
    else:
        close = difflib.get_close_matches(shipped, shipped_recipes())
        hint = f"one of {', '.join(shipped_recipes())}"
        if close:
            hint = f"did you mean {' or '.join(map(repr, close))}?"
        raise ConfigError(f"recipe {recipe!r} is neither a file nor a shipped recipe; {hint}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe!r} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {recipe!r} must be a mapping of settings")
    other = values.pop("extends", None)
    if other is None:
        return values
    if not isinstance(other, str) or name in extending:
        raise ConfigError(f"recipe {recipe!r} extends {other!r}: no recipe, or itself in the end")
    base = _read(other, (*extending, name), here)
    merged = _merge(base, values)
    if isinstance(values.get("stages"), dict):
        known = base.get("stages", {})
        merged["stages"] = {k: _stage(known, k, v or {}) for k, v in values["stages"].items()}
    return merged


def _stage(known: dict[str, Any], name: str, values: dict[str, Any]) -> dict[str, Any]:
    other = values.get("extends", name)
    if other not in known and "extends" in values:
        raise ConfigError(f"stages.{name} extends {other!r}, which is not one of {list(known)}")
    return {k: v for k, v in _merge(known.get(other, {}), values).items() if k != "extends"}


def _merge(base: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Values over base, section by section."""
    both = dict(base)
    for key, value in values.items():
        old = base.get(key)
        both[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return both


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
