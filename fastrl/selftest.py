"""Every op on this machine against its reference: `fastrl doctor --selftest`.

Torch fills fresh buffers with NaN, so that an output nobody writes is seen. An error may be twice
that of the reference in the same dtype, both against the reference in float64, plus 2e-6.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.kernels import IMPLEMENTATIONS, native
from fastrl.selftest_ops import CHECKS

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
