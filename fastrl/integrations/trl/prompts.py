"""TRL's trainers with the prompt of a group of completions, or of a pair, computed once."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from fastrl import models
from fastrl.integrations.comparison import Answer, Call, compare, narrowest
from fastrl.integrations.kernels import need_kernel
from fastrl.integrations.patching import MISSING, Binding, Declined
from fastrl.models.attention import shared_attention
from fastrl.models.head import unwrap
from fastrl.models.logprobs import Packed, pack_groups

OF_EXPERTS = "the load-balancing loss of experts needs the model's own forward"
PAIR = {"input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


def group_logps(
    self: Any,
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    num_images: list[int] | None = None,
    pixel_attention_mask: Tensor | None = None,
    spatial_shapes: Tensor | None = None,
    num_tiles: list[int] | None = None,
    image_sizes: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    mm_token_type_ids: Tensor | None = None,
    image_position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per-token log-probs of GRPO and RLOO, with the prompt of a group computed once."""
    more: list[object] = [pixel_values, image_grid_thw, num_images, pixel_attention_mask]
    more += [spatial_shapes, num_tiles, image_sizes]
    more += [token_type_ids, mm_token_type_ids, image_position_ids]
    if any(x is not None for x in more):
        raise Declined("a batch with images, or token types, does not share its prompts")
    if compute_aux_loss:
        raise Declined(OF_EXPERTS)
    _check_model(model, self.is_fsdp_enabled)
    rows = len(input_ids)
    completions = input_ids[:, -logits_to_keep:]
    mask = attention_mask[:, -logits_to_keep:].bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise Declined("completions with gaps in their attention mask are not packed")
    prompts = [
        ids[keep].tolist()
        for ids, keep in zip(
            input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep].bool(), strict=True
        )
    ]
    # TRL shuffles the completions of a generation batch: bring those of a prompt together.
    order = sorted(range(rows), key=prompts.__getitem__)
    step = batch_size or rows
    if not all(prompts) or len({tuple(p) for p in prompts}) == rows:
        raise Declined  # nothing to share
    parts = []
    with self.accelerator.autocast():
        for start in range(0, rows, step):
            some = order[start : start + step]
            parts.append(
                models.group_logprobs(
                    model,
                    ([prompts[row] for row in some], completions[some], mask[some]),
                    temperature=self.temperature,
                    entropy=compute_entropy,
                )
            )
    back = torch.tensor(order, device=input_ids.device).argsort()
    logprob = torch.cat([part.logprob for part in parts])[back]
    if not compute_entropy:
        return logprob, None, None
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return logprob, torch.cat(entropies)[back], None


def pair_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """DPO's loss, with the prompt of a pair computed once: the backbones of its models do that."""

    def _compute_loss(
        self: Any, model: nn.Module, inputs: dict[str, Any], return_outputs: bool
    ) -> Any:
        if return_outputs:
            raise Declined  # logits of every token are wanted
        if more := set(inputs) - PAIR:
            raise Declined(f"a batch with {', '.join(sorted(more))} does not share its prompts")
        if self.aux_loss_enabled:
            raise Declined(OF_EXPERTS)
        networks = [model] if self.ref_model is None else [model, self.ref_model]
        for network in networks:
            _check_model(network, self.is_fsdp_enabled)
        packed, at = _pack_pairs(
            inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]
        )
        with ExitStack() as stack:
            for network in networks:
                stack.enter_context(_packed_backbone(network, packed, at))
            return original(self, model, inputs, return_outputs)

    return _compute_loss


