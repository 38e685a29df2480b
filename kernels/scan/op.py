"""Advantages and returns: public functions, the torch operators behind them, who runs where."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels import native
from fastrl.kernels.operators import define
from fastrl.kernels.scan import reference

HAS = ("cpu", "triton", "cuda")
ANYWHERE = ("CompositeExplicitAutograd",)  # the reference has no need of a kernel's device
OUTPUTS = {"gae": 2, "discounted_returns": 1, "vtrace": 2}


class At(NamedTuple):
    """Where the tokens are: what every op here takes besides them."""

    mask: Tensor | None
    cu_seqlens: Tensor | None
    bootstrap: Tensor | None


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: ``(advantages, returns)``.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V.

    ``rewards`` and ``values`` are ``[B, T]``, or packed ``[N]`` with int32 ``cu_seqlens``
    ``[S + 1]``; any floating dtype. ``bootstrap`` ``[B]`` or ``[S]`` is the value after the last
    token, 0 by default. ``mask`` is bool, shaped like ``rewards``: a masked token (padding on
    either side, a tool's token) gives 0 whatever it holds; value and advantage carry across it.

    The outputs are float32, shaped like ``rewards``, and carry no gradient; only
    ``impl="reference"`` keeps float64. Raises ValueError naming the argument that does not fit.
    (1506.02438)
    """
    _check("gae", {"rewards": rewards, "values": values}, mask, cu_seqlens, bootstrap)
    return torch.ops.fastrl.gae(
        rewards.detach(), values.detach(), gamma, lam, mask, cu_seqlens, _detached(bootstrap), impl
    )


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Discounted sum of the rewards from each token on.

    R_t = r_t + gamma R_{t+1}, with ``bootstrap`` (0 by default) after the last token.

    Shapes, dtypes, ``mask`` and errors are those of :func:`gae`.
    """
    _check("discounted_returns", {"rewards": rewards}, mask, cu_seqlens, bootstrap)
    return torch.ops.fastrl.discounted_returns(
        rewards.detach(), gamma, mask, cu_seqlens, _detached(bootstrap), impl
    )


def vtrace(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """V-trace targets and advantages for off-policy tokens: ``(vs, advantages)``.

    With w_t = exp(logprobs_t - old_logprobs_t), rho_t = min(rho_bar, w_t), c_t = min(c_bar, w_t):
    vs_t = V_t + rho_t (r_t + gamma V_{t+1} - V_t) + gamma lam c_t (vs_{t+1} - V_{t+1});
    advantages_t = rho_t (r_t + gamma vs_{t+1} - V_t).

    ``logprobs`` is of the policy being trained, ``old_logprobs`` of the one that sampled. Shapes,
    dtypes, ``mask`` and errors are those of :func:`gae`. (1802.01561; remark 2 for ``lam``)
    """
    for name, bar in (("rho_bar", rho_bar), ("c_bar", c_bar)):
        if not bar > 0:
            raise ValueError(f"vtrace: {name}={bar} must be positive")
    tokens = {
        "rewards": rewards,
        "values": values,
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
    }
    _check("vtrace", tokens, mask, cu_seqlens, bootstrap)
    return torch.ops.fastrl.vtrace(
        *(t.detach() for t in tokens.values()),
        *(gamma, lam, rho_bar, c_bar, mask, cu_seqlens, _detached(bootstrap), impl),
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check(
    op: str,
    tokens: dict[str, Tensor],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> None:
    """What can be checked without reading data, so that torch.compile can trace it."""
    rewards = tokens["rewards"]
    if rewards.dim() != (2 if cu_seqlens is None else 1):
        layout = "[B, T]" if cu_seqlens is None else "[N] when cu_seqlens is given"
        raise ValueError(f"{op}: rewards must be {layout}, got shape {tuple(rewards.shape)}")
    for name, tensor in tokens.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool, got {mask.dtype}")
    segments = rewards.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
            raise ValueError(
                f"{op}: cu_seqlens must be int32 [S + 1], "
                f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
        segments = len(cu_seqlens) - 1
    if bootstrap is not None and not bootstrap.is_floating_point():
        raise ValueError(f"{op}: bootstrap must be floating point, got {bootstrap.dtype}")
    given: dict[str, Tensor | None] = {**tokens, "mask": mask, "bootstrap": bootstrap}
    for name, argument in given.items():
        shape = (segments,) if name == "bootstrap" else tuple(rewards.shape)
        if argument is not None and argument.shape != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(argument.shape)}")
    for name, argument in (given | {"cu_seqlens": cu_seqlens}).items():
        if argument is not None and argument.device != rewards.device:
            raise ValueError(
                f"{op}: {name} is on {argument.device}, but rewards are on {rewards.device}"
            )


def _check_offsets(op: str, cu_seqlens: Tensor, tokens: int) -> None:
    rising = (cu_seqlens.diff() >= 0).all()
    if not bool(rising & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens)):
        raise ValueError(
            f"{op}: cu_seqlens must start at 0, never fall and end at N={tokens}, "
            f"got {cu_seqlens.tolist() if len(cu_seqlens) <= 16 else cu_seqlens}"
        )


def _dtype(rewards: Tensor, impl: str) -> torch.dtype:
    keeps = impl == "reference" and rewards.dtype == torch.float64
    return torch.float64 if keeps else torch.float32


def _scan(
    op: str, tokens: tuple[Tensor, ...], options: dict[str, float], at: At, impl: str
) -> tuple[Tensor, ...]:
    """Runs the implementation that ``impl`` chooses, on contiguous tensors of one dtype."""
    dtype = _dtype(tokens[0], impl)
    impl = native.choose(op, impl, tokens[0].device, HAS)
    if at.cu_seqlens is not None:
        _check_offsets(op, at.cu_seqlens, tokens[0].numel())
    tokens = tuple(t.to(dtype).contiguous() for t in tokens)
    at = At(
        mask=None if at.mask is None else at.mask.contiguous(),
        cu_seqlens=None if at.cu_seqlens is None else at.cu_seqlens.contiguous(),
        bootstrap=None if at.bootstrap is None else at.bootstrap.to(dtype).contiguous(),
    )
    if impl == "reference":
        return getattr(reference, op)(*tokens, **options, **at._asdict())
    results = tuple(torch.empty_like(tokens[0]) for _ in range(OUTPUTS[op]))
    if tokens[0].numel() == 0:
        return results
    coefficients = dict(options)
    if "lam" in options:  # like the reference: the two are multiplied before they meet a float32
        coefficients["lam"] *= options["gamma"]
    if impl == "triton":
        from fastrl.kernels.scan import triton_kernels

        triton_kernels.launch(op, tokens, results, tuple(coefficients.values()), *at)
    else:
        _launch_native(op, impl, (*tokens, *results), coefficients, at)
    return results


def _launch_native(
    op: str, impl: str, arrays: tuple[Tensor, ...], coefficients: dict[str, float], at: At
) -> None:
    c, first = native.module(), arrays[0]
    count, length = first.shape if at.cu_seqlens is None else (len(at.cu_seqlens) - 1, 0)
    segments = c.Segments(
        count, length, *map(native.pointer, (at.cu_seqlens, at.mask, at.bootstrap))
    )
    args = getattr(c, f"{op}_args")(segments, *map(native.pointer, arrays), *coefficients.values())
    if impl == "cpu":
        getattr(c, f"{op}_cpu")(args, native.threads())
    else:
        with torch.cuda.device(first.device):
            native.check(op, getattr(c, f"{op}_cuda")(args, native.stream(first.device)))


_AT = "Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap, str impl"


def _gae(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap, impl):
    options = {"gamma": gamma, "lam": lam}
    return _scan("gae", (rewards, values), options, At(mask, cu_seqlens, bootstrap), impl)


def _discounted_returns(rewards, gamma, mask, cu_seqlens, bootstrap, impl):
    at = At(mask, cu_seqlens, bootstrap)
    return _scan("discounted_returns", (rewards,), {"gamma": gamma}, at, impl)[0]


def _vtrace(rewards, values, logprobs, old_logprobs, gamma, lam, rho_bar, c_bar, *where):
    *at, impl = where
    options = {"gamma": gamma, "lam": lam, "rho_bar": rho_bar, "c_bar": c_bar}
    return _scan("vtrace", (rewards, values, logprobs, old_logprobs), options, At(*at), impl)


def _fake_one(rewards, *args):
    return rewards.new_empty(rewards.shape, dtype=_dtype(rewards, args[-1]))


def _fake_two(rewards, *args):
    return _fake_one(rewards, *args), _fake_one(rewards, *args)


define(
    "gae",
    f"(Tensor rewards, Tensor values, float gamma, float lam, {_AT}) -> (Tensor, Tensor)",
    _gae,
    _fake_two,
    on=ANYWHERE,
)
define(
    "discounted_returns",
    f"(Tensor rewards, float gamma, {_AT}) -> Tensor",
    _discounted_returns,
    _fake_one,
    on=ANYWHERE,
)
define(
    "vtrace",
    "(Tensor rewards, Tensor values, Tensor logprobs, Tensor old_logprobs, float gamma, "
    f"float lam, float rho_bar, float c_bar, {_AT}) -> (Tensor, Tensor)",
    _vtrace,
    _fake_two,
    on=ANYWHERE,
)
