"""Writes into the pages the tables of what the code already holds: `make tables`.

Below a line `<!-- table: NAME ARGUMENTS -->` of a page stands the table that the function of that
name returns; a test fails where it is another one.
"""

import re
import types
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fastrl import bench
from fastrl.kernels import IMPLEMENTATIONS
from fastrl.train import config, shipped_recipes, stages
from fastrl.train.metrics import METRICS

PLACE = re.compile(r"^(<!-- table: (\w+) ?(.*?) -->)\n(?:\n\|.*(?:\n\|.*)*\n)?", re.MULTILINE)


def filled(page: str) -> str:
    """A page's text with its tables as they are now."""
    tables = {
        f.__name__: f for f in (settings, algorithms, recipes, metrics, implementations, races)
    }

    def place(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{tables[match[2]](*match[3].split())}\n"

    return PLACE.sub(place, page)


def _table(*rows: tuple[str, ...]) -> str:
    """The first row is the heading."""
    cells = [[c.replace("|", "\\|").replace("\n", " ") for c in row] for row in rows]
    cells.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _code(value: Any) -> str:
    shown = {None: "null", True: "true", False: "false"}
    if isinstance(value, (bool, type(None))):
        return f"`{shown[value]}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _values(annotation: Any) -> str:
    """What a field may be, in words."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{v}`" for v in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list of " + _values(get_args(annotation)[0])
    if get_origin(annotation) is dict:
        return "mapping"
    if isinstance(annotation, types.UnionType) or str(annotation).startswith("typing.Optional"):
        return ", ".join("`null`" if a is type(None) else _values(a) for a in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return _values(get_args(annotation)[0])
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _own(model: type[BaseModel]) -> list[str]:
    """Fields that the class has and its bases do not, or has another default for."""
    bases = [b.model_fields for b in model.__mro__[1:] if hasattr(b, "model_fields")]
    return [
        name
        for name, field in model.model_fields.items()
        if all(name not in b or b[name].default != field.default for b in bases[:1])
        and name != "algorithm"
    ]


def _default(field: Any) -> str:
    if field.default_factory is not None:
        return "" if issubclass(getattr(field, "annotation", str), BaseModel) else "none"
    return "required" if field.default is PydanticUndefined else _code(field.default)


def settings(name: str) -> str:
    """The keys of `stages.NAME` or `config.NAME`: those that it adds to its base, or changes."""
    module, _, section = name.partition(".")
    model = getattr({"stages": stages, "config": config}[module], section)
    rows = [
        (f"`{key}`", _values(field.annotation), _default(field), field.description or "")
        for key in _own(model)
        for field in [model.model_fields[key]]
    ]
    return _table(("key", "values", "default", ""), *rows)


def algorithms(*names: str) -> str:
    """What each algorithm's name sets, all other settings being those of its family."""
    rows = []
    for name in names:
        family = stages.ALGORITHMS[name]
        sets = [f"`{k}: {v}`" for k, v in stages.PRESETS.get(name, {}).items()]
        rows.append((f"`{name}`", _first_line(name), f"`{family.__name__}`", ", ".join(sets)))
    return _table(("algorithm", "recipe", "family", "sets"), *rows)


def _first_line(recipe: str) -> str:
    """The sentence that a shipped recipe begins with, papers as links."""
    if recipe not in shipped_recipes():
        return ""
    text = (resources.files("fastrl.recipes") / f"{recipe}.yaml").read_text()
    line = text.splitlines()[0].removeprefix("#").strip()
    line = line if line.endswith(".") else line[: line.rindex(". ") + 1]
    return re.sub(r"\b(\d{4}\.\d{4,5})\b", r"[\1](https://arxiv.org/abs/\1)", line)


def recipes() -> str:
    """All shipped recipes: what they extend, their stages, their first line."""
    rows = []
    for name in shipped_recipes():
        text = (resources.files("fastrl.recipes") / f"{name}.yaml").read_text()
        values = yaml.safe_load(text)
        extends = values.get("extends")
        rows.append(
            (
                f"`{name}`",
                _first_line(name),
                ", ".join(f"`{s}`" for s in values["stages"]),
                f"`{extends}`" if extends else "",
            )
        )
    return _table(("recipe", "", "stages", "extends"), *rows)


def metrics() -> str:
    """What a run logs, and how to read it."""
    rows = [(f"`{name}`", m.what, m.unit, m.of, m.healthy) for name, m in METRICS.items()]
    return _table(("metric", "", "unit", "logged by", "healthy"), *rows)


def implementations() -> str:
    """Which implementations each op has besides the reference."""
    kinds = ("cpu", "triton", "cuda")
    rows = [
        (f"`{op}`", *("yes" if kind in has else "" for kind in kinds))
        for op, has in IMPLEMENTATIONS.items()
    ]
    return _table(("op", *kinds), *rows)


def races() -> str:
    """What `fastrl bench` races."""
    rows = [(f"`{op}`", bench.load(op).about) for op in bench.OPS]
    return _table(("op", "what is timed"), *rows)


if __name__ == "__main__":
    for path in Path(__file__).parent.rglob("*.md"):
        path.write_text(filled(path.read_text()))