def _pack_pairs(
    input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> tuple[Packed, Tensor]:
    """Rows `chosen, rejected`, packed; and where each of their tokens `[B, T]` is in it.

    A completion's last token and the padding are nowhere: nothing reads their states.
    """
    (rows, width), device = input_ids.shape, input_ids.device
    column = torch.arange(width, device=device)
    attended, completion = attention_mask.bool(), completion_mask.bool()
    length, prompt = attended.sum(-1, True), (attended & ~completion).sum(-1, True)
    if not torch.equal(attended, column < length):
        raise Declined("rows that are padded on the left are not packed")
    if not torch.equal(completion, attended & (column >= prompt)) or not prompt.all():
        raise Declined("rows that are not a prompt and a completion are not packed")
    order = torch.arange(rows, device=device).view(2, -1).t().flatten()  # a pair side by side
    ids, length, prompt = input_ids[order], length[order], prompt[order]
    behind = (prompt + column).clamp(max=width - 1)
    packed = pack_groups(
        [row[:n] for row, n in zip(ids.tolist(), prompt.flatten().tolist(), strict=True)],
        ids.gather(1, behind),
        prompt + column < length,
    )
    of_prompt = packed.before.unsqueeze(1) + 1 - prompt
    at = torch.where(column < prompt, of_prompt, packed.starts.unsqueeze(1) - prompt) + column
    return packed, at.masked_fill(column >= length - 1, 0)[order.argsort()]


@contextmanager
def _packed_backbone(model: nn.Module, packed: Packed, at: Tensor) -> Iterator[None]:
    """Inside, the backbone takes packed tokens in place of rows, and gives the states of rows."""
    backbone = models.backbone(model)
    compute = backbone.forward

    @wraps(compute)
    def forward(*, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        tokens = packed.input_ids.shape[1]
        with shared_attention(model):
            out = compute(
                input_ids=packed.input_ids,
                position_ids=packed.layout.positions(tokens).unsqueeze(0),
                group_layout=packed.layout,
                **options,
            )
        # Not by indexing, which sums gradients of a prompt's rows in no order.
        states = out.last_hidden_state[0].index_select(0, at.flatten())
        out.last_hidden_state = states.view(*at.shape, -1)
        return out

    before = vars(backbone).get("forward", MISSING)
    binding = Binding(type(backbone).__name__, backbone, "forward", before, forward)
    binding.write(forward)
    try:
        yield
    finally:
        binding.write(before)


def _check_model(model: nn.Module, sharded: bool) -> None:
    """Raise `Declined` for a model whose parts cannot be called, or that cannot share prompts."""
    inner = unwrap(model)
    if sharded or not isinstance(inner, PreTrainedModel):
        raise Declined(
            f"a model wrapped in {type(model).__name__}, or sharded, is called as a whole"
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise Declined("the virtual tokens of prompt learning are not packed")
    try:
        models.check_shared_prefix(model)
        head = models.lm_head(model)
    except ValueError as error:
        raise Declined(str(error)) from None
    for op in ("linear_logprob", "shared_prefix_attention"):
        need_kernel(op, head.weight)


def compare_logps(call: Call) -> None:
    """Compare log-probs, entropies and gradients of the first and last trainable parameter."""
    given = call.bound.arguments
    model, trainer = given["model"], given["self"]
    leaves = _ends(model, trainer)
    with _without_dropout(model):
        got = Answer.of(call.answer(call.ours), leaves)  # first: it may decline
        want = Answer.of(call.answer(call.original), leaves)
    scored = given["attention_mask"][:, -given["logits_to_keep"] :] != 0
    compare(call.name, want, got, _dtype(model, trainer), scored)


def compare_losses(call: Call) -> None:
    """Compare the loss, log-probs of pairs and the gradients that `compare_logps` does."""
    model, trainer = call.bound.arguments["model"], call.bound.arguments["self"]
    leaves = _ends(model, trainer)
    mode = "train" if trainer.model.training else "eval"
    logged = trainer._metrics, trainer._total_train_tokens

    def answer(function: Callable[..., Any]) -> Answer:
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        loss = call.answer(function)
        names = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
        figures = (torch.tensor(trainer._metrics[mode][name]) for name in names)
        return Answer.of((loss, *figures), leaves)

    try:
        with _without_dropout(model):
            got = answer(call.ours)  # first: it may decline
            want = answer(call.original)
    finally:
        trainer._metrics, trainer._total_train_tokens = logged
    compare(call.name, want, got, _dtype(model, trainer))


def _ends(model: nn.Module, trainer: Any) -> dict[str, Tensor]:
    """The first and last trainable parameter, where gradients of them can be asked for."""
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    # That kind of checkpointing has no gradients of chosen tensors.
    reentrant = (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if not trainable or not torch.is_grad_enabled() or reentrant:
        return {}
    return dict((trainable[0], trainable[-1]))


def _dtype(model: nn.Module, trainer: Any) -> torch.dtype:
    with trainer.accelerator.autocast():
        return narrowest(model.parameters())


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Two ways of computing the same thing draw the same: nothing."""
    active = [m for m in model.modules() if isinstance(m, _DropoutNd) and m.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True
