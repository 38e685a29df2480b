"""The commands that bring what is missing, right for however fastrl itself was installed."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import urlparse
from urllib.request import url2pathname

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def get(package: str) -> str:
    """What installs a package, in a version that fastrl's own extras ask for.

    It names the package itself: fastrl stays as it is and need not be found, or built, again.
    """
    try:
        asked = distribution("fastrl").requires or []
    except PackageNotFoundError:
        asked = []
    name = canonicalize_name(package)
    same = [r for r in map(Requirement, asked) if canonicalize_name(r.name) == name]
    known = max((f"{r.name}{r.specifier}" for r in same), key=len, default=package)
    return f"pip install {shlex.quote(known)}"


def rebuild() -> str:
    """What builds and installs fastrl anew from where it came from, native kernels and all."""
    command = "pip install --force-reinstall --no-deps --no-cache-dir"
    try:
        origin = json.loads(distribution("fastrl").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    url = origin.get("url", "")
    if "vcs_info" in origin:
        source = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
        return f"{command} {shlex.quote(source)}"
    if "dir_info" in origin:
        editable = "--editable " if origin["dir_info"].get("editable") else ""
        return f"{command} {editable}{shlex.quote(url2pathname(urlparse(url).path))}"
    return f"{command} . in a checkout of fastrl"
