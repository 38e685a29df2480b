"""fastrl: fast kernels and a thin trainer for RL post-training of language models."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastrl.integrations import Patch

try:
    __version__ = version("fastrl")
except PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"


def patch(framework: str, *, only: Sequence[str] | None = None) -> Patch:
    """Replace functions of "trl", "verl" or "openrlhf" by fastrl's; a context manager too.

    Returns what it replaced: `.replaced` maps names to (original, replacement), `.undo()` puts them
    back, and so does the end of a `with` block. `only` names some of them, in full or by their last
    part. The first call of each kind (dtypes, gradients, options) is compared with the original,
    values and gradients; a call that fastrl cannot answer goes to the original, with one warning.
    Raises `ImportError` where the framework is missing, and `PatchError` for a version that is not
    supported, a name that moved, a signature that changed, a second patch before the first is
    undone, an `only` that names nothing and, in the first calls, results that differ.
    """
    from fastrl.integrations import patch as replace  # the rest of fastrl takes seconds to import

    return replace(framework, only=only)
