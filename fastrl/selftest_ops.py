"""What `fastrl doctor --selftest` runs: for each op, inputs drawn and the op's results on them.

Sizes are odd, some rows are ignored or masked, and upstream gradients differ from row to row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrl import kernels
from fastrl.kernels import GroupLayout

Values = dict[str, Tensor]
SCHEMES = ("int8", "nf4", "int4", "fp8")


def _upstream(out: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)


def _with_gradients(outputs: Values, leaves: Values) -> Values:
    """The outputs, and the gradients of their sum weighted from row to row."""
    upstream = [_upstream(x) for x in outputs.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    return {**outputs, **{f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}}


def _leaves(inputs: Values, *names: str) -> Values:
    return {name: inputs[name].detach().requires_grad_() for name in names}


def _draw_head(g: torch.Generator) -> Values:
    target = torch.randint(1003, (17,), generator=g)
    target[[2, 16]] = -100
    return {
        "hidden": torch.randn(17, 67, generator=g),
        "weight": torch.randn(1003, 67, generator=g) / 4,
        "bias": torch.randn(1003, generator=g),
        "target": target,
    }


def _linear_logprob(x: Values, impl: str) -> Values:
    leaves = _leaves(x, "hidden", "weight", "bias")
    options = {"bias": leaves["bias"], "temperature": 0.7, "softcap": 30.0, "entropy": True}
    out = kernels.linear_logprob(
        leaves["hidden"], leaves["weight"], x["target"], impl=impl, **options
    )
    found = _with_gradients(out._asdict(), leaves)
    options["bias"] = x["bias"]
    frozen = kernels.linear_logprob(
        leaves["hidden"], x["weight"], x["target"], impl=impl, **options
    ).logprob
    of_hidden = torch.autograd.grad(frozen, leaves["hidden"], _upstream(frozen))[0]
    return {**found, "grad hidden, weight frozen": of_hidden}


def _draw_logits(g: torch.Generator) -> Values:
    logits = 3 * torch.randn(17, 1003, generator=g)
    logits[3, 5] = 80.0
    return {"logits": logits, "target": torch.randint(1003, (17,), generator=g)}


def _logprob_from_logits(x: Values, impl: str) -> Values:
    leaves = _leaves(x, "logits")
    out = kernels.logprob_from_logits(leaves["logits"], x["target"], entropy=True, impl=impl)
    return _with_gradients(out._asdict(), leaves)


def _linear_sample(x: Values, impl: str) -> Values:
    rows = torch.arange(len(x["hidden"]), device=x["hidden"].device)
    found: Values = {}
    for name, options in (("", {}), (" top-k, top-p", {"top_k": 40, "top_p": 0.9})):
        out = kernels.linear_sample(
            x["hidden"], x["weight"], seeds=rows, positions=rows + 3, impl=impl, **options
        )
        found |= {f"token{name}": out.token, f"logprob{name}": out.logprob}
    return found


def _draw_attention(g: torch.Generator) -> Values:
    layout = GroupLayout.from_lengths([17, 5], [[3, 1, 33], [9]])
    tokens = int(layout.offsets[-1])
    heads = {"q": 4, "k": 2, "v": 2}
    inputs = {name: torch.randn(tokens, n, 40, generator=g) for name, n in heads.items()}
    return {**inputs, "offsets": layout.offsets, "groups": layout.groups}


def _shared_prefix_attention(x: Values, impl: str) -> Values:
    leaves = _leaves(x, "q", "k", "v")
    layout = GroupLayout(x["offsets"], x["groups"])
    out = kernels.shared_prefix_attention(*leaves.values(), layout, impl=impl)
    assert isinstance(out, Tensor)
    return _with_gradients({"out": out}, leaves)


def _draw_layers(g: torch.Generator) -> Values:
    inputs = {name: torch.randn(17, 3, 38, generator=g) for name in ("x", "residual")}
    angles = torch.rand(17, 19, generator=g) * 6
    return {**inputs, "weight": torch.rand(38, generator=g) + 0.5, "angles": angles}


def _rmsnorm(x: Values, impl: str) -> Values:
    leaves = _leaves(x, "x", "weight", "residual")
    y, h = kernels.rmsnorm(**leaves, impl=impl)
    return _with_gradients({"y": y, "h": h}, leaves)


def _rope(x: Values, impl: str) -> Values:
    leaves = _leaves(x, "x", "weight")
    angles = x["angles"] if x["x"].dtype == torch.float64 else x["angles"].float()
    out = kernels.rope(
        leaves["x"], angles.cos(), angles.sin(), norm_weight=leaves["weight"], impl=impl
    )
    return _with_gradients({"y": out}, leaves)


def _glu(x: Values, impl: str) -> Values:
    leaves = _leaves(x, "x", "residual")
    found: Values = {}
    for activation in ("silu", "gelu_tanh"):
        out = kernels.glu(*leaves.values(), activation=activation, impl=impl)
        results = _with_gradients({"y": out}, leaves)
        found |= {f"{activation} {name}": value for name, value in results.items()}
    return found


def _draw_scan(g: torch.Generator) -> Values:
    names = ("rewards", "values", "logprobs", "old_logprobs")
    tokens = {name: torch.randn(5, 333, generator=g) for name in names}
    return {**tokens, "mask": torch.rand(5, 333, generator=g) < 0.8}


def _gae(x: Values, impl: str) -> Values:
    out = kernels.gae(x["rewards"], x["values"], gamma=0.97, lam=0.9, mask=x["mask"], impl=impl)
    return dict(zip(("advantages", "returns"), out, strict=True))


def _discounted_returns(x: Values, impl: str) -> Values:
    out = kernels.discounted_returns(x["rewards"], gamma=0.97, mask=x["mask"], impl=impl)
    return {"returns": out}


def _vtrace(x: Values, impl: str) -> Values:
    tokens = (x[name] for name in ("rewards", "values", "logprobs", "old_logprobs"))
    out = kernels.vtrace(*tokens, gamma=0.97, mask=x["mask"], impl=impl)
    return dict(zip(("vs", "advantages"), out, strict=True))


def _draw_quant(g: torch.Generator) -> Values:
    return {
        "x": torch.randn(17, 131, generator=g),
        "up": torch.randn(17, 131, generator=g),
        "norm": torch.rand(131, generator=g) + 0.5,
        "weight": torch.randn(67, 131, generator=g),
        "last": torch.tensor([16, 0, 7]),
    }


def _rows(rows: Any) -> Values:
    return {"rows": rows.data * rows.scale.unsqueeze(-1)}


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


# Of what quantizes, the truth is what would come out without it: float64 is not quantized.
def _quantize_rows(x: Values, impl: str) -> Values:
    if x["x"].dtype == torch.float64:
        return {"rows": x["x"]}
    return _rows(kernels.quantize_rows(x["x"], impl=impl))


def _rmsnorm_quant(x: Values, impl: str) -> Values:
    if x["x"].dtype == torch.float64:
        total = x["x"] + x["up"]
        return {"rows": _norm(total, x["norm"]), "residual": total}
    rows, residual = kernels.rmsnorm_quant(x["x"], x["norm"], residual=x["up"], impl=impl)
    return {**_rows(rows), "residual": residual}


def _glu_quant(x: Values, impl: str) -> Values:
    if x["x"].dtype == torch.float64:
        return {"rows": torch.nn.functional.silu(x["x"]) * x["up"]}
    return _rows(kernels.glu_quant(x["x"], x["up"], impl=impl))


def _pool_score(x: Values, impl: str) -> Values:
    if x["x"].dtype == torch.float64:
        return {"scores": _norm(x["x"][x["last"]], x["norm"]) @ x["weight"].T}
    return {"scores": kernels.pool_score(x["x"], x["last"], x["norm"], x["weight"], impl=impl)}


def _quantized_linear(x: Values, impl: str) -> Values:
    if x["x"].dtype == torch.float64:
        return dict.fromkeys(SCHEMES, x["x"] @ x["weight"].T)
    return {
        scheme: kernels.quantized_linear(
            x["x"], kernels.quantize(x["weight"], scheme), out_dtype=torch.float32, impl=impl
        )
        for scheme in SCHEMES
    }


def _dequantize(x: Values, impl: str) -> Values:
    if x["x"].dtype == torch.float64:
        return dict.fromkeys(SCHEMES, x["weight"])
    return {s: kernels.dequantize(kernels.quantize(x["weight"], s), impl=impl) for s in SCHEMES}


CHECKS: dict[str, tuple[Callable, Callable]] = {
    "linear_logprob": (_draw_head, _linear_logprob),
    "logprob_from_logits": (_draw_logits, _logprob_from_logits),
    "linear_sample": (_draw_head, _linear_sample),
    "shared_prefix_attention": (_draw_attention, _shared_prefix_attention),
    "rmsnorm": (_draw_layers, _rmsnorm),
    "rope": (_draw_layers, _rope),
    "glu": (_draw_layers, _glu),
    "gae": (_draw_scan, _gae),
    "discounted_returns": (_draw_scan, _discounted_returns),
    "vtrace": (_draw_scan, _vtrace),
    "quantize_rows": (_draw_quant, _quantize_rows),
    "rmsnorm_quant": (_draw_quant, _rmsnorm_quant),
    "glu_quant": (_draw_quant, _glu_quant),
    "pool_score": (_draw_quant, _pool_score),
    "quantized_linear": (_draw_quant, _quantized_linear),
    "dequantize": (_draw_quant, _dequantize),
}
