"""From a checkpoint to layers, one at a time: which linears are quantized and how, smoothing."""

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrl.kernels import QuantizedWeight, quantize, weight_from_bitsandbytes
from fastrl.reward.backbone import Angles, Batch, Ends, Layer, Rotary, embed
from fastrl.reward.checkpoint import ATTENTION, MLP, Checkpoint, RewardModelError
from fastrl.reward.linear import Linear
from fastrl.reward.pairs import Ids, Pair, check_pair, encode_pair, pack

FLOATS = {"bf16": torch.bfloat16, "float32": torch.float32}
QUANTIZED = ("int8", "nf4", "int4", "fp8")
# The part of a channel's spread that moves from activations to weights (2211.10438).
MIGRATION = 0.5
CALIBRATION_TOKENS = 8192
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Plan:
    """How each linear layer is held. Patterns match runs of whole parts of a name, with `*`."""

    scheme: str
    skip: Sequence[str] = ("score",)
    keep_bf16: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # of fastrl.kernels.quantize

    def check(self) -> None:
        """Raise `ValueError` for an unknown scheme and options that do not fit it."""
        known = (*QUANTIZED, *FLOATS)
        if self.scheme not in known:
            raise ValueError(f"scheme={self.scheme!r} is unknown; use one of {', '.join(known)}")
        if self.scheme in FLOATS and self.options:
            raise ValueError(
                f"scheme={self.scheme!r} quantizes nothing and takes no {', '.join(self.options)}"
            )
        if self.scheme in FLOATS and self.keep_bf16:
            raise ValueError(f"keep_bf16 has no use with scheme={self.scheme!r}")

    def check_patterns(self, names: Collection[str]) -> None:
        """Raise `ValueError` for patterns that match none of the linear layers `names`."""
        for label in ("skip", "keep_bf16"):
            for pattern in getattr(self, label):
                if not any(matches(pattern, n) for n in (*names, "score")):
                    close = difflib.get_close_matches(pattern, [*ATTENTION, *MLP, *names], n=1)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    raise ValueError(f"{label}: {pattern!r} matches no linear layer{hint}")
        if "score" not in self.skip:
            raise ValueError("skip must contain 'score': the score head is never quantized")

    def of(self, name: str) -> str | None:
        """The scheme of a linear layer; None: as the checkpoint stores it."""
        if any(matches(p, name) for p in self.skip):
            return None
        if self.scheme in QUANTIZED and any(matches(p, name) for p in self.keep_bf16):
            return "bf16"
        return self.scheme


def check_activations(name: str | None) -> None:
    """Raise `ValueError` for a dtype that activations cannot have; None is the default."""
    if name is not None and name not in FLOATS:
        raise ValueError(f"activations={name!r} is unknown; use one of {', '.join(FLOATS)}")


def matches(pattern: str, name: str) -> bool:
    """Whether a run of whole parts of `name` is `pattern`: "layers.0", "mlp.*", "down_proj"."""
    return any(fnmatchcase(name, p) for p in (pattern, f"*.{pattern}", f"{pattern}.*")) or (
        fnmatchcase(name, f"*.{pattern}.*")
    )


class Calibration:
    """Token states on their way through the float layers, and the largest input of each channel."""

    def __init__(self, batch: Batch, hidden: Tensor, angles: Angles):
        self.tokens = len(batch.ids)
        self._layout, self._angles = batch.layout, angles
        self._state: tuple[Tensor, Tensor | None] = (hidden, None)

    def advance(self, layer: Layer) -> dict[str, Tensor]:
        """Run the next layer; the absolute maximum `[K]` of each of its linears' inputs."""
        largest: dict[str, Tensor] = {}

        def observe(name: str, x: Tensor) -> None:
            largest[name.split(".", 2)[2]] = x.float().abs().amax(0)

        self._state = layer(*self._state, self._layout, self._angles, observe=observe)
        return largest


