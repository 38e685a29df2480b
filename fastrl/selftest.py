"""Every op on this machine against its reference: `fastrl doctor --selftest`.

Sizes are odd, some rows are ignored or masked, upstream gradients differ from row to row, and torch
fills fresh buffers with NaN, so that an output nobody writes is seen. An error may be twice that of
the reference in the same dtype, both against the reference in float64, plus 2e-6.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import kernels
from fastrl.kernels import IMPLEMENTATIONS, GroupLayout, native

Values = dict[str, Tensor]
SLACK = 2e-6
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Result:
    """What became of an op's implementation: the worst of its results against what it may be.

    ``wrong`` says what is wrong with it, if anything; ``impl`` is "" where nothing was run.
    """

    op: str
    impl: str
    device: str
    what: str
    error: float
    limit: float
    seconds: float
    wrong: str = ""

    @property
    def verdict(self) -> str:
        return "WRONG" if self.wrong else "right" if self.impl else "untested"


def _upstream(out: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)


def _with_gradients(outputs: Values, leaves: Values) -> Values:
    """The outputs, and the gradients of their sum weighted from row to row."""
    upstream = [_upstream(x) for x in outputs.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    return {**outputs, **{f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}}


def _leaves(inputs: Values, *names: str) -> Values:
    return {name: inputs[name].detach().requires_grad_() for name in names}


# Each check draws its inputs, and runs its op on them with an implementation.
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
    return _with_gradients(out._asdict(), leaves)


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
    schemes = ("int8", "nf4", "int4", "fp8")
    if x["x"].dtype == torch.float64:
        return dict.fromkeys(schemes, x["x"] @ x["weight"].T)
    return {
        scheme: kernels.quantized_linear(
            x["x"], kernels.quantize(x["weight"], scheme), out_dtype=torch.float32, impl=impl
        )
        for scheme in schemes
    }


def _dequantize(x: Values, impl: str) -> Values:
    schemes = ("int8", "nf4", "int4", "fp8")
    if x["x"].dtype == torch.float64:
        return dict.fromkeys(schemes, x["weight"])
    return {s: kernels.dequantize(kernels.quantize(x["weight"], s), impl=impl) for s in schemes}


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


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fresh tensors are full of NaN (integers of their largest value) inside."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def _error(got: Tensor, want: Tensor) -> float:
    """Relative in the 2-norm; for integers, such as tokens, how many differ."""
    if got.shape != want.shape:
        return float("inf")
    if not want.is_floating_point():
        return float((got != want).sum())
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def check(op: str, impl: str, device: torch.device) -> Result:
    """One implementation of an op, in float32 and bf16."""
    began = time.perf_counter()
    draw, run = CHECKS[op]
    worst: tuple[float, float, float, str] = (-1.0, 0.0, 0.0, "nothing")
    try:
        for dtype in DTYPES:
            drawn = {k: v.to(device) for k, v in draw(torch.Generator().manual_seed(0)).items()}
            inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in drawn.items()}
            exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
            truth, reference = run(exact, "reference"), run(inputs, "reference")
            with _poisoned():
                got = run(inputs, impl)
            for name, want in truth.items():
                if want.is_floating_point():
                    limit = 2 * _error(reference[name], want) + SLACK
                else:  # a token depends on the rounding of its dtype
                    want, limit = reference[name], 0.0
                error = _error(got[name], want)
                share = error / (limit + SLACK) if error == error else float("inf")
                if share > worst[0]:
                    worst = share, error, limit, f"{name}, {str(dtype).removeprefix('torch.')}"
    except Exception as failure:  # what raises is broken too, and the others are still checked
        why = f"{type(failure).__name__}: {failure}".splitlines()[0]
        took = time.perf_counter() - began
        return Result(op, impl, str(device), "", float("nan"), 0.0, took, why)
    _, error, limit, what = worst
    wrong = "" if error <= limit else f"{what}: off by {error:.2g}, at most {limit:.2g} is right"
    return Result(op, impl, str(device), what, error, limit, time.perf_counter() - began, wrong)


def check_rollout(device: torch.device) -> Result:
    """A small model's rollouts: the log-probs of their tokens against Hugging Face's forward."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from fastrl.rollout import RolloutEngine, SamplingParams

    began = time.perf_counter()
    config: Any = Qwen3Config(
        vocab_size=151,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    error, limit, wrong = float("nan"), 1e-4, ""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = Qwen3ForCausalLM(config)
        model = model.to(device).eval()
        prompts = [[5, 6, 7, 8, 9], [11, 12, 13]]
        sampling = SamplingParams(max_new_tokens=7, ignore_eos=True)
        with _poisoned():
            out = RolloutEngine(model).generate(prompts, 3, sampling)
        gaps = []
        for row in range(6):
            prompt = prompts[row // 3]
            new = out.completion_ids[row].to(device)
            ids = torch.cat([torch.tensor(prompt, device=device), new])
            with torch.no_grad():
                logp = model(ids[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            want = logp.gather(-1, new[:, None]).squeeze(-1)
            gaps.append((out.logprobs[row].to(device) - want).abs().max())
        error = torch.stack(gaps).max().item()
        if not error <= limit:
            wrong = f"logprobs: off by {error:.2g}, at most {limit:.2g} is right"
    except Exception as failure:
        wrong = f"{type(failure).__name__}: {failure}".splitlines()[0]
    took = time.perf_counter() - began
    return Result("RolloutEngine", "auto", str(device), "logprobs", error, limit, took, wrong)


def run() -> Iterator[Result]:
    """Every implementation of every op that runs here, then rollouts; ends within a minute."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in map(torch.device, devices):
        for op, has in IMPLEMENTATIONS.items():
            if op not in CHECKS:
                yield Result(op, "", str(device), "it has no self-test", 0.0, 0.0, 0.0)
                continue
            fast = [i for i in has if native.unavailable(i, device) is None]
            if device.type == "cpu":  # Triton's interpreter is for tests
                fast = [i for i in fast if i != "triton"]
            for impl in fast or ["reference"]:
                yield check(op, impl, device)
        yield check_rollout(device)
