"""Functions of another package replaced by ours: found, checked, and put back."""

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.integrations.comparison import Call, PatchError, compare_tensors

MISSING = object()


class Declined(Exception):
    """Raised by a replacement that cannot answer a call: the original does.

    With a reason there is one warning; without one the call is simply not worth replacing.
    """


@dataclass(frozen=True)
class Replacement:
    """A function of the framework and ours, which has its parameters and defaults.

    `compare` sees the first call of each kind and raises `PatchError`; None for a function that
    computes no numbers. `everywhere` also rebinds what other modules imported by name.
    """

    name: str  # module.function or module.Class.method
    function: Callable[..., Any]
    declared: str | None = None  # whose signature counts, where that of `name` says nothing
    compare: Callable[[Call], None] | None = compare_tensors
    everywhere: bool = True


@dataclass(frozen=True)
class Registration:
    """A function of ours that the framework's `register(key)(function)` adds to its registry."""

    register: str
    registry: str  # the dict that it ends up in
    key: str
    function: Callable[..., Any]

    @property
    def name(self) -> str:
        return f"{self.registry}[{self.key!r}]"


class Replaced(NamedTuple):
    """What a name stood for (None for a name that is new) and what it stands for now."""

    original: Any
    replacement: Any


class Binding(NamedTuple):
    """One place that holds a function: an attribute of a module or class, or an entry of a dict."""

    name: str
    holder: Any
    key: Any
    before: Any
    after: Any

    def read(self) -> Any:
        return _entries(self.holder).get(self.key, MISSING)

    def write(self, value: Any) -> None:
        if isinstance(self.holder, dict):
            if value is MISSING:
                self.holder.pop(self.key, None)
            else:
                self.holder[self.key] = value
        elif value is MISSING:
            delattr(self.holder, self.key)
        else:
            setattr(self.holder, self.key, value)


class Patch:
    """What `fastrl.patch` replaced; `undo()`, or the end of a `with` block, puts it back.

    `replaced` maps each name to what it stood for and what it stands for now.
    """

    def __init__(
        self,
        framework: str,
        replacements: Sequence[Replacement],
        registrations: Sequence[Registration] = (),
        only: Sequence[str] | None = None,
    ):
        """Check everything, then replace everything.

        Raises `PatchError`, with nothing replaced, for a name that moved, a signature that changed,
        a framework that is patched already and an `only` that names nothing.
        """
        self.framework = framework
        self._bindings: list[Binding] = []
        chosen = _chosen(framework, [*replacements, *registrations], only)
        found = [(r, *_find(r)) for r in chosen if isinstance(r, Replacement)]
        added = [(r, *_vacant(r)) for r in chosen if isinstance(r, Registration)]
        try:
            for replacement, holder, key, original in found:
                ours = _guarded(replacement, original)
                before = vars(holder).get(key, MISSING)
                self._write(Binding(replacement.name, holder, key, before, ours))
                if replacement.everywhere:
                    for name, place, at in _holding(framework, original):
                        self._write(Binding(name, place, at, original, ours))
            for registration, register, registry in added:
                register(registration.key)(registration.function)
                self._bindings.append(
                    Binding(
                        *(registration.name, registry, registration.key),
                        *(MISSING, registry[registration.key]),
                    )
                )
        except BaseException:
            self.undo()
            raise
        originals = {r.name: original for r, _, _, original in found}
        self.replaced = {
            b.name: Replaced(
                originals.get(b.name, None if b.before is MISSING else b.before), b.after
            )
            for b in self._bindings
        }

    def _write(self, binding: Binding) -> None:
        binding.write(binding.after)
        self._bindings.append(binding)

    def undo(self) -> None:
        """Put back what was there, also where our functions were imported since; idempotent.

        Raises `PatchError`, with nothing changed, where somebody replaced ours by something else.
        """
        for b in self._bindings:
            if b.read() is not b.after:
                raise PatchError(
                    f"{b.name} was replaced by something else after fastrl.patch"
                    f"({self.framework!r}); undo that first"
                )
        for b in reversed(self._bindings):
            b.write(b.before)
        for b in self._bindings:
            if b.before is not MISSING:
                for name, place, at in list(_holding(self.framework, b.after)):
                    Binding(name, place, at, b.after, b.before).write(b.before)
        self._bindings = []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "" if self._bindings else ", undone"
        return f"Patch({self.framework!r}, {len(self.replaced)} names{state})"


