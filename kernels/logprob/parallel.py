"""linear_logprob on several processes: slices of the vocabulary, and weights sharded as DTensors.

Of linear_sample see parallel_sample.py.

Slices: rank r runs the op on its own and learns lse_r, entropy_r and, where it holds the target,
logprob_r. With w_r = exp(lse_r - lse), the slice's share of the probability,

    lse = log sum_r exp lse_r      entropy = sum_r w_r (entropy_r - log w_r)
    logprob = logprob_r + log w_r  of the rank r that holds the target

which takes no difference of large numbers but log w_r. All ranks gather the same statistics and
merge them in the order of the ranks, so all hold the same bits.

Shards: the weight is gathered for the forward, dropped, and gathered again for the backward.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from fastrl.kernels.logprob.reference import LogProbs

if dist.is_available():  # otherwise there are no DTensors
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

IGNORED = -100  # on a slice; the caller's ignore_index may be an entry of the vocabulary


def gather(x: Tensor, group: "dist.ProcessGroup") -> list[Tensor]:
    """Every rank's `x`, in their order."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def _sum_of_ranks(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The sum in the order of the ranks, which an all-reduce does not keep; each adds up a part."""
    ranks = dist.get_world_size(group)
    flat = x.reshape(-1)
    flat = pad(flat, (0, -flat.numel() % ranks))
    parts = torch.empty_like(flat)
    dist.all_to_all_single(parts, flat, group=group)
    first, *others = parts.chunk(ranks)
    total = first if first.dtype == torch.float64 else first.float()
    for other in others:
        total = total + other
    return torch.cat(gather(total.to(x.dtype), group))[: x.numel()].view(x.shape)


class _Replicated(torch.autograd.Function):
    """A tensor that all ranks hold; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _sum_of_ranks(grad, ctx.group), None


class _Merge(torch.autograd.Function):
    """Statistics of the whole vocabulary from those of this rank's slice.

    keep `[...]` bool; owner `[...]`, the rank that holds the target; logprob, lse and, if asked
    for, entropy `[...]`. In float64: it is little work, and leaves one rounding per result.
    """

    @staticmethod
    def forward(ctx, keep, owner, group, *mine):
        rank, dtype = dist.get_rank(group), mine[0].dtype
        ranks = torch.stack(gather(torch.stack(mine), group)).double()
        logprobs, lses = ranks[:, 0], ranks[:, 1]
        highest = lses.amax(0)
        lse = highest + torch.log(sum(torch.exp(lses - highest).unbind()))
        log_w = lses - lse
        w = torch.exp(log_w)
        results = [(logprobs + log_w).gather(0, owner.unsqueeze(0)).squeeze(0), lse]
        pull = None
        if len(mine) == 3:
            inside = (ranks[:, 2] - log_w).masked_fill(w == 0, 0.0)  # may be infinite there
            results.append(sum((w * inside).unbind()))
            pull = (inside[rank] - results[2]).to(dtype)
        ctx.save_for_backward(keep, owner == rank, w[rank].to(dtype), pull)
        return tuple(torch.where(keep, x, 0.0).to(dtype) for x in results)

    @staticmethod
    def backward(ctx, *upstream):
        keep, own, w, pull = ctx.saved_tensors
        grad_logprob, grad_lse, *grad_entropy = (torch.where(keep, g, 0.0) for g in upstream)
        of_target = torch.where(own, grad_logprob, 0.0)
        of_lse = grad_lse - grad_logprob
        if grad_entropy:
            of_lse = of_lse + grad_entropy[0] * pull
        return None, None, None, of_target, of_lse * w + of_target, *(g * w for g in grad_entropy)


def check_group(group: Any) -> None:
    """Raise `ValueError` unless this process can talk to the others of `group`."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"tp_group={group} needs torch.distributed; call init_process_group first")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            "tp_group must be a torch.distributed.ProcessGroup that holds this process, got "
            f"{group!r}"
        )


def alike(names: tuple[str, ...], values: Tensor, group) -> Tensor:
    """What each rank says, `[ranks, names + 1]`: the same of each name, then its slice's entries.

    Every rank raises what any rank has to: one that raised alone would leave the others waiting.
    On a GPU the host waits for these few integers.
    """
    ranks = torch.stack(gather(values, group))
    if torch.compiler.is_compiling():
        return ranks  # the checks read values, which a compiled graph does not have
    *same, sizes = ranks.T.tolist()
    for name, said in zip(names, same, strict=True):
        if len(set(said)) > 1:
            raise ValueError(f"{name} must be the same on all ranks of tp_group, got {said}")
    if min(sizes) == 0:
        raise ValueError(f"each rank of tp_group must hold entries of weight, got V={sizes}")
    return ranks


