"""Reward functions with TRL's signature, found by import path and checked at every call."""

import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

RewardFunction = Callable[..., list[float]]


class RewardError(ValueError):
    """A reward function that is not there, or did not return one number per completion."""


def load_reward_function(path: str) -> RewardFunction:
    """The function at `module:function`; modules are also looked for in the working directory.

    Raises `RewardError` for a malformed path, a module that does not import, a missing or
    uncallable name.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise RewardError(f"reward function {path!r} must look like module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module does wrong while it is imported
        where = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            where = f"; it was looked for in the working directory {here} and on Python's path"
        raise RewardError(
            f"reward function {path!r}: cannot import {module_name!r}: {error}{where}"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if callable(value)]
        close = difflib.get_close_matches(name, known)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise RewardError(
            f"reward function {path!r}: {module_name!r} has no function {name!r}{hint}"
        )
    return function


def score_completions(
    function: RewardFunction,
    name: str,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: dict[str, list[Any]],
) -> list[float]:
    """Call `function(prompts=, completions=, **columns)` and check what it returns.

    Only the columns that the function names are passed, or all where it takes `**kwargs`. Raises
    `RewardError` where it raises, or returns anything but one finite number per completion.
    """
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        columns = {k: v for k, v in columns.items() if k in parameters}
    clash = {"prompts", "completions"} & columns.keys()
    if clash:
        raise RewardError(f"the data has a column named {clash.pop()!r}, which names an argument")
    try:
        scores = function(prompts=list(prompts), completions=list(completions), **columns)
    except Exception as error:  # whatever a user's function does wrong
        raise RewardError(
            f"reward function {name!r} raised {type(error).__name__}: {error} (given columns: "
            f"{', '.join(sorted(columns)) or 'none'}; the first of {len(completions)} completions: "
            f"{completions[0]!r:.100})"
        ) from error
    scores = scores.tolist() if hasattr(scores, "tolist") else scores
    if (
        not isinstance(scores, Sequence)
        or isinstance(scores, str)
        or len(scores) != len(completions)
    ):
        got = (
            f"{len(scores)} values" if hasattr(scores, "__len__") else f"a {type(scores).__name__}"
        )
        raise RewardError(
            f"reward function {name!r} must return a list of {len(completions)} numbers, "
            f"one for each completion; it returned {got}"
        )
    for i, score in enumerate(scores):
        if not isinstance(score, Real) or not math.isfinite(score):
            raise RewardError(
                f"reward function {name!r} must return finite numbers; for completion {i} it "
                f"returned {score!r}"
            )
    return [float(s) for s in scores]