def _chosen(framework: str, known: list, only: Sequence[str] | None) -> list:
    """The entries that `only` names, in full or by the last part of the name."""
    if only is None:
        return known
    if isinstance(only, str):
        raise ValueError(f"only must be a list of names, got the string {only!r}")
    short = {n for r in known for n in (r.name, r.name.rsplit(".", 1)[-1])}
    unknown = [n for n in only if n not in short]
    if unknown or not only:
        raise PatchError(
            f"nothing to replace in {framework} is called {', '.join(unknown) or 'nothing'}; "
            f"there is {', '.join(r.name for r in known)}"
        )
    return [r for r in known if r.name in only or r.name.rsplit(".", 1)[-1] in only]


def _resolve(name: str) -> tuple[Any, str, Any]:
    """The holder of a dotted name, its last part, and what it stands for."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:n])
        try:
            value: Any = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is not None and (path + ".").startswith(error.name + "."):
                continue
            raise  # the module is there, but something that it needs is not
        for part in parts[n:]:
            holder, value = value, getattr(value, part, MISSING)
            if value is MISSING:
                break
        else:
            return holder, parts[-1], value
        break
    package = parts[0]
    version = getattr(sys.modules.get(package), "__version__", "of unknown version")
    raise PatchError(
        f"{name} is not in {package} {version}: it moved or was renamed, and fastrl does not know "
        "where to; nothing was replaced"
    )


def _find(replacement: Replacement) -> tuple[Any, str, Any]:
    holder, key, original = _resolve(replacement.name)
    if hasattr(original, "replaced_by_fastrl"):
        raise PatchError(
            f"{replacement.name} is fastrl's already; call undo() of that patch before the next"
        )
    declared = original if replacement.declared is None else _resolve(replacement.declared)[2]
    theirs, ours = _shape(declared), _shape(replacement.function)
    if replacement.declared is not None and theirs[:1] and theirs[0][0] == "ctx":
        theirs = theirs[1:]
    if theirs != ours:
        raise PatchError(
            f"{replacement.name} has other parameters than fastrl knows: "
            f"{inspect.signature(declared)}, not {inspect.signature(replacement.function)}; "
            "nothing was replaced"
        )
    return holder, key, original


def _vacant(registration: Registration) -> tuple[Callable[..., Any], dict]:
    register, registry = _resolve(registration.register)[2], _resolve(registration.registry)[2]
    if registration.key in registry:
        raise PatchError(f"{registration.name} is taken; call undo() of the patch that added it")
    return register, registry


def _shape(function: Callable[..., Any]) -> list[tuple]:
    """Names, kinds and defaults of the parameters."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters]


def _entries(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else vars(holder)


def _holding(package: str, function: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where loaded modules of the package hold this very object, also one dict deep."""
    for path, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or not (path + ".").startswith(package + "."):
            continue
        for key, value in list(vars(module).items()):
            if value is function:
                yield f"{path}.{key}", module, key
            elif type(value) is dict:
                for entry, inner in list(value.items()):
                    if inner is function:
                        yield f"{path}.{key}[{entry!r}]", value, entry


def _guarded(replacement: Replacement, original: Callable[..., Any]) -> Callable[..., Any]:
    """Ours, compared with the original on the first call of each kind and then left alone."""
    signature = inspect.signature(replacement.function)
    compared: set[tuple] = set()
    reasons: set[str] = set()

    def decline(why: Declined) -> None:
        reason = str(why)
        if reason and reason not in reasons:
            reasons.add(reason)
            warnings.warn(
                f"{replacement.name} runs as without fastrl: {reason}", RuntimeWarning, stacklevel=4
            )

    @functools.wraps(replacement.function)
    def ours(*args: Any, **kwargs: Any) -> Any:
        try:
            if replacement.compare is not None and not torch.compiler.is_compiling():
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                kind = _kind(bound.arguments)
                if kind not in compared:
                    replacement.compare(
                        Call(replacement.name, original, replacement.function, bound)
                    )
                    compared.add(kind)
            return replacement.function(*args, **kwargs)
        except Declined as why:
            decline(why)
        return original(*args, **kwargs)

    vars(ours)["replaced_by_fastrl"] = replacement.name
    return ours


def _kind(arguments: dict[str, Any]) -> tuple:
    """What makes a call another kind of call: dtypes, gradients, options; not sizes or numbers."""
    return (torch.is_grad_enabled(), *map(_kind_of, arguments.values()))


def _kind_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.requires_grad, value.dim(), value.device.type
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, tuple) and all(isinstance(v, str) for v in value):
        return value
    return type(value)
