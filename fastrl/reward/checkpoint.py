"""A reward model on disk: its config, what the forward needs of it, its tensors, checked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from fastrl.hub import find_model

ROTARY = {
    "llama": LlamaRotaryEmbedding,
    "mistral": MistralRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
    "gemma2": Gemma2RotaryEmbedding,
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ANGLES = 64  # positions whose angles are computed together
METHOD = "fastrl"  # of the quantization section of a config that saved.py wrote
READ = (None, METHOD, "bitsandbytes")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class RewardModelError(ValueError):
    """A checkpoint that is no reward model, or one whose weights or scores cannot be used."""


@dataclass(frozen=True)
class Spec:
    """What a config says of the forward."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    eps: float
    scaling: float  # of attention scores
    softcap: float | None
    windows: tuple[int | None, ...]  # of each layer
    activation: str
    embedding_scale: float
    norm_offset: float  # Gemma's norms multiply by 1 + weight
    sandwich: bool  # Gemma 2 has a norm after attention and after the MLP as well
    qk_norm: bool
    context: int | None
    vocabulary: int
    scores: int  # K

    @classmethod
    def from_config(cls, config: Any) -> "Spec":
        """Raises `RewardModelError` for a config whose forward is not known."""
        family = config.model_type
        if family not in ROTARY:
            raise RewardModelError(
                f"the backbone {family!r} is not known; use one of {', '.join(sorted(ROTARY))}"
            )
        gemma = family == "gemma2"
        rope = config.rope_parameters["rope_type"]
        activation = config.hidden_activation if gemma else config.hidden_act
        for bad, why in (
            (
                rope in ("dynamic", "longrope"),
                f"its {rope} rotary angles depend on the longest row of a batch, so its scores do",
            ),
            (getattr(config, "use_bidirectional_attention", False), "its attention is not causal"),
            (activation not in ACTIVATIONS, f"its activation {activation!r} is not known"),
            (
                config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0,
                "only a part of each head is rotated",
            ),
        ):
            if bad:
                raise RewardModelError(f"this {family} model cannot be scored: {why}")
        head_size = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        layers = config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if family == "mistral":  # has it for all layers
            types = ["sliding_attention"] * layers
        windows = (
            tuple(window if t == "sliding_attention" else None for t in types)
            if types and family != "llama"
            else (None,) * layers
        )
        return cls(
            model_type=family,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=head_size,
            eps=config.rms_norm_eps,
            scaling=(config.query_pre_attn_scalar if gemma else head_size) ** -0.5,
            softcap=config.attn_logit_softcapping if gemma else None,
            windows=windows,
            activation=ACTIVATIONS[activation],
            embedding_scale=config.hidden_size**0.5 if gemma else 1.0,
            norm_offset=1.0 if gemma else 0.0,
            sandwich=gemma,
            qk_norm=family == "qwen3",
            context=getattr(config, "max_position_embeddings", None),
            vocabulary=config.vocab_size,
            scores=config.num_labels,
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """The names of the linear layers, and their output and input sizes."""
        rows, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = ((rows, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, rows))
        mlp = ((self.intermediate, self.hidden),) * 2 + ((self.hidden, self.intermediate),)
        shapes = dict(zip((*ATTENTION, *MLP), (*attention, *mlp), strict=True))
        return {
            f"layers.{i}.{name}": shape
            for i in range(self.layers)
            for name, shape in shapes.items()
        }


class Checkpoint:
    """The tensors of a reward model, read one at a time.

    Names are those of the backbone (`layers.0.mlp.up_proj.weight`) and `score.weight`.
    """

    def __init__(
        self, config: Any, tensors: Mapping[str, Tensor], source: str, folder: Path | None = None
    ):
        """`tensors` may read lazily; `source` names the checkpoint in messages.

        Raises `RewardModelError` where it is not a reward model.
        """
        self.source = source
        self.folder = folder
        self.config = config
        self._tensors = tensors
        section = quantization_section(config)
        method = section.get("quant_method")
        if method not in READ:
            raise RewardModelError(
                f"{source} is quantized by {method!r}, which is not read; give the float "
                "checkpoint that it was made from"
            )
        # What `QuantizedRewardModel.save_pretrained` recorded; None for any other checkpoint.
        self.saved = section if method == METHOD else None
        architectures = getattr(config, "architectures", None) or []
        if "score.weight" not in tensors:
            causal = any("CausalLM" in a for a in architectures)
            what = (
                f"a language model ({', '.join(architectures)}), not a reward model"
                if causal
                else "a reward model without its score head"
            )
            raise RewardModelError(
                f"{source} is {what}: it has no tensor 'score.weight'; a checkpoint of "
                f"AutoModelForSequenceClassification is needed{_elsewhere(folder)}"
            )
        try:
            self.spec = Spec.from_config(config)
        except RewardModelError as error:
            raise RewardModelError(f"{source}: {error}") from None
        self._check_names()
        shape = (self.spec.scores, self.spec.hidden)
        self.get("score.weight", shape)

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """A local Hugging Face directory or hub id, from safetensors alone."""
        folder = _folder(str(path))
        try:
            config = AutoConfig.from_pretrained(folder)
        except (ValueError, OSError, TypeError, AttributeError) as error:  # whatever stands in it
            raise RewardModelError(f"{str(path)!r}: its config cannot be read: {error}") from None
        return cls(config, Safetensors(folder), repr(str(path)), folder)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Checkpoint":
        """A Hugging Face model in memory."""
        return cls(model.config, model.state_dict(), type(model).__name__)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The directory's own, where it has one."""
        if self.folder is None or not any(self.folder.glob("tokenizer*")):
            return None
        return AutoTokenizer.from_pretrained(self.folder)

    def _check_names(self) -> None:
        """No tensor that would change the forward may be there without being used, or missing."""
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.spec.sandwich:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        if self.spec.qk_norm:
            norms += ["self_attn.q_norm", "self_attn.k_norm"]
        linears = self.spec.linears()
        needed = {f"{name}.weight" for name in linears} | {"embed_tokens.weight", "norm.weight"}
        needed |= {f"layers.{i}.{n}.weight" for i in range(self.spec.layers) for n in norms}
        missing = sorted(n for n in needed if n not in self and f"{n}.data" not in self)
        if missing:
            raise RewardModelError(
                f"{self.source}: tensor {'model.' + missing[0]!r} is missing"
                + (f", and {len(missing) - 1} others" if len(missing) > 1 else "")
            )
        # What quantization adds to a weight stands behind its name.
        more = ("bias", "SCB") if self.saved is None else ("bias", "input_scale", "output_scale")
        known = (*needed, *(f"{name}.{part}" for name in linears for part in more))
        whole, parts = (
            set(known),
            tuple(f"{n}." for n in needed) + tuple(f"{name}.weight_format" for name in linears),
        )
        for name in self._tensors:
            bare = name.removeprefix("model.")
            matters = bare.startswith(("layers.", "score.")) and not bare.endswith("inv_freq")
            if matters and bare not in whole | {"score.weight"} and not bare.startswith(parts):
                raise RewardModelError(
                    f"{self.source}: tensor {name!r} has no place in a {self.spec.model_type} "
                    "reward model; scores would be computed without it"
                )

    def _stored(self, name: str) -> str:
        return name if name.startswith("score.") else f"model.{name}"

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._tensors

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of a quantized linear, by what follows its name: `weight.absmax` ..."""
        prefix = self._stored(name) + "."
        return {
            n.removeprefix(prefix): self._tensors[n] for n in self._tensors if n.startswith(prefix)
        }

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor as it is stored.

        Raises `RewardModelError` where it has another shape, is no float or not finite.
        """
        stored = self._stored(name)
        tensor = self._tensors[stored].detach()
        if not tensor.is_floating_point():
            what = (
                "save the model again with its score head left out of quantization"
                if stored == "score.weight"
                else "for weights quantized by bitsandbytes use "
                "QuantizedRewardModel.from_bitsandbytes"
            )
            raise RewardModelError(
                f"{self.source}: tensor {stored!r} is {tensor.dtype}, not a float; {what}"
            )
        if shape is not None and tensor.shape != shape:
            raise RewardModelError(
                f"{self.source}: tensor {stored!r} has shape {tuple(tensor.shape)}, the config "
                f"asks for {tuple(shape)}"
            )
        bad = (~tensor.isfinite()).sum().item()
        if bad:
            raise RewardModelError(
                f"{self.source}: tensor {stored!r} holds {bad} values that are NaN or infinite"
            )
        return tensor

    def norm(self, name: str, size: int) -> Tensor:
        """What a norm multiplies by, `[size]` float32: Gemma's offset is part of it."""
        weight = self.get(f"{name}.weight", (size,)).float()
        return weight if self.saved is not None else weight + self.spec.norm_offset


def quantization_section(config: Any) -> dict[str, Any]:
    """What a config says of quantization, empty where it says nothing."""
    section = getattr(config, "quantization_config", None) or {}
    return section if isinstance(section, dict) else section.to_dict()


class Safetensors(Mapping[str, Tensor]):
    """The tensors in the *.safetensors of a folder, each read when it is asked for."""

    def __init__(self, folder: Path):
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except Exception as error:  # what is no file of theirs has types of its own
                raise RewardModelError(f"{str(path)!r} does not open: {error}") from None
            self._files |= dict.fromkeys(file.keys(), file)
        if not self._files:
            raise RewardModelError(
                f"{str(folder)!r} holds no *.safetensors; other formats are not read, save the "
                "model again with save_pretrained"
            )

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _elsewhere(folder: Path | None) -> str:
    """The classifiers in a folder, which may be a run's, or beside it, which may be its policy."""
    if folder is None:
        return ""
    found = [
        repr(str(config.parent))
        for place in (folder, folder.parent)
        for config in sorted(place.glob("*/config.json"))
        if "ForSequenceClassification" in config.read_text(errors="replace")
    ]
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""


def _folder(path: str) -> Path:
    try:
        found = find_model(path)
    except ValueError as error:
        raise RewardModelError(f"{error}{_elsewhere(Path(path).expanduser())}") from error
    if Path(found).is_dir():
        return Path(found)
    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(found, allow_patterns=patterns))
    except Exception as error:  # no network by now, no access to a file: the hub's own types
        raise RewardModelError(f"model {path!r} cannot be read from the hub: {error}") from error


def rotary(config: Any, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[positions, head size]` float32, as Hugging Face's own module has them.

    Made a few positions at a time, so that those of one do not depend on how many there are: torch
    computes the ends of a tensor, and of a thread's part of it, differently.
    """
    module = ROTARY[config.model_type](config)
    pieces = [
        module(torch.empty(0), torch.arange(i, min(i + ANGLES, positions)).unsqueeze(0))
        for i in range(0, positions, ANGLES)
    ]
    cos, sin = (torch.cat([p[n][0] for p in pieces]) for n in (0, 1))
    return cos, sin