def calibrate(
    checkpoint: Checkpoint, texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None
) -> Calibration:
    """Calibration on texts or token ids; raises `ValueError` naming the one that cannot be used."""
    if isinstance(texts, str) or not len(texts):
        raise ValueError("smooth must be a sequence of at least one text or list of token ids")
    used, tokens, known = list[Pair](), 0, dict[str, Ids]()
    for i, text in enumerate(texts):
        try:
            pair = encode_pair(text, "" if isinstance(text, str) else [], tokenizer, known)
            check_pair(pair, checkpoint.spec.vocabulary, checkpoint.spec.context)
        except ValueError as error:
            raise ValueError(f"smooth[{i}]: {error}") from None
        tokens += len(pair.prompt)
        if used and tokens > CALIBRATION_TOKENS:
            break
        used.append(pair)
    _, batch = next(pack(used, LARGEST))
    cpu = torch.device("cpu")
    table = Rotary(checkpoint.config, cpu)
    hidden = embed(Ends.read(checkpoint, cpu).embedding, batch, checkpoint.spec, torch.float32)
    return Calibration(batch, hidden, table(batch.layout.positions(len(batch.ids))))


def build_layers(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Calibration | None,
    device: torch.device,
    on_layer: Callable[[int], None] = lambda _: None,
) -> list[Layer]:
    """All layers of a checkpoint, held as the plan says; one layer is float at a time."""
    layers = []
    for i in range(checkpoint.spec.layers):
        on_layer(i)
        layer = _float_layer(checkpoint, i)
        inputs: dict[str, Tensor] | None = None
        if calibration is not None:
            inputs = calibration.advance(layer)
        layers.append(
            _hold(_smoothed(layer, inputs) if inputs else layer, checkpoint, plan, device)
        )
    return layers


def _float_layer(checkpoint: Checkpoint, index: int) -> Layer:
    spec, linears, prefix = checkpoint.spec, {}, f"layers.{index}."
    for name, shape in spec.linears().items():
        if name.startswith(prefix):
            bias = f"{name}.bias"
            linears[name.removeprefix(prefix)] = Linear(
                checkpoint.get(f"{name}.weight", shape),
                checkpoint.get(bias, shape[:1]).float() if bias in checkpoint else None,
            )
    return Layer(spec, index, linears, layer_norms(checkpoint, index))


def layer_norms(checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
    """What the norms of a layer multiply by, float32."""
    spec = checkpoint.spec
    sizes = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), spec.hidden)
    if spec.sandwich:
        sizes |= dict.fromkeys(
            ("pre_feedforward_layernorm", "post_feedforward_layernorm"), spec.hidden
        )
    if spec.qk_norm:
        sizes |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), spec.head_size)
    return {name: checkpoint.norm(f"layers.{index}.{name}", size) for name, size in sizes.items()}


def _smoothed(layer: Layer, inputs: Mapping[str, Tensor]) -> Layer:
    """The layer with the spread of its inputs' channels moved into its weights.

    `s_j = max|x_j|^a / max|W_j|^(1-a)`: a column of W is multiplied by s_j, and whatever makes x_j,
    a norm or the rows of v and up, divided by it.
    """
    s, norms = layer.spec, dict(layer.norms)
    weights = {
        n: x.weight.float() for n, x in layer.linears.items() if isinstance(x.weight, Tensor)
    }
    into: dict[str, Tensor] = {}  # input scales
    outof: dict[str, Tensor] = {}  # output scales

    def scale(readers: Sequence[str]) -> Tensor:
        columns = torch.stack([weights[n].abs().amax(0) for n in readers]).amax(0)
        ratio = inputs[readers[0]] ** MIGRATION / columns ** (1 - MIGRATION)
        usable = (inputs[readers[0]] > 0) & (columns > 0)
        ratio = torch.where(usable, ratio, 1.0)
        # Only the relative sizes matter; their geometric mean is 1.
        return (ratio.log() - ratio.log().mean()).exp()

    for norm, readers in (
        ("input_layernorm", ATTENTION[:3]),
        ("pre_feedforward_layernorm" if s.sandwich else "post_attention_layernorm", MLP[:2]),
    ):
        by = scale(readers)
        norms[norm] = norms[norm] / by
        into |= dict.fromkeys(readers, by)
    # All query heads that share a key head read the same channels of v.
    by = scale(("self_attn.o_proj",)).view(s.kv_heads, -1, s.head_size).log().mean(1).exp()
    outof["self_attn.v_proj"] = by.flatten()
    share = s.heads // s.kv_heads
    into["self_attn.o_proj"] = by.repeat_interleave(share, dim=0).flatten()
    into["mlp.down_proj"] = outof["mlp.up_proj"] = scale(("mlp.down_proj",))
    linears = {}
    for name, linear in layer.linears.items():
        weight, bias = weights[name], linear.bias
        if name in outof:
            weight = weight / outof[name].unsqueeze(1)
            bias = None if bias is None else bias / outof[name]
        if name in into:
            weight = weight * into[name]
        linears[name] = Linear(weight, bias, into.get(name), outof.get(name))
    return Layer(s, layer.index, linears, norms)


