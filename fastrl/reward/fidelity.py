"""fidelity_report: what quantization did to a reward model's ranking of completions."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from fastrl.losses import grpo_advantages
from fastrl.reward.build import FLOATS
from fastrl.reward.linear import Rows
from fastrl.reward.model import QuantizedRewardModel
from fastrl.reward.pairs import encode, pack
from fastrl.reward.ranks import kendall_tau, spearman

# Margins of the reference in units of its standard deviation within a prompt.
BUCKETS = (0.0, 0.1, 0.25, 0.5, 1.0, math.inf)
OUTLIER_DB = 6.0  # below the median of all layers: a quarter of its signal to noise
SAMPLE_TOKENS = 16384  # of the layers' signal to noise


@dataclass(frozen=True)
class Flips:
    """Pairs of completions whose margin, in within-prompt standard deviations, lies in a bucket."""

    low: float
    high: float
    pairs: int
    flipped: float  # share that the quantized model ranks the other way round, ties half


@dataclass(frozen=True)
class Fidelity:
    """How far a quantized model's scores keep the reference's ranking within each prompt.

    Means are over groups in which the reference's scores differ. `noise` is the standard deviation
    of the scores' differences, each group's mean removed (a shift common to a group changes no
    ranking); `spread` that of the reference's scores within groups. `best_of` gives for each n the
    share of groups' first n completions whose best is the same. `layers` gives signal to noise, in
    decibels, of each quantized linear layer's output on the reference's own inputs; `keep_bf16`
    those that are far below the others.
    """

    scheme: str
    groups: int
    completions: int
    kendall: float
    spearman: float
    flips: tuple[Flips, ...]
    best_of: dict[int, float]
    advantage_cosine: float
    noise: float
    spread: float
    noise_to_spread: float
    layers: dict[str, float]
    keep_bf16: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Write everything as JSON; what has no value (NaN, infinity) becomes null."""
        text = json.dumps(_finite(asdict(self)), indent=2, allow_nan=False)
        Path(path).write_text(text + "\n")

    def table(self) -> Table:
        """The figures, for a rich console."""
        table = Table("", self.scheme, title=f"fidelity over {self.groups} prompts")
        rows = {
            "Kendall tau within prompt": f"{self.kendall:.4f}",
            "Spearman within prompt": f"{self.spearman:.4f}",
            "cosine of GRPO advantages": f"{self.advantage_cosine:.5f}",
            "noise / within-prompt spread": f"{self.noise_to_spread:.4f}",
        }
        rows |= {f"same best of {n}": f"{share:.1%}" for n, share in self.best_of.items()}
        for f in self.flips:
            rows[f"flipped, margin {f.low:g} to {f.high:g} sd"] = f"{f.flipped:.2%} of {f.pairs}"
        for name, value in rows.items():
            table.add_row(name, value)
        for name in sorted(self.layers, key=self.layers.__getitem__)[:3]:
            table.add_row(f"signal to noise of {name}", f"{self.layers[name]:.1f} dB")
        table.add_row("proposed keep_bf16", ", ".join(self.keep_bf16) or "none")
        return table

    def plot(self, path: str | Path) -> None:
        """Flip rate by margin, and signal to noise by layer, as an image."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        shown = [f for f in self.flips if f.pairs]
        left.bar([f"{f.low:g} to {f.high:g}" for f in shown], [100 * f.flipped for f in shown])
        left.set_xlabel("margin of the reference (standard deviations within prompt)")
        left.set_ylabel("pairs ranked the other way round (%)")
        left.set_title(f"{self.scheme}: Kendall tau {self.kendall:.3f}")
        for kind in dict.fromkeys(n.split(".", 2)[2] for n in self.layers):
            named = {int(n.split(".")[1]): v for n, v in self.layers.items() if n.endswith(kind)}
            right.plot(list(named), list(named.values()), marker="o", label=kind)
        if self.layers:
            right.legend(fontsize="small")
        right.set_xlabel("layer")
        right.set_ylabel("signal to noise (dB)")
        figure.savefig(path)


def fidelity_report(
    quantized: QuantizedRewardModel,
    reference: QuantizedRewardModel,
    groups: Sequence[Mapping[str, Any]],
) -> Fidelity:
    """Compare the rankings of two models of one checkpoint.

    reference is the model with scheme `float32` (or `bf16`). groups are `{"prompt": ...,
    "completions": [...]}` with at least two completions each, as `score` takes them. Of several
    heads the mean is ranked. Raises `ValueError` for groups that are empty or too small, models
    that do not belong together and a reference that is itself quantized.
    """
    _check(quantized, reference, groups)
    prompts = [g["prompt"] for g in groups for _ in g["completions"]]
    completions = [c for g in groups for c in g["completions"]]
    sizes = [len(g["completions"]) for g in groups]
    got, want = (_split(m.score(prompts, completions), sizes) for m in (quantized, reference))
    report = compare(got, want, quantized.scheme)
    layers = signal_to_noise(quantized, reference, prompts, completions)
    return _with_layers(report, layers)


def compare(
    got: Sequence[np.ndarray], want: Sequence[np.ndarray], scheme: str = "quantized"
) -> Fidelity:
    """The report on scores alone: for each group those of the quantized model and the reference."""
    told = [(g, w) for g, w in zip(got, want, strict=True) if np.ptp(w) > 0]
    if not told:
        raise ValueError("the reference gives all completions of each prompt one score; no ranking")
    spread = math.sqrt(_pooled([w for _, w in told]))
    noise = math.sqrt(_pooled([g - w for g, w in told]))
    largest = max(len(w) for _, w in told)
    return Fidelity(
        scheme=scheme,
        groups=len(told),
        completions=sum(len(w) for _, w in told),
        # A constant group of the quantized model has lost its ranking: 0.
        kendall=float(np.mean([np.nan_to_num(kendall_tau(g, w)) for g, w in told])),
        spearman=float(np.mean([np.nan_to_num(spearman(g, w)) for g, w in told])),
        flips=_flips(told),
        best_of={n: _same_best(told, n) for n in (2, 4, 8, 16, 32, 64, 128) if n <= largest},
        advantage_cosine=_cosine(told),
        noise=noise,
        spread=spread,
        noise_to_spread=noise / spread,
        layers={},
        keep_bf16=(),
    )


@torch.no_grad()
def signal_to_noise(
    quantized: QuantizedRewardModel,
    reference: QuantizedRewardModel,
    prompts: Sequence[Any],
    completions: Sequence[Any],
) -> dict[str, float]:
    """Of each quantized linear layer, `10 log10(sum y^2 / sum (y' - y)^2)` in decibels.

    y is the reference's output and y' the quantized layer's, of the same input, which is the
    reference's own: what one layer does by itself, without the errors of those before it.
    """
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    mine = {
        f"layers.{y.index}.{n}": (x, y.linears[n])
        for y in reference.layers
        for n, x in quantized.layers[y.index].linears.items()
    }

    def observe(name: str, x: Tensor) -> None:
        ours, theirs = mine[name]
        want = theirs(Rows(x, None), torch.float32)
        given = x.float() if ours.input_scale is None else x.float() / ours.input_scale
        found = ours(Rows(given, None), torch.float32)
        found = found if ours.output_scale is None else found * ours.output_scale
        signal[name] = signal.get(name, 0.0) + want.double().square().sum().item()
        noise[name] = noise.get(name, 0.0) + (found - want).double().square().sum().item()

    tokens = 0
    pairs = encode(prompts, completions, reference.tokenizer)
    for _, batch in pack(pairs, reference.batch_tokens):
        reference.run(batch.to(reference.device), last_layer="all", observe=observe)
        tokens += len(batch.ids)
        if tokens >= SAMPLE_TOKENS:
            break
    return {
        name: 10 * math.log10(signal[name] / noise[name]) if noise[name] else math.inf
        for name in signal
    }


def _check(quantized: Any, reference: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    for name, model in (("quantized", quantized), ("reference", reference)):
        if not isinstance(model, QuantizedRewardModel):
            raise ValueError(f"{name} must be a QuantizedRewardModel, got {type(model).__name__}")
    if reference.scheme not in FLOATS:
        raise ValueError(
            f"reference has scheme={reference.scheme!r}; it must be one of {', '.join(FLOATS)}"
        )
    if quantized.spec != reference.spec:
        raise ValueError(
            f"quantized ({quantized.source}) and reference ({reference.source}) have two shapes"
        )
    if not groups:
        raise ValueError("groups is empty; it must hold at least one prompt with its completions")
    for i, group in enumerate(groups):
        if not {"prompt", "completions"} <= group.keys() or len(group["completions"]) < 2:
            raise ValueError(
                f"groups[{i}] must have a prompt and at least two completions, got {group!r:.80}"
            )


def _split(scores: Tensor, sizes: Sequence[int]) -> list[np.ndarray]:
    flat = scores if scores.dim() == 1 else scores.mean(1)
    return np.split(flat.double().numpy(), np.cumsum(sizes)[:-1])


def _pooled(groups: Sequence[np.ndarray]) -> float:
    """The variance within groups."""
    return float(np.mean(np.concatenate([(x - x.mean()) ** 2 for x in groups])))


def _flips(told: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Flips, ...]:
    margins, wrong = [], []
    for got, want in told:
        i, j = np.triu_indices(len(want), 1)
        margin = (want[i] - want[j]) / want.std()
        found = np.sign(got[i] - got[j]) * np.sign(margin)
        ranked = margin != 0
        margins.append(np.abs(margin[ranked]))
        wrong.append(((1 - found) / 2)[ranked])
    margin, share = np.concatenate(margins), np.concatenate(wrong)
    out = []
    for low, high in pairwise(BUCKETS):
        inside = (margin >= low) & (margin < high)
        count = int(inside.sum())
        out.append(Flips(low, high, count, float(share[inside].mean()) if count else 0.0))
    return tuple(out)


def _same_best(told: Sequence[tuple[np.ndarray, np.ndarray]], n: int) -> float:
    large = [(g[:n], w[:n]) for g, w in told if len(w) >= n]
    # The reference's score of the one that the quantized model picks: ties are as good.
    return float(np.mean([w[g.argmax()] == w.max() for g, w in large]))


def _cosine(told: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of all advantages together, as a policy gradient step would use them."""
    got, want = (
        torch.cat([grpo_advantages(torch.from_numpy(pair[side]), len(pair[side])) for pair in told])
        for side in (0, 1)
    )
    return float(torch.nn.functional.cosine_similarity(got, want, dim=0))


def _with_layers(report: Fidelity, layers: dict[str, float]) -> Fidelity:
    finite = [v for v in layers.values() if math.isfinite(v)]
    limit = float(np.median(finite)) - OUTLIER_DB if finite else -math.inf
    proposed = tuple(sorted((n for n, v in layers.items() if v < limit), key=layers.__getitem__))
    return Fidelity(**{**vars(report), "layers": layers, "keep_bf16": proposed})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
