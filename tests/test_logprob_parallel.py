"""linear_logprob on two processes (gloo): slices of the vocabulary and sharded weights."""

import datetime
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist

from fastrl.kernels import linear_logprob, linear_sample, native

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
)
IMPLS = [i for i in ("reference", "cpu") if native.unavailable(i, torch.device("cpu")) is None]
every_impl = pytest.mark.parametrize("impl", IMPLS)
SECONDS = 60


def _rank(rank, rendezvous, pipe):
    """A process that runs what it is sent until it is sent None."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=SECONDS / 3),
    )
    while (task := pipe.recv()) is not None:
        function, arguments = task
        torch.manual_seed(0)
        try:
            pipe.send((function(rank, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Two processes that run a function of this file side by side."""

    def __init__(self, rendezvous):
        context = multiprocessing.get_context("spawn")
        self.pipes, theirs = zip(*(context.Pipe() for _ in range(2)), strict=True)
        self.processes = [
            context.Process(target=_rank, args=(r, rendezvous, theirs[r]), daemon=True)
            for r in range(2)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments):
        """What `function(rank, *arguments)` returns on each rank."""
        assert all(p.is_alive() for p in self.processes), "a rank has died in an earlier test"
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(SECONDS):
                self.end(grace=0)
                pytest.fail(f"rank {rank} did not answer")
            answers.append(pipe.recv())
        for rank, (_, error) in enumerate(answers):
            assert error is None, f"rank {rank}:\n{error}"
        return [result for result, _ in answers]

    def end(self, grace=10):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if grace and process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(grace)
            process.kill()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    both = Ranks(tmp_path_factory.mktemp("rendezvous") / "file")
    yield both
    both.end()