def _hold(layer: Layer, checkpoint: Checkpoint, plan: Plan, device: torch.device) -> Layer:
    def held(name: str, linear: Linear) -> Linear:
        weight, scheme = linear.weight, plan.of(f"layers.{layer.index}.{name}")
        assert isinstance(weight, Tensor)
        kept: Tensor | QuantizedWeight = weight.to(device)
        if scheme in FLOATS:
            kept = weight.to(device, FLOATS[scheme])
            if not kept.isfinite().all():
                raise RewardModelError(
                    f"{checkpoint.source}: layers.{layer.index}.{name}.weight overflows {scheme}"
                )
        elif scheme is not None:
            stored = f"model.layers.{layer.index}.{name}.weight"
            kept = quantize(weight.to(device), scheme, name=stored, **plan.options)
        return Linear(
            kept, *(to(x, device) for x in (linear.bias, linear.input_scale, linear.output_scale))
        )

    return Layer(
        layer.spec,
        layer.index,
        {n: held(n, x) for n, x in layer.linears.items()},
        {n: x.to(device) for n, x in layer.norms.items()},
    )


def to(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)


def bitsandbytes_layers(checkpoint: Checkpoint, device: torch.device) -> list[Layer]:
    """The layers of a checkpoint that bitsandbytes quantized, on its own blocks and codes.

    What it left unquantized stays as it is. Raises `RewardModelError` for tensors of the wrong
    shape, unknown codes and formats.
    """
    spec, layers = checkpoint.spec, []
    for i in range(spec.layers):
        linears = {}
        for name, shape in spec.linears().items():
            if not name.startswith(f"layers.{i}."):
                continue
            bias = f"{name}.bias"
            linears[name.split(".", 2)[2]] = Linear(
                _blob(checkpoint, name, shape, device),
                checkpoint.get(bias, shape[:1]).float().to(device) if bias in checkpoint else None,
            )
        norms = {n: x.to(device) for n, x in layer_norms(checkpoint, i).items()}
        layers.append(Layer(spec, i, linears, norms))
    if not any(isinstance(x.weight, QuantizedWeight) for y in layers for x in y.linears.values()):
        raise RewardModelError(
            f"{checkpoint.source}: bitsandbytes quantized none of its layers; use from_pretrained"
        )
    return layers


def _blob(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], device: torch.device
) -> Tensor | QuantizedWeight:
    parts = checkpoint.parts(name)
    # Not by dtype: bitsandbytes may store its bytes as floats.
    if not any(n == "SCB" or n.startswith("weight.") for n in parts):
        return checkpoint.get(f"{name}.weight", shape).to(device)
    stored = f"model.{name}"
    try:
        weight = weight_from_bitsandbytes(
            {f"{stored}.{n}": x for n, x in parts.items()}, f"{stored}.weight"
        )
    except ValueError as error:
        raise RewardModelError(f"{checkpoint.source}: {error}") from error
    if tuple(weight.shape) != shape:
        raise RewardModelError(
            f"{checkpoint.source}: tensor '{stored}.weight' stands for {tuple(weight.shape)}, the "
            f"config asks for {shape}"
        )
    return weight.to(device)
