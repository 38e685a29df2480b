"""fastrl's ops inside trainers that people already have: `fastrl.patch("trl")` and its like."""

import importlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from fastrl import installation
from fastrl.integrations.comparison import PatchError
from fastrl.integrations.patching import Patch, Replaced

# The versions whose names and signatures are known; each is checked again when it is patched.
SUPPORTED = {"trl": ">=1.16,<2", "verl": ">=0.9,<1", "openrlhf": ">=0.11,<1"}

__all__ = ["SUPPORTED", "Patch", "PatchError", "Replaced", "patch"]


def patch(framework: str, *, only: Sequence[str] | None = None) -> Patch:
    """Replace functions of a framework by fastrl's; see `fastrl.patch`."""
    if framework not in SUPPORTED:
        raise ValueError(f"framework={framework!r} is unknown; use one of {', '.join(SUPPORTED)}")
    try:
        installed = version(framework)
    except PackageNotFoundError:
        raise ImportError(f"{framework} is not installed; {installation.get(framework)}") from None
    if not SpecifierSet(SUPPORTED[framework]).contains(installed, prereleases=True):
        raise PatchError(
            f"{framework} {installed} is installed, and fastrl knows {SUPPORTED[framework]}; "
            "nothing was replaced"
        )
    known = importlib.import_module(f"fastrl.integrations.{framework}")
    return Patch(framework, known.replacements(), known.registrations(), only)