def _ends(
    hidden: Tensor, weight: Tensor, target: Tensor, keep: Tensor, entropy: bool, group
) -> Tensor:
    """Where each rank's slice ends, `[ranks]`, once all have been found to be called alike."""
    said = {
        "the rows of hidden": hidden.shape[:-1].numel(),
        "hidden's H": hidden.shape[-1],
        "the bytes of hidden's dtype": hidden.element_size(),
        "whether hidden requires a gradient": int(hidden.requires_grad),
        "entropy": int(entropy),
    }
    bounds = pad(torch.where(keep, target, 0).reshape(-1), (0, 1)).aminmax()
    known = torch.tensor([*said.values(), weight.shape[0]], device=target.device)
    names = ("the lowest target", "the highest target", *said)
    ranks = alike(names, torch.cat([torch.stack(bounds), known]), group)
    ends = ranks[:, -1].cumsum(0)
    if torch.compiler.is_compiling():
        return ends
    sizes = ranks[:, -1].tolist()
    low, high = ranks[0, :2].tolist()
    if low < 0 or high >= sum(sizes):
        raise ValueError(
            f"target must lie in [0, V={sum(sizes)}), the sum over tp_group's ranks, or be "
            f"ignore_index, got values from {low} to {high}"
        )
    return ends


def over_vocabulary(
    local: Callable[..., LogProbs],
    group: "dist.ProcessGroup",
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor,
    ignore_index: int,
    entropy: bool,
    **options: Any,
) -> LogProbs:
    """`local`, which is linear_logprob, with a slice of `weight` on each rank of `group`.

    A row whose logits are all -inf in one slice has NaN gradients, as `local` alone gives it.
    """
    check_group(group)
    for name, x in (("hidden", hidden), ("weight", weight), ("target", target)):
        if is_dtensor(x):
            raise ValueError(f"{name} is a DTensor; with tp_group pass {name}.to_local()")
    keep = target != ignore_index
    ends = _ends(hidden, weight, target, keep, entropy, group)
    rank = dist.get_rank(group)
    owner = torch.searchsorted(ends, target, right=True).where(keep, 0)
    here = (target - ends[rank] + weight.shape[0]).where(owner == rank, 0).where(keep, IGNORED)
    hidden, temperature = (
        _Replicated.apply(x, group) if isinstance(x, Tensor) and x.requires_grad else x
        for x in (hidden, temperature)
    )
    out = local(
        hidden,
        weight,
        here,
        temperature=temperature,
        ignore_index=IGNORED,
        entropy=entropy,
        **options,
    )
    merged = _Merge.apply(keep, owner, group, *(x for x in out if x is not None))
    return LogProbs(*merged, *(() if entropy else (None,)))


def is_dtensor(x: Any) -> bool:
    """Whether `x` is a torch DTensor."""
    return dist.is_available() and isinstance(x, DTensor)


class _Whole(torch.autograd.Function):
    """All of a sharded tensor; its gradient is the mean of the ranks', sharded the same way."""

    @staticmethod
    def forward(ctx, x):
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        return x.full_tensor().detach()

    @staticmethod
    def backward(ctx, grad):
        summands = DTensor.from_local(grad, ctx.mesh, [Partial()], run_check=False)
        return summands.redistribute(placements=ctx.placements) / ctx.mesh.size()


def whole(name: str, x: Tensor | None) -> Tensor | None:
    """`x`, gathered if it is a DTensor. Raises `ValueError` for one that is not split by rows."""
    if not is_dtensor(x):
        return x
    placements = x.placements
    if len(placements) > 1 or not (placements[0] == Shard(0) or placements[0] == Replicate()):
        raise ValueError(
            f"{name} is a DTensor placed {placements} on a mesh of shape "
            f"{tuple(x.device_mesh.shape)}; it must be Shard(0) or Replicate on one dimension"
        )
    return _Whole.apply(x)


def sharded(
    local: Callable[..., LogProbs],
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    **options: Any,
) -> LogProbs:
    """`local`, which is linear_logprob, with `weight` or `bias` gathered for as long as it runs."""
    for name, x in (("hidden", hidden), ("target", target)):
        if is_dtensor(x):
            raise ValueError(f"{name} is a DTensor; pass {name}.to_local()")
    full = {"weight": whole("weight", weight), "bias": whole("bias", bias)}
    sources = {
        full[name].untyped_storage().data_ptr(): x
        for name, x in (("weight", weight), ("bias", bias))
        if is_dtensor(x)
    }

    def pack(x: Tensor):
        source = sources.get(x.untyped_storage().data_ptr(), x)
        view = None if source is x else (x.shape, x.stride(), x.storage_offset())
        return source, source._version, view

    def unpack(packed) -> Tensor:
        source, version, view = packed
        if source._version != version:  # with hooks, autograd does not look
            raise RuntimeError(
                f"a tensor of shape {tuple(source.shape)} that linear_logprob needs for its "
                "gradient was modified by an inplace operation"
            )
        return source if view is None else source.full_tensor().as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return local(hidden, full["weight"], target, bias=full["bias"], **options)
