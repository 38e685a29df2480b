"""Ctrl-C: the step under way ends and is saved, and the user is told how to go on."""

import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastrl import installation
from fastrl.train import checkpoints, parallel


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or SIGINT, while a run trains; the message has the command that continues it."""

    def __init__(self, folder: Path):
        saved = checkpoints.latest(folder)
        kept = "nothing is saved yet; to begin anew"
        if saved is not None:
            kept = f"last saved after step {checkpoints.step_of(saved)} of the run; to go on"
        alone = "; several processes do not save when interrupted" if parallel.size() > 1 else ""
        resume = f"{installation.program()} train --resume {shlex.quote(str(folder))}"
        super().__init__(f"stopped{alone}; {kept}: {resume}")


@contextmanager
def interrupts(folder: Path) -> Iterator[Callable[[], bool]]:
    """Says whether Ctrl-C was pressed, which waits for the step's end; a second one does not.

    Several processes would have to agree on the step, and outside the main thread, or where someone
    else sees to SIGINT, nothing is waited for either.
    """
    presses: list[bool] = []

    def press(*_: object) -> None:
        if presses:
            raise KeyboardInterrupt
        presses.append(True)
        # Not through the console, which may be in the middle of a line.
        os.write(2, b"\nsaving after this step; Ctrl-C again stops at once\n")

    alone = parallel.size() == 1 and threading.current_thread() is threading.main_thread()
    waits = alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if waits:
        signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(presses)
    except KeyboardInterrupt:
        raise Interrupted(folder) from None
    finally:
        if waits:
            signal.signal(signal.SIGINT, signal.default_int_handler)
