"""What is wrong with a recipe, in words: each bad key, and what it may have been meant to be."""

import difflib
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fastrl.train.stages import ALGORITHMS


class ConfigError(ValueError):
    """A recipe or a setting that cannot be run.

    The message names the key, the value and what would be right.
    """


class DataError(ValueError):
    """A data file or row that cannot be used.

    The message names the file, the line and what would be right.
    """


def _fields_at(model: Any, path: tuple) -> list[str]:
    for key in path:
        if isinstance(key, int):
            continue
        field = getattr(model, "model_fields", {}).get(key)
        candidates = (
            [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        )
        model = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None
        )
    return list(getattr(model, "model_fields", {}))


def _places(model: Any, key: str, prefix: str = "") -> list[str]:
    """Where a recipe has a key of this name; N stands for a position, STAGE for a stage's name."""
    out = []
    for name, field in model.model_fields.items():
        parts = [p for p in (field.annotation, *get_args(field.annotation)) if isinstance(p, type)]
        if name == key:
            out.append(prefix + name)
        if name == "stages":
            parts, name = list(ALGORITHMS.values()), "stages.STAGE"
        elif get_origin(field.annotation) is tuple:
            name += ".N"
        for part in parts:
            if issubclass(part, BaseModel):
                out += _places(part, key, f"{prefix}{name}.")
    return list(dict.fromkeys(out))


def _hint(key: str, names: list[str], root: Any, stage: Any, prefix: tuple) -> str:
    """What an unknown key of a section with other `names` may have been meant to be."""
    places = _places(root, key)
    if stage is not None:  # of the stages this one is meant
        own = _places(stage, key, ".".join([*prefix, ""]))
        places = own + [p for p in places if not p.startswith("stages.")]
    elsewhere = [repr(p) if "." in p else f"{p!r} at the top level" for p in places]
    close = [repr(name) for name in difflib.get_close_matches(key, names, n=1)]
    if elsewhere or close:
        return f"did you mean {' or '.join(elsewhere or close)}?"
    return f"known keys: {', '.join(sorted(names))}"


def messages(error: ValidationError, root: Any, prefix: tuple = (), at: Any = None) -> list[str]:
    """A line for each mistake in a recipe of the class `root`, or in its stage `at` of `prefix`."""
    out = []
    for e in error.errors():
        where = ".".join(map(str, (*prefix, *e["loc"])))
        if isinstance(e.get("ctx", {}).get("error"), ConfigError):
            out.append(str(e["ctx"]["error"]))
        elif e["type"] == "extra_forbidden":
            names = _fields_at(at or root, e["loc"][:-1])
            hint = _hint(str(e["loc"][-1]), names, root, at, prefix)
            out.append(f"unknown key {where!r}; {hint}")
        else:
            given = "" if e["type"] in ("missing", "value_error") else f", got {e['input']!r}"
            text = e["msg"].removeprefix("Value error, ")
            out.append(f"{where}: {text}{given}" if where else text)
    return out
