"""`attn_implementation="fastrl"`: Hugging Face models that compute the prompt of a group once.

Importing this module registers it. A packed batch `[1, T]` then runs as

    model(input_ids=ids, position_ids=layout.positions()[None], group_layout=layout)

with a `fastrl.kernels.GroupLayout`; without one, each row of a batch `[B, T]` is a prompt of its
own, which is causal attention.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fastrl.kernels import GroupLayout, shared_prefix_attention
from fastrl.models.head import backbone, unwrap

NAME = "fastrl"
INSTEAD = "use fastrl.models.completion_logprobs, which repeats the prompt for each completion"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# What some families add to their attention, each by the name under which it is passed on.
UNKNOWN = ("s_aux", "sinks", "position_bias", "indices", "block_indices", "cu_seq_lens_q", "cache")


class MaskRule(NamedTuple):
    """What stands where the mask would: a rule instead of `[T, T]` elements.

    Not a tensor, so that no other implementation can take it for a mask.
    """

    window: int | None
    restarts: bool  # positions are not 0 to T - 1; unknown, so false, while compiling


def mask_rule(
    batch_size: int,
    *,
    kv_length: int,
    q_length: int | None = None,
    cache_position: Tensor | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **_: Any,
) -> MaskRule:
    """The mask of `attn_implementation="fastrl"`; raises `ValueError` for what it cannot express.

    That is padding, a KV cache that holds tokens, and masks that are neither causal nor sliding.
    """
    if q_length is None:  # transformers < 5.6
        assert cache_position is not None
        q_length = len(cache_position)
    if q_length != kv_length:
        raise ValueError(
            f"attn_implementation='{NAME}' takes no KV cache, got {q_length} queries for "
            f"{kv_length} keys; generate with another one (model.set_attn_implementation('sdpa'))"
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            f"attn_implementation='{NAME}' takes no padding, but attention_mask has zeros; pack "
            "the rows and pass group_layout, or pad on the right and leave attention_mask out"
        )
    if use_vmap or getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError(
            f"attn_implementation='{NAME}' knows causal and sliding-window masks, not those of "
            f"{type(config).__name__}; {INSTEAD}"
        )
    restarts = not allow_is_causal_skip and not torch.compiler.is_compiling()
    return MaskRule(local_size, restarts)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskRule,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    group_layout: GroupLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of `attn_implementation="fastrl"`, as transformers calls it.

    query `[B, Hq, T, D]`, key and value `[B, Hkv, T, D]`; returns `[B, T, Hq, D]` and no weights.
    With group_layout B is 1 and the T tokens lie as it says. Raises `ValueError` for dropout,
    attention weights, masks other than `mask_rule`'s, positions that do not fit and additions to
    attention that the kernel does not know.
    """
    family = type(module).__name__
    if not isinstance(attention_mask, MaskRule):
        raise ValueError(
            f"attn_implementation='{NAME}' takes no mask of the caller's, but {family} got "
            f"{type(attention_mask).__name__}; leave attention_mask out"
        )
    if dropout:
        raise ValueError(
            f"attn_implementation='{NAME}' has no dropout, but {family} asks for {dropout}; set "
            "config.attention_dropout to 0 before the model is built"
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"attn_implementation='{NAME}' never holds attention weights; load the model with "
            "attn_implementation='eager' for output_attentions"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"attn_implementation='{NAME}' is causal, but {family} is not; {INSTEAD}")
    for name in UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation='{NAME}' does not know {name}, which {family} passes to its "
                f"attention; {INSTEAD}"
            )
    batch, _, steps, _ = query.shape
    layout = _layout(group_layout, batch, steps, attention_mask, query.device)
    q, k, v = (_packed(x) for x in (query, key, value))
    out = shared_prefix_attention(
        q, k, v, layout, scale=scaling, softcap=softcap, window=attention_mask.window
    )
    return out.view(batch, steps, *out.shape[1:]), None


def _packed(x: Tensor) -> Tensor:
    """`[B, H, T, D]` as `[B * T, H, D]`; a view for B = 1."""
    return x[0].transpose(0, 1) if len(x) == 1 else x.transpose(1, 2).flatten(0, 1)


def _layout(
    layout: GroupLayout | None, batch: int, steps: int, rule: MaskRule, device: torch.device
) -> GroupLayout:
    if layout is None:
        if rule.restarts:
            raise ValueError(
                f"attn_implementation='{NAME}' was given position_ids that start again within a "
                "row, and no group_layout; pass fastrl.kernels.GroupLayout of the packed tokens"
            )
        return GroupLayout.of_rows(batch, steps, device)
    if batch != 1:
        raise ValueError(f"a batch with group_layout must be packed to [1, T], got {batch} rows")
    if not rule.restarts and not torch.compiler.is_compiling():
        layout.check(steps)
        positions = layout.positions(steps)
        if not torch.equal(positions, torch.arange(steps, device=positions.device)):
            raise ValueError(
                "position_ids must be group_layout.positions()[None] for a batch with group_layout"
            )
    return layout


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_rule)


def check_shared_prefix(model: nn.Module) -> None:
    """Raise `ValueError` where a model's class or config shows that it cannot share a prompt.

    Every layer must attend through transformers' attention interface and mix tokens nowhere else.
    """
    inner, decoder = unwrap(model), backbone(model)
    config, name = decoder.config, type(inner).__name__
    why = None
    if not getattr(decoder, "_supports_attention_backend", False):
        why = "does not follow transformers' attention interface"
    elif getattr(inner, "_is_stateful", False):
        why = "carries a recurrent state from token to token"
    elif unknown := set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS:
        why = f"has layers of type {', '.join(sorted(unknown))}"
    elif config.sub_configs:
        why = f"has models within its decoder ({', '.join(config.sub_configs)})"
    elif getattr(config, "attention_dropout", 0.0) and model.training:
        why = f"has attention_dropout={config.attention_dropout}"
    if why is not None:
        raise ValueError(f"{name} {why}, so its prompts cannot be shared; {INSTEAD}")


@contextmanager
def shared_attention(model: nn.Module) -> Iterator[None]:
    """`attn_implementation="fastrl"` for the calls inside, whatever the model was loaded with.

    The model is as before when the block ends, by an exception too. Layers that are checkpointed
    inside are recomputed with it, though the block has ended by then. Not for two threads at once.
    Raises `ValueError` as `check_shared_prefix` does.
    """
    check_shared_prefix(model)
    config = backbone(model).config
    if config._attn_implementation == NAME:
        yield
        return
    changed: list[tuple[Any, Callable]] = []
    layer: Any
    try:
        for layer in backbone(model).modules():
            checkpoint = vars(layer).get("_gradient_checkpointing_func")
            if checkpoint is not None:
                changed.append((layer, checkpoint))
                layer._gradient_checkpointing_func = _checkpointing(checkpoint, config)
        with implementation(config, NAME):
            yield
    finally:
        for layer, checkpoint in changed:
            layer._gradient_checkpointing_func = checkpoint


@contextmanager
def implementation(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _checkpointing(checkpoint: Callable, config: Any) -> Callable:
    """`checkpoint` of a layer that runs with our attention, the second time as well."""

    def run(function: Callable, *args: Any) -> Any:
        def layer(*inputs: Any) -> Any:
            with implementation(config, NAME):
                return function(*inputs)

        return checkpoint(layer, *args)

    return run
