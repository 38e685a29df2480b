"""Commands as a shell takes them, right for however fastrl itself was installed."""

import json
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def program() -> str:
    """The command line of this installation: `fastrl` where that is what the PATH finds."""
    typed = sys.argv[0]
    if Path(typed).name != "fastrl" or not Path(typed).is_file():  # a script's, a notebook's
        typed = str(Path(sys.executable).with_name("fastrl"))
    if not Path(typed).is_file():
        return shlex.join([sys.executable, "-m", "fastrl"])
    found = shutil.which("fastrl")
    same = found is not None and Path(found).resolve() == Path(typed).resolve()
    return "fastrl" if same else shlex.quote(typed)


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
