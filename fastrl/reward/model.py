"""QuantizedRewardModel: scores of prompts and completions from a quantized reward model."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrl.kernels import QuantizedWeight, pool_score
from fastrl.reward.backbone import Angles, Batch, Ends, Layer, Observe, Rotary, embed
from fastrl.reward.build import (
    FLOATS,
    QUANTIZED,
    Plan,
    bitsandbytes_layers,
    build_layers,
    calibrate,
    check_activations,
)
from fastrl.reward.checkpoint import Checkpoint, RewardModelError
from fastrl.reward.ensemble import combine
from fastrl.reward.functions import RewardFunction
from fastrl.reward.pairs import Pair, check_pair, encode, pack
from fastrl.reward.saved import check_section, layer_tensors, save, saved_layers, section


class QuantizedRewardModel:
    """Scores of an `AutoModelForSequenceClassification` reward model, quantized or not.

    Llama, Mistral, Qwen2, Qwen3 and Gemma 2 backbones with K scalar heads. Nothing is padded; the
    prompt of pairs that share one is computed once; the last layer computes the query, output
    projection and MLP of the pooled token alone, which is the last token of the pair (the prompt's
    where the completion is empty). Final norm and head are float32 and never quantized.

    With the native CPU kernels and the scheme `int8` a pair has the same score, bit for bit, alone,
    in any batch, with its prompt shared or not, on any number of threads. The same holds for what
    is left in `bf16` or `float32` as long as the number of threads does not change.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[Layer],
        recorded: Mapping[str, Any],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device = "cpu",
        batch_tokens: int = 4096,
        activations: str | None = None,
    ):
        check_activations(activations)
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens} must be at least 1")
        self.config, self.spec, self.source = checkpoint.config, checkpoint.spec, checkpoint.source
        self.layers = list(layers)
        self.recorded = dict(recorded)  # scheme and settings, as `save_pretrained` writes them
        self.scheme: str = self.recorded["scheme"]
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch_tokens = batch_tokens
        self._ends = Ends.read(checkpoint, self.device)
        # Of what lies between layers.
        half = self.device.type == "cuda" or self._ends.embedding.dtype.itemsize == 2
        default = self.scheme if self.scheme in FLOATS else "bf16" if half else "float32"
        self.dtype = FLOATS[activations or default]
        self._rotary = Rotary(checkpoint.config, self.device)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Checkpoint,
        scheme: str | None = None,
        *,
        skip: Sequence[str] = ("score",),
        keep_bf16: Sequence[str] = (),
        smooth: Sequence[Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device = "cpu",
        batch_tokens: int = 4096,
        activations: str | None = None,
        **options: Any,
    ) -> "QuantizedRewardModel":
        """A local directory, hub id or `Checkpoint.of(model)`, quantized a layer at a time.

        A directory that `save_pretrained` wrote is taken as it is, and any setting that would
        change it is an error. For others scheme is `int8` (the default), `nf4`, `int4`, `fp8`, or
        `bf16` or `float32`, which quantize nothing. skip
        names linear layers that stay as they are stored, keep_bf16 those that are held in bf16, by
        patterns for runs of whole parts of their names: `layers.0`, `down_proj`, `layers.*.mlp`.
        smooth is calibration data, texts or token ids: outliers among the channels of activations
        move into the weights before these are quantized (SmoothQuant, 2211.10438). tokenizer
        defaults to the directory's own, where it has one. batch_tokens bounds how many tokens are
        computed at a time. activations is what lies between layers: `bf16`, the default where the
        checkpoint itself is in half precision, on a GPU and with the scheme bf16, or `float32`,
        that of a float32 checkpoint on a CPU and of the scheme float32. options are those of
        `fastrl.kernels.quantize`, as `group` for int4.

        Raises `RewardModelError` for what is not a reward model, a missing or misshapen head, an
        unknown backbone, tensors that are missing, misshapen, NaN or infinite; `ValueError` for an
        unknown scheme, patterns that match no layer, and options that do not fit.
        """
        plan = Plan(scheme or "int8", tuple(skip), tuple(keep_bf16), options)
        plan.check()
        check_activations(activations)
        if smooth is not None and plan.scheme not in QUANTIZED:
            raise ValueError(f"smooth has no use with scheme={scheme!r}: nothing is quantized")
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
        tokenizer = tokenizer or checkpoint.tokenizer()
        at = torch.device(device)
        if checkpoint.saved is not None:
            given = {"skip": plan.skip != ("score",), "keep_bf16": bool(keep_bf16)}
            given |= {"smooth": smooth is not None, **dict.fromkeys(options, True)}
            layers = saved_layers(checkpoint, check_section(checkpoint, scheme, given), at)
            recorded = checkpoint.saved
        else:
            plan.check_patterns(checkpoint.spec.linears())
            calibration = None
            with torch.no_grad():
                if smooth is not None:
                    calibration = calibrate(checkpoint, smooth, tokenizer)
                layers = build_layers(checkpoint, plan, calibration, at)
            recorded = section(plan, None if calibration is None else calibration.tokens)
        return cls(
            checkpoint,
            layers,
            recorded,
            tokenizer=tokenizer,
            device=device,
            batch_tokens=batch_tokens,
            activations=activations,
        )

    @classmethod
    def from_bitsandbytes(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        config: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device = "cpu",
        batch_tokens: int = 4096,
        activations: str | None = None,
    ) -> "QuantizedRewardModel":
        """A reward model that bitsandbytes quantized: NF4, nested or not, or LLM.int8.

        source is a directory, or a state dict together with its config. Its blocks and codes are
        used as they are. The rest is as for `from_pretrained`. Raises `RewardModelError` for a
        quantized score head and for blobs of a wrong shape or with a wrong table.
        """
        check_activations(activations)
        if isinstance(source, Mapping):
            if config is None:
                raise ValueError("source is a state dict, which needs the model's config as well")
            checkpoint = Checkpoint(config, source, "the state dict")
        else:
            checkpoint = Checkpoint.open(source)
        if checkpoint.saved is not None:
            raise RewardModelError(
                f"{checkpoint.source} was quantized by fastrl, not bitsandbytes; use "
                "from_pretrained"
            )
        layers = bitsandbytes_layers(checkpoint, torch.device(device))
        weights = {f"layers.{y.index}.{n}": x.weight for y in layers for n, x in y.linears.items()}
        schemes = {w.scheme for w in weights.values() if isinstance(w, QuantizedWeight)}
        left = [n for n, w in weights.items() if not isinstance(w, QuantizedWeight)]
        return cls(
            checkpoint,
            layers,
            section(Plan("+".join(sorted(schemes)), ("score", *left)), None),
            tokenizer=tokenizer or checkpoint.tokenizer(),
            device=device,
            batch_tokens=batch_tokens,
            activations=activations,
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write a directory that `from_pretrained` and `fastrl score` read, to the same scores.

        It holds the weights as they are held (`nbytes` and little else), Hugging Face's config.json
        with scheme, skip, keep_bf16, options and smoothing in its section quantization_config, and
        the tokenizer. It appears whole or not at all. Raises `ValueError` where something is there
        already, `WriteError` where it cannot be written.
        """
        ends = self._ends
        tensors = {
            "model.embed_tokens.weight": ends.embedding,
            "model.norm.weight": ends.norm,
            "score.weight": ends.head,
        }
        for layer in self.layers:
            tensors |= layer_tensors(layer)
        folder = Path(path).expanduser().absolute()
        save(folder, self.config, self.recorded, tensors, self.tokenizer)

    def fingerprint(self) -> str:
        """Of scheme and weights: the same for models that give the same scores."""
        digest = hashlib.blake2b(f"{self.scheme} {self.dtype} {self.spec}".encode(), digest_size=16)
        for layer in self.layers:
            for name, linear in sorted(layer.linears.items()):
                digest.update(f"{name} {linear.nbytes}".encode() + linear.trace())
        for tensor in (self._ends.norm, self._ends.head):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        ends = self._ends
        linears = sum(x.nbytes for layer in self.layers for x in layer.linears.values())
        return linears + sum(x.nbytes for x in (ends.embedding, ends.norm, ends.head))

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, share_prompts: bool = True
    ) -> Tensor:
        """Scores of B pairs, float32 `[B]`, or `[B, K]` with several heads, on the CPU.

        Both are lists of texts, of token ids, or of conversations (messages with role and content;
        a completion to them may be text), which the tokenizer's chat template renders. Text is
        tokenised as prompt and completion together. share_prompts=False computes every prompt
        again, to the same scores. Raises `ValueError` for pairs that are none of these, without
        tokens or over the model's context, and `RewardModelError` where activations overflow.
        """
        pairs = encode(prompts, completions, self.tokenizer)
        for row, pair in enumerate(pairs):
            try:
                self.check(pair)
            except ValueError as error:
                raise ValueError(f"pair {row}: {error}") from None
        return self.score_pairs(pairs, share_prompts=share_prompts)

    def check(self, pair: Pair) -> None:
        """Raise `ValueError` for a pair that this model cannot score."""
        check_pair(pair, self.spec.vocabulary, self.spec.context)

    @torch.no_grad()
    def score_pairs(self, pairs: Sequence[Pair], *, share_prompts: bool = True) -> Tensor:
        """`score` of token ids that were checked."""
        scores = torch.empty(len(pairs), self.spec.scores)
        for rows, batch in pack(pairs, self.batch_tokens, share_prompts=share_prompts):
            scores[rows] = self._finite(rows, batch)
        return scores.squeeze(1) if self.spec.scores == 1 else scores

    @torch.no_grad()
    def score_tokens(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """What the head makes of every completion token, `[C]` of each pair, or `[C, K]`.

        Each is the score of its pair cut off after that token, and as independent of the batch.
        Of token ids that were checked; raises `RewardModelError` as `score` does.
        """
        scores = [torch.empty(0)] * len(pairs)
        for rows, batch in pack(pairs, self.batch_tokens, every_token=True):
            lengths = [len(pairs[row].completion) for row in rows]
            of_token = [row for row, n in zip(rows, lengths, strict=True) for _ in range(n)]
            found = self._finite(of_token, batch)
            found = found.squeeze(1) if self.spec.scores == 1 else found
            for row, some in zip(rows, found.split(lengths), strict=True):
                scores[row] = some
        return scores

    def _finite(self, rows: Sequence[int], batch: Batch) -> Tensor:
        """`run` on the CPU; raises `RewardModelError` naming the pair whose score is not finite."""
        batch = batch.to(self.device)
        found = self.run(batch).cpu()
        finite = found.isfinite().all(1)
        if not finite.all():
            row = rows[int(finite.logical_not().nonzero()[0])]
            raise RewardModelError(
                f"{self.source}: the score of pair {row} is not finite; "
                f"{self._overflow(batch)} (scheme={self.scheme!r}, activations {self.dtype})"
            )
        return found

    def run(
        self, batch: Batch, *, last_layer: str = "pooled", observe: Observe | None = None
    ) -> Tensor:
        """Scores `[B, K]` of a packed batch; last_layer="all" computes all of its tokens there."""
        x, delta, angles, wide = self._start(batch)
        *layers, last = self.layers
        for layer in layers:
            x, delta = layer(x, delta, batch.layout, angles, wide, observe=observe)
        whole = last_layer == "all"
        pooled = None if whole else batch.pooled
        x, delta = last(x, delta, batch.layout, angles, wide, pooled=pooled, observe=observe)
        at = batch.pooled if whole else torch.arange(len(x), device=x.device)
        return pool_score(x + delta, at, self._ends.norm, self._ends.head, eps=self.spec.eps)

    def _start(self, batch: Batch) -> tuple[Tensor, None, Angles, Tensor | None]:
        """What the first layer takes: states, no delta, angles, on a CPU room for an MLP."""
        x = embed(self._ends.embedding, batch, self.spec, self.dtype)
        angles = self._rotary(batch.layout.positions(len(batch.ids)))
        wide = None if x.is_cuda else x.new_empty(2, len(x), self.spec.intermediate)
        return x, None, angles, wide

    def _overflow(self, batch: Batch) -> str:
        """Where the first value that is not finite appears."""
        x, delta, angles, wide = self._start(batch)
        for i, layer in enumerate(self.layers):
            x, delta = layer(x, delta, batch.layout, angles, wide)
            if not (x + delta).isfinite().all():
                return f"activations overflow in layer {i}"
        return "its head overflows"

    def as_reward_function(
        self,
        *,
        ensemble: str | None = None,
        variance_weight: float = 0.5,
        name: str = "reward_model",
    ) -> RewardFunction:
        """A function `f(prompts, completions, **columns) -> list[float]`, as TRL and recipes take.

        ensemble makes one reward of several heads: `mean`, `worst_case` or `uncertainty`, which is
        `mean - variance_weight * variance`. name is its `__name__`, under which it is logged.
        Raises `ValueError` for several heads without ensemble.
        """
        # What is wrong with it is an error now.
        combine(torch.zeros(0, self.spec.scores).squeeze(1), ensemble, variance_weight)

        def reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
            scores = self.score(prompts, completions)
            return combine(scores, ensemble, variance_weight).tolist()

        reward.__name__ = name
        return reward
