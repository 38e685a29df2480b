"""Files and folders that are whole or absent, never half-written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


class WriteError(OSError):
    """A file or folder that cannot be written; whatever was there before is untouched."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, sync it, then rename it into place.

    Raises `WriteError` where writing fails.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(f"cannot write {str(path)!r}: {error}") from error


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a temporary folder, sync all of it, then rename it to `folder`.

    Raises `WriteError` where writing fails (a full disk, say); whatever was at `folder` stays as it
    was.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        fill(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        previous = folder.with_name(f".{folder.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise WriteError(
            f"cannot write {str(folder)!r}: {error}; what was saved before is untouched"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
