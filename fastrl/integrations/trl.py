"""TRL: what `fastrl.patch("trl")` replaces, and a `rollout_func` on fastrl's engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from fastrl import models
from fastrl.integrations.comparison import Answer, Call, compare, narrowest
from fastrl.integrations.kernels import entropy_of_logits, need_kernel
from fastrl.integrations.patching import Declined, Registration, Replacement
from fastrl.kernels import linear_logprob, linear_sample, logprob_from_logits
from fastrl.models.head import autocast_operands, unwrap
from fastrl.rollout import RolloutEngine, SamplingParams

STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TRAINERS = ("grpo_trainer.GRPOTrainer", "rloo_trainer.RLOOTrainer")


def replacements() -> list[Replacement]:
    """What is replaced, with the originals that ours need."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    chunked = "trl.kernels.chunked_logprob.ChunkedLogProbFunction"
    return [
        Replacement(
            f"{chunked}.apply",
            _chunked(ChunkedLogProbFunction.apply),
            declared=f"{chunked}.forward",
        ),
        # Only here: elsewhere it tells whether TRL's own Triton kernels can be launched.
        Replacement(
            "trl.trainer.utils._use_triton",
            _labelled_tokens_only(utils._use_triton),
            compare=None,
            everywhere=False,
        ),
        Replacement("trl.trainer.utils.selective_log_softmax", selective_log_softmax),
        Replacement("trl.trainer.utils.entropy_from_logits", entropy_from_logits),
        Replacement(
            "trl.trainer.utils.selective_log_softmax_and_entropy",
            selective_log_softmax_and_entropy,
        ),
        *(
            Replacement(
                f"trl.trainer.{trainer}._get_per_token_logps_and_entropies",
                _get_per_token_logps_and_entropies,
                compare=_compare_models,
            )
            for trainer in TRAINERS
        ),
    ]


def registrations() -> list[Registration]:
    return []


def _chunked(original: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's fused lm-head, log-probs without logits, through `linear_logprob`."""

    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = STATISTICS,
    ) -> tuple[Tensor | None, ...]:
        need_kernel("linear_logprob", hidden, weight)
        states, matrix = autocast_operands(hidden, weight)
        head: dict[str, Any] = {
            "bias": bias,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
        }
        out = linear_logprob(
            *(states, matrix, targets),
            temperature=temperature,
            entropy="entropy" in outputs,
            **head,
        )
        given: dict[str, Tensor | None] = dict.fromkeys(STATISTICS)
        given["entropy"] = out.entropy
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:
                # sum p^2 = sum exp(2 z) / (sum exp z)^2, and 2 z are the logits at T / 2
                squared = linear_logprob(
                    states, matrix, targets, temperature=temperature / 2, **head
                )
                given["log_sum_sq_probs"] = squared.lse - 2 * out.lse
            if "mean_logits" in outputs and final_logit_softcapping is None:
                # linear without a softcap, so one row stands for the vocabulary
                row = matrix.mean(0, dtype=torch.float32)
                offset = 0.0 if bias is None else bias.mean(dtype=torch.float32)
                with torch.autocast(hidden.device.type, enabled=False):
                    mean = states.float() @ row + offset
                given["mean_logits"] = mean * (logit_scale / temperature)
            if "is_top1" in outputs and not hidden.is_cuda:
                zeros = torch.zeros_like(targets)
                greedy = linear_sample(
                    states, matrix, seeds=zeros, positions=zeros, temperature=0.0, **head
                )
                given["is_top1"] = greedy.token == targets
            missing = tuple(name for name in outputs if given.get(name, out.logprob) is None)
            if missing:
                theirs = original(
                    *(hidden, weight, bias, targets, temperature, chunk_size),
                    *(final_logit_softcapping, logit_scale, missing),
                )
                given |= {n: theirs[1 + STATISTICS.index(n)] for n in missing}
        return out.logprob, *given.values()

    return apply


def _labelled_tokens_only(original: Callable[[torch.device], bool]) -> Callable[..., bool]:
    """Whether TRL's lm-head drops the tokens without a label first: it always does on a GPU."""

    def _use_triton(device: torch.device) -> bool:
        return original(device) or device.type == "cpu"

    return _use_triton


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    need_kernel("logprob_from_logits", logits)
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, 0)
    logprob = logprob_from_logits(logits, index, temperature=temperature).logprob
    return logprob if row_mask is None else logprob.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return entropy_of_logits(logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    need_kernel("logprob_from_logits", logits)
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, 0)
    logprob, _, entropy = logprob_from_logits(logits, index, temperature=temperature, entropy=True)
    assert entropy is not None
    if not entropy_requires_grad:
        entropy = entropy.detach()
    if row_mask is None:
        return logprob, entropy
    return logprob.masked_fill(row_mask == 0, 0.0), entropy.masked_fill(row_mask == 0, 0.0)


