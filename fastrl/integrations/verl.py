"""verl: what `fastrl.patch("verl")` replaces and registers.

Each Ray worker is a process of its own: see docs/integrations.md for how the patch reaches it.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastrl import losses
from fastrl.integrations.comparison import Call, compare_tensors
from fastrl.integrations.kernels import entropy_of_logits, need_kernel
from fastrl.integrations.patching import Declined, Registration, Replacement
from fastrl.kernels import gae, linear_logprob, logprob_from_logits

TORCH, FUSED = "verl.utils.torch_functional", "verl.utils.experimental.torch_functional"
LINEAR = "verl.utils.kernel.linear_cross_entropy"
ALGOS = "verl.trainer.ppo.core_algos"


def replacements() -> list[Replacement]:
    return [
        Replacement(
            f"{TORCH}.logprobs_from_logits",
            logprobs_from_logits,
            compare=partial(compare_tensors, inplace_backward=False),
        ),
        Replacement(f"{TORCH}.entropy_from_logits", entropy_from_logits),
        Replacement(
            f"{TORCH}.entropy_from_logits_with_chunking", entropy_from_logits_with_chunking
        ),
        Replacement(
            f"{LINEAR}.linear_cross_entropy",
            linear_cross_entropy,
            declared=f"{LINEAR}.LinearCrossEntropy.forward",
            compare=_compare_linear,
        ),
        Replacement(f"{FUSED}.FusedLinearForPPO.forward", _fused_linear),
        Replacement(
            f"{ALGOS}.compute_gae_advantage_return",
            compute_gae_advantage_return,
            compare=partial(compare_tensors, where="response_mask"),
        ),
    ]


def registrations() -> list[Registration]:
    estimators, policy = f"{ALGOS}.ADV_ESTIMATOR_REGISTRY", f"{ALGOS}.POLICY_LOSS_REGISTRY"
    return [
        Registration(f"{ALGOS}.register_adv_est", estimators, "fastrl_grpo", grpo_advantages),
        Registration(f"{ALGOS}.register_policy_loss", policy, "fastrl", policy_loss),
    ]


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    need_kernel("logprob_from_logits", logits)
    # The caller allows it; the gradient of a leaf belongs beside it, not into it.
    inplace = inplace_backward and logits.is_contiguous() and not logits.is_leaf
    return logprob_from_logits(logits, labels, inplace_backward=inplace).logprob


def entropy_from_logits(logits: Tensor) -> Tensor:
    return entropy_of_logits(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    return entropy_of_logits(logits)


def _linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    need_kernel("linear_logprob", hidden, weight)
    out = linear_logprob(hidden, weight, labels.long(), temperature=temperature, entropy=True)
    assert out.entropy is not None
    return out.logprob, out.entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    if reduction.lower() != "none":
        raise Declined(f"reduction={reduction!r}; fastrl gives log-probs per token")
    if dist_process_group is not None:
        raise Declined("dist_process_group: its gradient convention is verl's own")
    logprob, entropy = _linear(hidden, weight, labels, temperature)
    return logprob.flatten(), entropy.flatten()


def _compare_linear(call: Call) -> None:
    """verl's Triton kernel where it runs, and elsewhere what verl computes in torch."""
    if call.bound.arguments["hidden"].is_cuda:
        compare_tensors(call)
        return
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction

    def original(hidden, weight, labels, temperature=1.0, reduction="none", group=None):
        flat = hidden.reshape(-1, hidden.shape[-1])
        return FusedLinearForPPOFunction.apply(flat, weight, labels.flatten(), temperature)

    compare_tensors(call, original=original)


def _fused_linear(
    self: nn.Module,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    return _linear(hidden_states, vocab_weights, input_ids, temperature)


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
) -> tuple[Tensor, Tensor]:
    """verl's GAE: whitened advantages and returns `[B, T]`; returns outside the mask are 0."""
    from verl.utils.torch_functional import masked_whiten

    need_kernel("gae", token_level_rewards, values)
    advantages, returns = gae(
        token_level_rewards,
        values,
        gamma=float(gamma),
        lam=float(lam),
        mask=response_mask.bool(),
    )
    return masked_whiten(advantages, response_mask), returns


def grpo_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable],
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`adv_estimator: fastrl_grpo`: `fastrl.losses.grpo_advantages` of the summed rewards.

    `index` names each row's group, in any order. Returns advantages and returns `[B, T]`, both the
    row's advantage where the mask is nonzero. `config.norm_adv_by_std_in_grpo` false leaves the
    division out. Raises `ValueError` for groups of different sizes. (2402.03300)
    """
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(index):
        rows.setdefault(group, []).append(row)
    sizes = {len(group) for group in rows.values()}
    if len(sizes) > 1:
        raise ValueError(f"index must name groups of one size, got sizes {sorted(sizes)}")
    order = torch.tensor([row for group in rows.values() for row in group])
    order = order.to(token_level_rewards.device)
    scale = True if config is None else bool(config.get("norm_adv_by_std_in_grpo", True))
    scores = (token_level_rewards * response_mask).sum(-1)
    ours = losses.grpo_advantages(scores[order], sizes.pop(), scale=scale, eps=1e-6)
    advantages = torch.empty_like(ours).index_copy_(0, order, ours).unsqueeze(-1) * response_mask
    return advantages, advantages


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """`policy_loss.loss_mode: fastrl`: `fastrl.losses.policy_loss` with verl's aggregation.

    Clipped and dual-clipped as `config` says; unlike verl's own it ignores what masked tokens hold,
    NaN too. Returns the scalar loss and the metrics of `fastrl.losses.policy_loss`.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    if config is None:
        raise ValueError("config must be verl's actor config, got None")
    # The aggregation is linear in the losses, so its gradient is the tokens' weights.
    ones = torch.ones_like(log_prob, dtype=torch.float32, requires_grad=True)
    with torch.enable_grad():
        total = agg_loss(ones, response_mask, loss_agg_mode, **config.global_batch_info)
        (weights,) = torch.autograd.grad(total, ones)
    if rollout_is_weights is not None:
        weights = weights * rollout_is_weights

    def bound(side: str) -> float:
        value = config.get(f"clip_ratio_{side}", None)
        return float(config.clip_ratio if value is None else value)

    loss, metrics = losses.policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask.bool(),
        weights,
        eps_low=bound("low"),
        eps_high=bound("high"),
        dual_clip=config.get("clip_ratio_c", 3.0),
    )
    return loss, {f"actor/{name}": value.item() for name, value in metrics.items()}
