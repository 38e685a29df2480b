"""Log-probabilities and sampling: argument checks and the choice of implementation."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.kernels.logprob import reference
from fastrl.kernels.logprob.reference import LogProbs, Samples
from fastrl.kernels.native import choose, module, pointer, threads

# Implementations besides the reference; see fastrl.kernels.native.choose.
HAS: dict[str, tuple[str, ...]] = {
    "linear_logprob": ("cpu",),
    "linear_sample": (),
    "logprob_from_logits": (),
}


def _check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight must be [V, H], got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must end in weight's H={weight.shape[1]}, got shape {tuple(hidden.shape)}"
        )
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V]=[{weight.shape[0]}], got shape {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive, or None for no cap")


def _check_target(target: Tensor, rows: torch.Size, name: str) -> None:
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {target.dtype}")
    if target.shape != rows:
        raise ValueError(f"{name} must have shape {tuple(rows)}, got {tuple(target.shape)}")


def _check_temperature(temperature: float | Tensor, rows: torch.Size) -> None:
    if isinstance(temperature, Tensor):
        if temperature.dim() and temperature.shape != rows:
            raise ValueError(
                f"temperature must be a number or a tensor of shape {tuple(rows)}, "
                f"got shape {tuple(temperature.shape)}"
            )
    elif not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")


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
    impl: str = "auto",
) -> LogProbs:
    """Log-probability of `target` under the lm-head's softmax, with its logsumexp and entropy.

    `z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature`;
    `lse = log sum_v exp z_v`; `logprob = z[target] - lse`; `entropy = lse - sum_v softmax(z)_v
    z_v`.

    hidden `[..., H]` and weight `[V, H]` are bf16, fp16, float32 or float64; target `[...]` is
    int64; bias `[V]`; temperature is a number or `[...]`. Returns `LogProbs` of `[...]` float32
    tensors in nats (float64 for float64 inputs), all differentiable; rows whose target is
    `ignore_index` are 0. Raises `ValueError` for shapes, dtypes or values that do not fit and for
    an unavailable `impl`.
    """
    _check_linear(hidden, weight, bias, softcap)
    _check_target(target, hidden.shape[:-1], "target")
    _check_temperature(temperature, target.shape)
    if impl == "auto" and torch.float64 in (hidden.dtype, weight.dtype):
        impl = "reference"  # float64 is for the truth; no kernel computes in it
    chosen = choose("linear_logprob", impl, hidden.device, HAS["linear_logprob"])
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "reference":
            return reference.linear_logprob(
                hidden,
                weight,
                target.long(),
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                logit_scale=logit_scale,
                ignore_index=ignore_index,
                entropy=entropy,
            )
        _check_kernel(hidden, weight, temperature)
        each = isinstance(temperature, Tensor)
        logprob, lse, spread = torch.ops.fastrl.linear_logprob(
            hidden,
            weight,
            target.long(),
            bias,
            temperature.expand(target.shape) if isinstance(temperature, Tensor) else None,
            1.0 if each else float(temperature),
            softcap or 0.0,
            logit_scale,
            ignore_index,
        )
        return LogProbs(logprob, lse, spread if entropy else None)


def logprob_from_logits(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    impl: str = "auto",
) -> LogProbs:
    """Log-probability of `target` under `softmax(logits / temperature)`.

    logits `[..., V]`; target `[...]` or `[..., K]` int64. Returns `LogProbs`: logprob shaped like
    target, lse and entropy `[...]`, float32, in nats, differentiable. Raises `ValueError` for
    shapes, dtypes or values that do not fit and for an unavailable `impl`.
    """
    choose("logprob_from_logits", impl, logits.device, HAS["logprob_from_logits"])
    rows = logits.shape[:-1]
    _check_target(
        target, rows if target.dim() < logits.dim() else (*rows, target.shape[-1]), "target"
    )
    _check_temperature(temperature, rows)
    with torch.autocast(logits.device.type, enabled=False):
        return reference.logprob_from_logits(
            logits, target.long(), temperature=temperature, entropy=entropy
        )


def _check_kernel(hidden: Tensor, weight: Tensor, temperature: float | Tensor) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16 for a kernel, got {tensor.dtype}; "
                "impl='reference' takes float64"
            )
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise ValueError(
            "temperature requires a gradient, which only impl='reference' gives; detach it"
        )


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
) -> Samples:
    """Draw one token per row from the lm-head's softmax, with its log-probability.

    Gumbel-argmax with noise that is a pure function of (seed, position, vocabulary entry), so a
    row's token does not depend on the rows beside it. Truncation is top-k, then top-p, then min-p;
    temperature 0 is greedy. hidden `[M, H]`, weight `[V, H]`; seeds and positions `[M]` int64.
    Returns `Samples`: token `[M]` int64; logprob `[M]` float32 under the distribution sampled from
    (0 when greedy); untruncated_logprob `[M]` float32 under the untruncated one (at temperature 1
    when greedy). Raises `ValueError` for shapes, dtypes or values that do not fit and for an
    unavailable `impl`.
    """
    choose("linear_sample", impl, hidden.device, HAS["linear_sample"])
    _check_linear(hidden, weight, bias, softcap)
    _check_target(seeds, hidden.shape[:-1], "seeds")
    _check_target(positions, hidden.shape[:-1], "positions")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or positive")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (off) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must lie in [0, 1]")
    with torch.autocast(hidden.device.type, enabled=False):
        return reference.linear_sample(
            hidden,
            weight,
            seeds=seeds.long(),
            positions=positions.long(),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
        )


class _Problem(NamedTuple):
    """The rows that are not ignored, as the kernels read them; tensors are kept alive by it."""

    rows: Tensor
    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    inv_temperature: Tensor
    softcap: float
    logit_scale: float

    def arguments(self):
        """The same as `fastrl._C.linear_args`."""
        c = module()
        kind = {t: getattr(c.Float, str(t).removeprefix("torch.")) for t in _FLOATS}
        return c.linear_args(
            *self.hidden.shape,
            self.weight.shape[0],
            pointer(self.hidden),
            kind[self.hidden.dtype],
            pointer(self.weight),
            kind[self.weight.dtype],
            self.weight.stride(0),
            pointer(self.bias),
            pointer(self.inv_temperature),
            pointer(self.target),
            self.logit_scale,
            self.softcap,
        )


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _problem(
    hidden, weight, target, bias, temperatures, temperature, softcap, logit_scale, ignore_index
) -> _Problem:
    flat = target.reshape(-1)
    rows = torch.nonzero(flat != ignore_index).squeeze(-1)
    flat = flat[rows]
    if len(rows) and not 0 <= int(flat.min()) <= int(flat.max()) < weight.shape[0]:
        raise ValueError(
            f"target must lie in [0, V={weight.shape[0]}) or be ignore_index={ignore_index}, "
            f"got values from {int(flat.min())} to {int(flat.max())}"
        )
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if temperatures is None:
        inverse = torch.full((len(rows),), 1 / temperature)
    else:
        inverse = 1 / temperatures.reshape(-1)[rows].float()
    return _Problem(
        rows,
        hidden.contiguous() if len(rows) == len(hidden) else hidden[rows],
        weight if weight.stride(1) == 1 else weight.contiguous(),
        flat,
        None if bias is None else bias.float().contiguous(),
        inverse.contiguous(),
        softcap,
        logit_scale,
    )


_SETTINGS = (
    "Tensor? temperatures, float temperature, float softcap, float logit_scale, int ignore_index"
)
_library = torch.library.Library("fastrl", "FRAGMENT")
_library.define(
    f"linear_logprob(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_logprob_bwd(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, {_SETTINGS}, "
    "Tensor lse, Tensor entropy, Tensor grad_logprob, Tensor grad_lse, Tensor grad_entropy, "
    "bool[] needed) -> (Tensor, Tensor, Tensor)"
)


def _scatter(values: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Values of the kept rows among zeros."""
    if len(rows) == shape.numel():
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_copy_(0, rows, values).view(shape)