def _get_per_token_logps_and_entropies(
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
    """TRL's per-token log-probs, with the prompt of a group computed once."""
    more: list[object] = [pixel_values, image_grid_thw, num_images, pixel_attention_mask]
    more += [spatial_shapes, num_tiles, image_sizes]
    more += [token_type_ids, mm_token_type_ids, image_position_ids]
    if any(x is not None for x in more):
        raise Declined("a batch with images, or token types, does not share its prompts")
    if compute_aux_loss:
        raise Declined("the load-balancing loss of experts needs the model's own forward")
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


def _check_model(model: nn.Module, sharded: bool) -> None:
    """Raise `Declined` for a model whose parts cannot be called, or that cannot share prompts."""
    inner = unwrap(model)
    if sharded or not isinstance(inner, PreTrainedModel):
        raise Declined(
            f"a model wrapped in {type(model).__name__}, or sharded, is called as a whole"
        )
    try:
        models.check_shared_prefix(model)
        head = models.lm_head(model)
    except ValueError as error:
        raise Declined(str(error)) from None
    for op in ("linear_logprob", "shared_prefix_attention"):
        need_kernel(op, head.weight)


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


def _compare_models(call: Call) -> None:
    """Compare log-probs, entropies and gradients of the first and last trainable parameter."""
    given = call.bound.arguments
    model, trainer = given["model"], given["self"]
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    leaves = dict((trainable[0], trainable[-1])) if trainable and torch.is_grad_enabled() else {}
    if (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        leaves = {}  # that kind of checkpointing has no gradients of chosen tensors
    with _without_dropout(model):
        got = Answer.of(call.answer(call.ours), leaves)  # first: it may decline
        want = Answer.of(call.answer(call.original), leaves)
    with trainer.accelerator.autocast():
        dtype = narrowest(model.parameters())
    scored = given["attention_mask"][:, -given["logits_to_keep"] :] != 0
    compare(call.name, want, got, dtype, scored)


def rollout_func(*, max_rows: int = 256) -> Callable[[list, Any], dict[str, Any]]:
    """A `rollout_func` for TRL's `GRPOTrainer` that samples with `fastrl.rollout.RolloutEngine`.

    It samples in process, on the trainer's own weights, computes the prompt of a group once, and
    takes temperature, top_p, top_k, min_p and max_completion_length from the trainer. The seed of
    each batch is drawn from torch's generator, as Hugging Face's `generate` draws. At most
    `max_rows` completions are decoded at a time. The function returns `prompt_ids`,
    `completion_ids` and `logprobs`, lists of lists, one for each prompt it is given. Raises
    `ValueError` for options of the trainer that the engine does not have, and for prompts with
    images.
    """
    engines: dict[int, RolloutEngine] = {}

    def sample(prompts: list, trainer: Any) -> dict[str, Any]:
        sampling = partial(SamplingParams, **_sampling(trainer))
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        if images is not None:
            raise ValueError("rollout_func does not take prompts with images; leave it out")
        model = trainer.accelerator.unwrap_model(trainer.model)
        if id(model) not in engines:
            engines.clear()
            engines[id(model)] = RolloutEngine(model, trainer._tokenizer, max_rows=max_rows)
        engine = engines[id(model)]
        seed = int(torch.randint(2**62, ()))
        runs = [list(run) for _, run in groupby(range(len(prompts)), prompt_ids.__getitem__)]
        completion_ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        for size in sorted({len(run) for run in runs}):
            groups = [run for run in runs if len(run) == size]
            out = engine.generate([prompt_ids[run[0]] for run in groups], size, sampling(seed=seed))
            seed += 1
            rows = [row for run in groups for row in run]
            for row, ids, values in zip(
                rows, out.completion_lists(), out.logprobs.tolist(), strict=True
            ):
                completion_ids[row], logprobs[row] = ids, values[: len(ids)]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    return sample


def _sampling(trainer: Any) -> dict[str, Any]:
    """What the trainer asks of sampling; `ValueError` for what the engine cannot do."""
    args = trainer.args
    if args.repetition_penalty != 1.0:
        raise ValueError(
            f"repetition_penalty={args.repetition_penalty} is not supported by rollout_func; "
            "set it to 1.0"
        )
    if args.generation_kwargs:
        raise ValueError(
            f"generation_kwargs={args.generation_kwargs} are not supported by rollout_func; set "
            "temperature, top_p, top_k and min_p of the config"
        )
    return {
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k or 0,
        "min_p": trainer.min_p or 0.0,
        "max_new_tokens": trainer.max_completion_length,
        "eos_token_id": tuple(trainer.eos_token_ids),
    }
