"""Two processes of a torch.distributed group (gloo, this machine) that run a test's functions."""

import datetime
import multiprocessing
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SECONDS = 120
STARTUP = 300  # seconds in which a busy machine has loaded torch twice


def _rank(rank, rendezvous, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=SECONDS / 3),
    )
    pipe.send("ready")
    while True:
        function, arguments = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send((function(rank, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))


class Ranks:
    """Started when first needed, and anew after a failure, which may leave them out of step."""

    def __init__(self):
        self.processes, self.pipes, self.folder = [], [], None

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        rendezvous = Path(self.folder.name) / "rendezvous"
        for rank in range(2):
            mine, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(rank, rendezvous, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(mine)
        for pipe in self.pipes:
            if not pipe.poll(STARTUP) or pipe.recv() != "ready":
                raise RuntimeError("the processes of torch.distributed did not start")

    def run(self, function, *arguments):
        """What `function(rank, *arguments)`, of a test module, returns on each rank."""
        try:
            if not self.processes:
                self.start()
            for pipe in self.pipes:
                pipe.send((function, arguments))
            answers = [
                pipe.recv() if pipe.poll(SECONDS) else (None, "no answer") for pipe in self.pipes
            ]
        except (EOFError, OSError, RuntimeError) as error:
            answers = [(None, f"a rank has died: {error!r}")]
        if errors := [f"rank {i}:\n{e}" for i, (_, e) in enumerate(answers) if e is not None]:
            self.end()
            pytest.fail("\n".join(errors), pytrace=False)
        return [result for result, _ in answers]

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()
        if self.folder is not None:
            self.folder.cleanup()
        self.__init__()