def _forward(hidden, weight, target, bias, *settings):
    problem = _problem(hidden, weight, target, bias, *settings)
    results = [torch.empty(len(problem.rows)) for _ in range(3)]
    if len(problem.rows):
        c = module()
        args = c.linear_logprob_fwd_args(problem.arguments(), *map(pointer, results))
        c.linear_logprob_fwd_cpu(args, threads())
    return tuple(_scatter(r, problem.rows, target.shape) for r in results)


def _backward(hidden, weight, target, bias, *rest):
    *settings, lse, entropy, grad_logprob, grad_lse, grad_entropy, needed = rest
    problem = _problem(hidden, weight, target, bias, *settings)
    rows = problem.rows
    given = [
        g.reshape(-1)[rows].float().contiguous()
        for g in (lse, entropy, grad_logprob, grad_lse, grad_entropy)
    ]
    need_hidden, need_weight, need_bias = needed
    nothing = hidden.new_empty(0)
    grad_hidden = torch.empty_like(problem.hidden) if need_hidden else None
    grad_weight = weight.new_empty(weight.shape) if need_weight else None
    grad_bias = torch.empty(weight.shape[0]) if need_bias else None
    if len(rows):
        c = module()
        gradients = map(pointer, (grad_hidden, grad_weight, grad_bias))
        args = c.linear_logprob_bwd_args(problem.arguments(), *map(pointer, given), *gradients)
        c.linear_logprob_bwd_cpu(args, threads())
    else:
        for gradient in (grad_weight, grad_bias):
            if gradient is not None:
                gradient.zero_()
    if grad_hidden is None:
        whole = nothing
    elif len(rows) == target.numel():
        whole = grad_hidden.view(hidden.shape)
    else:
        whole = hidden.new_zeros(target.numel(), hidden.shape[-1])
        whole = whole.index_copy_(0, rows, grad_hidden).view(hidden.shape)
    return (
        whole,
        weight.new_empty(0) if grad_weight is None else grad_weight,
        nothing.clone() if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _fake_forward(hidden, weight, target, bias, *settings):
    return tuple(hidden.new_empty(target.shape, dtype=torch.float32) for _ in range(3))


def _fake_backward(hidden, weight, target, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-1]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        bias.new_empty(bias.shape) if need_bias else hidden.new_empty(0),
    )


def _setup(ctx, inputs, output):
    hidden, weight, target, bias, temperatures, *settings = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, target, bias, temperatures, lse, entropy)
    ctx.settings = settings


def _autograd(ctx, grad_logprob, grad_lse, grad_entropy):
    hidden, weight, target, bias, temperatures, lse, entropy = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = torch.ops.fastrl.linear_logprob_bwd(
        hidden,
        weight,
        target,
        bias,
        temperatures,
        *ctx.settings,
        lse,
        entropy,
        *(
            lse.new_zeros(lse.shape) if g is None else g
            for g in (grad_logprob, grad_lse, grad_entropy)
        ),
        needed,
    )
    grad_hidden, grad_weight, grad_bias = (
        g if need else None for g, need in zip(gradients, needed, strict=True)
    )
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None, None


for _name, _run, _fake in (
    ("linear_logprob", _forward, _fake_forward),
    ("linear_logprob_bwd", _backward, _fake_backward),
):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"fastrl::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "fastrl::linear_logprob", _autograd, setup_context=_setup, lib=_library
)
