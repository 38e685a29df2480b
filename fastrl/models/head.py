"""Where a Hugging Face causal LM ends: its backbone, and what turns hidden states into logits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

P = ParamSpec("P")
R = TypeVar("R")


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


def autocast_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a linear layer would multiply: both in autocast's dtype where it is on."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself; adapters stay in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: nn.Module) -> PreTrainedModel:
    """The part of a causal LM that returns `last_hidden_state`."""
    return unwrap(model).get_decoder()


def as_forward(
    function: Callable[Concatenate[nn.Module, P], R],
) -> Callable[Concatenate[nn.Module, P], R]:
    """`function(model, ...)`, which calls parts of a model, for models under FSDP2 as well.

    What `fully_shard(model)` left in the model's own group is gathered only inside its forward,
    which goes on where such a function calls another.
    """

    @wraps(function)
    def run(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> R:
        if not dist.is_available() or not isinstance(model, FSDPModule):
            return function(model, *args, **kwargs)
        if "fastrl_compute" in model.__dict__:
            return function(model, *args, **kwargs)
        results = []

        def compute() -> R:
            results.append(function(model, *args, **kwargs))
            return results[0]

        object.__setattr__(model, "fastrl_compute", compute)
        try:
            register_fsdp_forward_method(model, "fastrl_compute")
            model.__dict__["fastrl_compute"]()
        finally:
            del model.__dict__["fastrl_compute"]
        return results[0]  # not rounded to the policy's output_dtype

    return run


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
    if dist.is_available() and isinstance(layer, FSDPModule):
        # Its own forward leaves it gathered, and FSDP2 would not reduce the gradient made here.
        layer.reshard()
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
@as_forward
def verify_lm_head(model: nn.Module) -> None:
    """Compare the logits of `lm_head` with the model's own on a few tokens.

    Raises `ValueError` where they differ: the model does something after its backbone that fastrl
    does not know, and training it would optimise the wrong distribution.
    """
    from fastrl.kernels.logprob.parallel import whole
    from fastrl.kernels.logprob.reference import project

    inner, head = unwrap(model), lm_head(model)
    ids = torch.arange(min(8, head.weight.shape[0]), device=head.weight.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    weight, bias = whole("weight", head.weight), whole("bias", head.bias)
    got = project(hidden, weight, bias, head.softcap, head.logit_scale)
    # Last, as FSDP2 may drop what it gathered at the end of the model's own forward.
    expected = inner(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    scale = expected.abs().max().clamp(min=1.0)
    if not torch.allclose(got / scale, expected / scale, atol=tolerance):
        raise ValueError(
            f"{type(inner).__name__} changes its logits after the lm-head in a way that "
            f"fastrl does not know "
            f"(largest difference {(got - expected).abs().max().item():.3g})"
        )
