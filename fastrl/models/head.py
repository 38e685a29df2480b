"""Where a Hugging Face causal LM ends: its backbone, and what turns hidden states into logits."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LmHead:
    """Logits are `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `linear_logprob` and `linear_sample`."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself; adapters stay in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: nn.Module) -> PreTrainedModel:
    """The part of a causal LM that returns `last_hidden_state`."""
    return unwrap(model).get_decoder()


def lm_head(model: nn.Module) -> LmHead:
    """The lm-head of a causal LM, sharing its parameters.

    Raises `ValueError` for a model without a linear output layer.
    """
    inner = unwrap(model)
    layer = inner.get_output_embeddings()
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise ValueError(f"{type(inner).__name__} has no linear lm-head; fastrl needs a causal LM")
    ends = (layer, inner.get_input_embeddings())
    if any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ValueError(
            "LoRA on the lm-head or the embedding is not supported, as log-probs are computed from "
            "their base weights; leave them out of target_modules"
        )
    config = inner.config
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return LmHead(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=(1.0 if scale is None else scale) / (1.0 if divisor is None else divisor),
    )


@torch.no_grad()
def verify_lm_head(model: nn.Module) -> None:
    """Compare the logits of `lm_head` with the model's own on a few tokens.

    Raises `ValueError` where they differ: the model does something after its backbone that fastrl
    does not know, and training it would optimise the wrong distribution.
    """
    from fastrl.kernels.logprob.reference import project

    inner, head = unwrap(model), lm_head(model)
    ids = torch.arange(min(8, head.weight.shape[0]), device=head.weight.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    expected = inner(input_ids=ids, use_cache=False).logits.float()
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    model.train(was_training)
    got = project(hidden, head.weight, head.bias, head.softcap, head.logit_scale)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    scale = expected.abs().max().clamp(min=1.0)
    if not torch.allclose(got / scale, expected / scale, atol=tolerance):
        raise ValueError(
            f"{type(inner).__name__} changes its logits after the lm-head in a way that "
            f"fastrl does not know "
            f"(largest difference {(got - expected).abs().max().item():.3g})"
        )
