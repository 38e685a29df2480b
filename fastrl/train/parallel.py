"""Processes that train together, as torchrun starts them; a single one passes through all of this.

Every process goes through the same steps with the same prompts, batches and random numbers. Only
the work on models and the reward functions are shared out (`span`, `share`), and what comes of them
is gathered (`gather`, `add_up`). So a batch is always the whole one, on every process: what is
counted, averaged or drawn over it, loss weights above all, is what a single process finds, and a
run on N processes takes the same steps to rounding. Batches hold token ids and a few numbers for
each, which is little beside what a model needs.

The functions below that speak of all processes have to be called by all of them, in one order.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrl.choices import Parallel
from fastrl.models.head import unwrap

if dist.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of a process that waits for the others
PLAIN = "fastrl_plain"


class LostProcess(RuntimeError):
    """Another process ended or no longer answers."""


def rank() -> int:
    """Which of the processes this is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def processes() -> Iterator[None]:
    """The process group that torchrun's environment asks for, unless there is one already.

    gloo for what is on CPUs, NCCL for what is on GPUs. Raises `ValueError` where this torch cannot.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1 or size() > 1:
        yield
        return
    if not dist.is_available():
        raise ValueError(f"WORLD_SIZE={asked} asks for processes that this torch cannot connect")
    gpus = torch.cuda.device_count()
    if local_rank() < gpus:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    yield  # where it raises the others may never answer: nothing is taken down together
    dist.destroy_process_group()


def local_rank() -> int:
    """Which of the processes of this machine this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def gather(value: T) -> list[T]:
    """What each process has; tensors in it have to be on the CPU.

    Raises `LostProcess` where one ended.
    """
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise LostProcess(f"another process ended or no longer answers: {error}") from None
    return values


def first(function: Callable[[], T]) -> T:
    """Let the first process alone do something, such as write a file; all get its result or error.

    No process goes on before it is done.
    """
    if size() == 1:
        return function()
    result: T | None = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = function()
        except Exception as raised:
            error = raised
    result, error = gather((result, error))[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all processes; those that are sharded are left alone."""
    if size() == 1:
        return
    try:
        works = [dist.all_reduce(t, async_op=True) for t in tensors if t.numel() and not sharded(t)]
        for work in works:
            work.wait()
    except RuntimeError as error:
        raise LostProcess(f"another process ended or no longer answers: {error}") from None


def span(count: int) -> slice:
    """The part of `count` neighbouring things that this process sees to."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def share(pieces: Sequence[T]) -> list[tuple[T, bool]]:
    """The pieces that this process sees to, and whether they count.

    All processes get the same number, as the passes through a sharded model have to be: some get a
    piece once more that counts elsewhere.
    """
    rounds = -(-len(pieces) // size())
    mine = range(rank(), rounds * size(), size())
    return [(pieces[i % len(pieces)], i < len(pieces)) for i in mine]


@contextmanager
def own_noise() -> Iterator[None]:
    """Random numbers, of dropout for one, that differ among processes; after it they are alike."""
    if size() == 1:
        yield
        return
    seed = int(torch.randint(2**31, ()))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank())
        yield


def distribute(model: nn.Module, parallel: Parallel) -> nn.Module:
    """A model, equal on all processes, laid out for training: replicated as it is, or sharded.

    "fsdp" shards it in place with FSDP2, each layer in a group of its own, and sums gradients in
    float32. Every process loads a model whole before it is sharded.
    """
    if size() == 1 or parallel == "replicated":
        return model
    empty = {id(p): nn.Parameter(p.new_empty(0), p.requires_grad) for p in model.parameters()}
    plain = copy.deepcopy(model, empty)
    device = next(model.parameters()).device
    layers = set(getattr(unwrap(model), "_no_split_modules", None) or ())
    parts = [m for m in model.modules() if type(m).__name__ in layers]
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (size(),)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        # Also of the root: between passes parameters are always the shards.
        "reshard_after_forward": True,
    }
    for part in (*parts, model):
        group = fully_shard(part, **options)
        group.set_gradient_divide_factor(1.0)  # loss weights count the rows of all processes
        group.set_force_sum_reduction_for_comms(True)
    object.__setattr__(model, PLAIN, plain)  # not as a submodule
    return model


def plain(model: nn.Module) -> nn.Module:
    """The model without FSDP2's hooks; a sharded one's has parameters only inside `whole`."""
    return getattr(model, PLAIN, model)


@contextmanager
def whole(model: nn.Module) -> Iterator[nn.Module]:
    """`plain(model)` with all parameters on every process, to sample from, copy or save.

    A sharded model's are gathered for as long as this lasts, which takes the memory of a whole one.
    """
    inner = plain(model)
    if inner is model:
        yield model
        return
    shards = dict(model.named_parameters())
    try:
        for name, parameter in inner.named_parameters():
            parameter.data = full(shards[name].detach())
        yield inner
    finally:
        for parameter in inner.parameters():
            parameter.data = parameter.new_empty(0)


def sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor."""
    return dist.is_available() and isinstance(tensor, DTensor)


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A tensor that every process has whole, on the device of another and sharded like it."""
    tensor = tensor.to(model.device)
    if not sharded(model):
        return tensor
    mesh, placements = model.device_mesh, model.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def collect(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whole, sharded ones on the CPU: on the first process, which writes them."""
    out = {}
    for name, tensor in tensors.items():
        gathered = full(tensor)
        if rank() == 0:
            out[name] = gathered.cpu() if sharded(tensor) else tensor
    return out
