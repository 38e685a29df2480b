"""The operators of all families in torch: `torch.ops.fastrl.<name>`."""

import importlib
from collections.abc import Callable, Mapping
from functools import cache

import torch

_library = torch.library.Library("fastrl", "FRAGMENT")


def define(
    name: str,
    schema: str,
    run: Callable[..., object],
    fake: Callable[..., object],
    *,
    on: tuple[str, ...] = ("CPU", "CUDA"),
    tags: tuple[torch.Tag, ...] = (),
) -> None:
    """An operator that ``run`` computes on tensors of the devices ``on``.

    ``schema`` is what follows its name, "(Tensor x) -> Tensor"; ``fake`` gives empty results.
    """
    _library.define(name + schema, tags=tags)
    for key in on:
        _library.impl(name, run, key)
    torch.library.register_fake(f"fastrl::{name}", fake, lib=_library)


def differentiate(name: str, backward: Callable[..., object], setup: Callable[..., object]) -> None:
    """Gives an operator a gradient; see `torch.library.register_autograd`."""
    torch.library.register_autograd(f"fastrl::{name}", backward, setup_context=setup, lib=_library)


def by_last(name: str, package: str, modules: Mapping[str, str]) -> Callable[..., object]:
    """What runs an operator whose last argument is `impl`.

    It calls the function of the operator's name, with the other arguments, in the module of
    ``package`` that ``modules`` names for `impl`.
    """

    @cache
    def function(impl):
        return getattr(importlib.import_module(f"{package}.{modules[impl]}"), name)

    def run(*arguments):
        return function(arguments[-1])(*arguments[:-1])

    return run
