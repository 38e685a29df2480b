"""Log-probabilities and sampling: the public ops, and the choice of implementation."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# draws and given define ops.
from fastrl.kernels.logprob import (  # noqa: F401
    draws,
    given,
    library,
    measured,
    parallel,
    parallel_sample,
    reference,
)
from fastrl.kernels.logprob.checks import (
    check_draws,
    check_inplace,
    check_kernel,
    check_linear,
    check_target,
    check_temperature,
)
from fastrl.kernels.logprob.reference import LogProbs, Samples
from fastrl.kernels.native import choose

# Implementations besides the reference; see fastrl.kernels.native.choose.
HAS: dict[str, tuple[str, ...]] = {
    "linear_logprob": ("cpu", "triton", "cuda"),
    "linear_sample": ("cpu",),
    "logprob_from_logits": ("cpu",),
}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    workspace_mb: float = 60.0,
    inplace_backward: bool = False,
    impl: str = "auto",
    tp_group: "dist.ProcessGroup | None" = None,
) -> LogProbs:
    """Log-probability of `target` under the lm-head's softmax, with its logsumexp and entropy.

    `z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature`;
    `lse = log sum_v exp z_v`; `logprob = z[target] - lse`; `entropy = lse - sum_v softmax(z)_v
    z_v`.

    hidden `[..., H]` and weight `[V, H]` are bf16, fp16, float32 or float64; target `[...]` is
    int64; bias `[V]`; temperature is a number or `[...]`. Returns `LogProbs` of `[...]` float32
    tensors in nats (float64 for float64 inputs), all differentiable; rows whose target is
    `ignore_index` are 0. From forward to backward the call holds at most `workspace_mb` (2**20
    bytes): what is left of it beyond fixed buffers keeps the logits' exponentials, of which the
    backward then needs three matrix products where it needs four, and, on a CPU, float32 sums of a
    16-bit hidden's gradient, which otherwise costs a fifth product. On a CPU that changes not a
    bit. On a GPU it bounds what is kept, not the backward's own buffers, and results agree to the
    rounding of the inputs' dtype. With weight and bias frozen, and without entropy, a CPU keeps
    `[N, H]` float32 instead, whatever `workspace_mb` is, of which hidden's gradient is made: two
    products in all, but for rows whose target is less likely than e^-60, which are computed again.
    `inplace_backward` allows for one backward alone, a second one raises `RuntimeError`: where
    half of `workspace_mb` has less room, a CPU then makes weight's gradient in the forward, `[V,
    H]` in its dtype, and keeps exponentials in its memory; not with a bias, a softcap or entropy,
    and not inside torch.compile. It changes no bit of any result.
    Raises `ValueError` for shapes, dtypes or values that do not fit and for an unavailable `impl`.

    With `tp_group` each of its ranks gives its slice of weight `[V_r, H]` and bias, in the order of
    the ranks and of any sizes, and the same hidden and target, which counts in the whole
    vocabulary. All ranks get the same bits. Each must call backward with the same upstream
    gradient; the gradients are those of one copy of the loss: of weight and bias the slice's, of
    hidden the whole, summed over the ranks as after a column-parallel linear, so sum it no further.
    Raises `ValueError` on every rank where they disagree; in a compiled graph nobody looks.

    A DTensor weight or bias, split by rows or replicated over one mesh dimension, as FSDP2 leaves
    them outside a module's forward, is gathered for the forward and again for the backward, and
    only the shard is kept in between (the reference keeps what it widens to float32). Each rank
    has its own hidden and target; the gradient is the mean over the ranks, as FSDP2's, placed like
    the weight. To gather and compute in bf16 what is kept in float32, pass `weight.bfloat16()`.
    """
    options = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
        "entropy": entropy,
    }
    parallel_options = options | {
        "workspace_mb": workspace_mb,
        "inplace_backward": inplace_backward,
        "impl": impl,
    }
    if tp_group is None and any(map(parallel.is_dtensor, (hidden, weight, target, bias))):
        return parallel.sharded(linear_logprob, hidden, weight, target, **parallel_options)
    check_linear(hidden, weight, bias, softcap)
    check_target(target, hidden.shape[:-1], "target")
    check_temperature(temperature, target.shape)
    if not workspace_mb >= 0:
        raise ValueError(f"workspace_mb={workspace_mb} must be 0 or more")
    if tp_group is not None:
        return parallel.over_vocabulary(
            linear_logprob, tp_group, hidden, weight, target, **parallel_options
        )
    if impl == "auto" and torch.float64 in (hidden.dtype, weight.dtype):
        impl = "reference"  # float64 is for the truth; no kernel computes in it
    prefer = measured.order(hidden.dtype, *weight.shape[::-1]) if hidden.is_cuda else ()
    chosen = choose("linear_logprob", impl, hidden.device, HAS["linear_logprob"], prefer)
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "reference":
            return reference.linear_logprob(hidden, weight, target.long(), **options)
        check_kernel({"hidden": hidden, "weight": weight}, temperature)
        each = temperature if isinstance(temperature, Tensor) else None
        of_weight = weight.requires_grad or (bias is not None and bias.requires_grad)
        differentiated = torch.is_grad_enabled() and (hidden.requires_grad or of_weight)
        workspace = int(workspace_mb * 2**20) if differentiated else 0
        keeps = "exponentials"
        if chosen == "cpu" and differentiated:
            exact = entropy or bias is not None or softcap is not None
            if not (of_weight or entropy):
                keeps = "means"
            elif inplace_backward and not exact:
                keeps = library.where_exponentials_fit(hidden, weight, target, workspace)
        logprob, lse, spread, _ = torch.ops.fastrl.linear_logprob(
            hidden,
            weight,
            target.long(),
            bias,
            None if each is None else each.expand(target.shape),
            float(temperature) if each is None else 1.0,
            softcap or 0.0,
            logit_scale,
            ignore_index,
            chosen,
            workspace,
            keeps,
        )
        return LogProbs(logprob, lse, spread if entropy else None)


def logprob_from_logits(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> LogProbs:
    """Log-probability of `target` under `softmax(logits / temperature)`.

    logits `[..., V]` are bf16, fp16, float32 or float64; target `[...]` or `[..., K]` is int64;
    temperature is a number or `[...]`. Returns `LogProbs`: logprob shaped like target, lse and
    entropy `[...]`, float32, in nats (float64 for float64 logits), differentiable.

    With `inplace_backward` the backward writes the gradient into the memory of the logits, which
    must be contiguous: their values are gone then, and what else in the graph wants them raises
    autograd's error for tensors modified in place. Only kernels do it; torch.compile breaks its
    graph there, and refuses with fullgraph=True.

    Raises `ValueError` for shapes, dtypes or values that do not fit and for an unavailable `impl`.
    """
    if logits.dim() < 1 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point [..., V], got {logits.dtype} {tuple(logits.shape)}"
        )
    rows = logits.shape[:-1]
    check_target(
        target, rows if target.dim() < logits.dim() else (*rows, target.shape[-1]), "target"
    )
    if target.device != logits.device:
        raise ValueError(
            f"target is on {target.device} and logits on {logits.device}; they must be on one"
        )
    check_temperature(temperature, rows)
    if impl == "auto" and logits.dtype == torch.float64:
        impl = "reference"
    chosen = choose("logprob_from_logits", impl, logits.device, HAS["logprob_from_logits"])
    if inplace_backward:
        check_inplace(logits, chosen)
    with torch.autocast(logits.device.type, enabled=False):
        if chosen == "reference":
            return reference.logprob_from_logits(
                logits, target.long(), temperature=temperature, entropy=entropy
            )
        check_kernel({"logits": logits}, temperature)
        each = temperature if isinstance(temperature, Tensor) else None
        run = _run_eagerly if inplace_backward else torch.ops.fastrl.logprob_from_logits
        logprob, lse, spread = run(
            logits,
            target.long(),
            None if each is None else each.expand(rows),
            float(temperature) if each is None else 1.0,
            inplace_backward,
            chosen,
        )
        return LogProbs(logprob, lse, spread if entropy else None)


# Compiled code would copy the logits, and need not tell autograd that it has written to them.
@torch.compiler.disable(reason="inplace_backward=True does not work inside torch.compile")
def _run_eagerly(*arguments):
    return torch.ops.fastrl.logprob_from_logits(*arguments)


@torch.no_grad()
def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    seeds: Tensor,
    positions: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
    tp_group: "dist.ProcessGroup | None" = None,
) -> Samples:
    """Draw one token per row from the lm-head's softmax, with its log-probability.

    Gumbel-argmax with noise that is a pure function of (seed, position, vocabulary entry), so a
    row's token does not depend on the rows beside it. Truncation is top-k, then top-p, then min-p;
    temperature 0 is greedy. Only truncation holds logits, of as many rows as fit in 128 MB on a CPU
    (all rows in the reference). hidden `[M, H]`, weight `[V, H]`; seeds and positions `[M]` int64.
    Returns `Samples`: token `[M]` int64; logprob `[M]` float32 under the distribution sampled from
    (0 when greedy); untruncated_logprob `[M]` float32 under the untruncated one (at temperature 1
    when greedy). A DTensor weight or bias, as of linear_logprob, is gathered for the call. Raises
    `ValueError` for shapes, dtypes or values that do not fit and for an unavailable `impl`.

    With `tp_group` each of its ranks gives its slice of weight `[V_r, H]` and bias, in the order of
    the ranks and of any sizes, and the same of everything else. All ranks get the same token, of
    the whole vocabulary, and log-probs: those of one process with all of weight, but where rounding
    decides. Truncation is plain PyTorch then, whatever `impl` draws without, and holds the slice's
    logits of as many rows as fit in 128 MB. Raises `ValueError` on every rank where they disagree.
    """
    check_draws(hidden, weight, seeds, positions, bias, softcap)
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (off) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must lie in [0, 1]")
    if tp_group is None:
        weight, bias = parallel.whole("weight", weight), parallel.whole("bias", bias)
    if impl == "auto" and torch.float64 in (hidden.dtype, weight.dtype):
        impl = "reference"
    chosen = choose("linear_sample", impl, hidden.device, HAS["linear_sample"])
    seeds, positions = seeds.long(), positions.long()
    settings: dict[str, Any] = {
        "seeds": seeds,
        "positions": positions,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "bias": bias,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    with torch.autocast(hidden.device.type, enabled=False):
        if tp_group is not None:
            return parallel_sample.over_vocabulary(
                linear_sample, tp_group, hidden, weight, **settings, impl=impl
            )
        if chosen != "reference":
            check_kernel({"hidden": hidden, "weight": weight})
            drawn = torch.ops.fastrl.linear_sample(
                hidden,
                weight,
                seeds,
                positions,
                bias,
                temperature,
                top_k,
                top_p,
                min_p,
                softcap or 0.0,
                logit_scale,
                chosen,
            )
            return Samples(*drawn)
        return reference.linear_sample(hidden, weight, **settings)
