"""A `rollout_func` for TRL's trainers on fastrl's engine."""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch

from fastrl.rollout import RolloutEngine, SamplingParams


def rollout_func(
    *, max_rows: int = 256, scheme: Literal["int8"] | None = None
) -> Callable[[list, Any], dict[str, Any]]:
    """A `rollout_func` for TRL's `GRPOTrainer` that samples with `fastrl.rollout.RolloutEngine`.

    It samples in process, on the trainer's own weights, computes the prompt of a group once, and
    takes temperature, top_p, top_k, min_p and max_completion_length from the trainer. The seed of
    each batch is drawn from torch's generator, as Hugging Face's `generate` draws. At most
    `max_rows` completions are decoded at a time, with `scheme="int8"` in int8: TRL corrects for
    that only where it samples from vLLM itself. The function returns `prompt_ids`,
    `completion_ids` and `logprobs`, lists of lists, one for each prompt it is given. Raises
    `ValueError` for options of the trainer that the engine does not have, for prompts with images,
    and for a scheme that the model cannot have.
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
            engines[id(model)] = RolloutEngine(
                model, trainer._tokenizer, max_rows=max_rows, scheme=scheme
            )
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
