"""Prompts and demonstrations: read, checked and tokenized before training starts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastrl import installation
from fastrl.reward.reasoning_gym import make_flips, make_problems, make_slips
from fastrl.train import config as cfg
from fastrl.train.mistakes import DataError
from fastrl.train.stages import Reward

# Everything else reaches the reward functions.
RESERVED = ("prompt", "completion", "chosen", "rejected", "ranked")


@dataclass(frozen=True)
class Example:
    """One row: the prompt as given and as ids, and completions with eos where a stage reads them.

    completion_ids is the demonstration, ranked_ids are completions from the best to the worst.
    """

    prompt: Any
    prompt_ids: list[int]
    completion_ids: list[int] | None
    columns: dict[str, Any]
    ranked_ids: list[list[int]] | None = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines or parquet file.

    Raises `DataError` naming the line that is wrong.
    """
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} does not exist")
    if path.suffix == ".parquet":
        try:
            from datasets import load_dataset
        except ImportError:
            raise DataError(
                f"reading {str(path)!r} needs the datasets package: {installation.get('datasets')}"
            ) from None
        rows = [dict(r) for r in load_dataset("parquet", data_files=str(path), split="train")]
    else:
        rows = []
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise DataError(f"{path}, line {number}: not JSON in UTF-8 ({error})") from None
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}, line {number}: must be a JSON object, got {line.strip()[:60]!r}"
                    )
                rows.append(row)
    if not rows:
        raise DataError(f"data file {str(path)!r} is empty; it must hold at least one row")
    return rows


def load_examples(
    config: cfg.Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of a recipe.

    Raises `DataError` for unreadable, empty or incomplete data, for prompts over
    `max_prompt_length`, for demonstrations over `max_completion_length` and for text outside the
    tokenizer's vocabulary.
    """
    if config.data.reasoning_gym is not None:
        gym = config.data.reasoning_gym
        train, held_out = make_problems(
            gym.task, gym.options, gym.size, gym.eval_size, gym.seed, gym.prompt, gym.ranked
        )
        some = config.data.demonstrations
        train = train[:some] + make_slips(train[some:] if some else [], gym.slips, gym.seed)
        train = make_flips(train, gym.flips, gym.seed)
        source, eval_source = f"reasoning_gym {gym.task}", f"reasoning_gym {gym.task} (held out)"
    else:
        assert config.data.train_file is not None
        source, eval_source = str(config.data.train_file), str(config.data.eval_file)
        train = read_rows(config.data.train_file)
        held_out = read_rows(config.data.eval_file) if config.data.eval_file else []
    stages = config.stages.values()
    demonstrations = any(stage.demonstrations for stage in stages)
    rankings = any(stage.rankings for stage in stages)
    last = (config.data.demonstrations or len(train)) if demonstrations else 0
    if any(stage.crowd for stage in stages):
        last = len(train)
    examples = [
        _example(r, f"{source}, row {i}", config, tokenizer, i <= last, rankings)
        for i, r in enumerate(train, 1)
    ]
    held = [
        _example(
            r,
            f"{eval_source}, row {i}",
            config,
            tokenizer,
            demonstrations and "completion" in r,
            rankings and ("chosen" in r or "ranked" in r),
        )
        for i, r in enumerate(held_out, 1)
    ]
    for margin in (s.margin for s in stages if isinstance(s, Reward) and s.margin is not None):
        for i, example in enumerate(examples, 1):
            if not isinstance(example.columns.get(margin), int | float):
                raise DataError(f"{source}, row {i}: the margin column {margin!r} holds no number")
    sizes = {len(e.ranked_ids) for e in examples + held if e.ranked_ids is not None}
    if len(sizes) > 1:
        raise DataError(
            f"{source}: rankings must all be of one length, found {sorted(sizes)} completions"
        )
    return examples, held


def _conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value
    )


def _example(
    row: dict[str, Any],
    where: str,
    config: cfg.Config,
    tokenizer: PreTrainedTokenizerBase,
    demonstration: bool,
    ranking: bool,
) -> Example:
    def column(name: str) -> Any:
        if row.get(name) in (None, "", []):
            raise DataError(
                f"{where}: column {name!r} is missing or empty; it has {', '.join(row) or 'none'}"
            )
        return row[name]

    prompt = column("prompt")
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
    elif _conversation(prompt):
        if tokenizer.chat_template is None:
            raise DataError(
                f"{where}: the prompt is conversational but the tokenizer has no chat template"
            )
        prompt_ids = _chat_ids(tokenizer, prompt, True)
    else:
        raise DataError(
            f"{where}: prompt must be a string or a list of messages, got {str(prompt)[:60]!r}"
        )

    def checked(name: str, text: Any, ids: list[int], limit: int | None) -> list[int]:
        if limit is not None and len(ids) > limit:
            raise DataError(
                f"{where}: the {name} has {len(ids)} tokens, more than "
                f"max_{'prompt' if name == 'prompt' else 'completion'}_length={limit}"
            )
        if _unknown(tokenizer) in ids:
            raise DataError(
                f"{where}: the {name} holds characters that the tokenizer does not know: {text!r}"
            )
        return ids

    def completion(name: str, text: Any) -> list[int]:
        ids = _completion_ids(tokenizer, prompt, prompt_ids, text, f"{where}: {name}")
        return checked(name, text, ids, config.max_completion_length)

    checked("prompt", prompt, prompt_ids, config.max_prompt_length)
    demonstrated = completion("completion", column("completion")) if demonstration else None
    ranked = None
    if ranking:
        if "ranked" in row:
            ranked = [completion(f"ranked[{i}]", t) for i, t in enumerate(column("ranked"))]
            if len(ranked) < 2:
                raise DataError(f"{where}: ranked must hold at least 2 completions")
        else:
            ranked = [completion(name, column(name)) for name in ("chosen", "rejected")]
    columns = {k: v for k, v in row.items() if k not in RESERVED}
    return Example(prompt, prompt_ids, demonstrated, columns, ranked)


def _completion_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    prompt_ids: list[int],
    completion: Any,
    where: str,
) -> list[int]:
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise DataError(
                f"{where} must be a string like prompt, got {type(completion).__name__}"
            )
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        return [*ids, tokenizer.eos_token_id]
    if not _conversation(completion):
        raise DataError(f"{where} must be a list of messages like prompt")
    whole = _chat_ids(tokenizer, prompt + completion, False)
    if whole[: len(prompt_ids)] != prompt_ids:
        raise DataError(f"{where}: the chat template renders the prompt differently with it")
    return whole[len(prompt_ids) :]


def _unknown(tokenizer: PreTrainedTokenizerBase) -> int | None:
    # Tokenizers with one special token for everything have no way to say unknown.
    unknown = tokenizer.unk_token_id
    special = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return None if unknown in special else unknown


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], generation: bool
) -> list[int]:
    rendered: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=generation, return_dict=True
    )
    return rendered["input_ids"]


def check_context(
    examples: list[Example], max_completion_length: int, context: int | None, source: str
) -> None:
    """Raise `DataError` for the first example that leaves no room for its completion."""
    if context is None:
        return
    for i, example in enumerate(examples, 1):
        if len(example.prompt_ids) + max_completion_length > context:
            raise DataError(
                f"{source}, row {i}: the prompt has {len(example.prompt_ids)} tokens and "
                f"max_completion_length is "
                f"{max_completion_length}: more than the model's context of {context}"
            )


def batch_indices(size: int, batch: int, step: int, seed: int) -> list[int]:
    """Rows of step `step`, from a fresh permutation each epoch; a function of its arguments.

    Batches run on across epochs, so that every row is used once per epoch whatever the batch size.
    """
    out: list[int] = []
    position = step * batch
    while len(out) < batch:
        epoch, offset = divmod(position, size)
        order = np.random.default_rng((seed, epoch)).permutation(size)
        chunk = order[offset : offset + batch - len(out)]
        out += chunk.tolist()
        position += len(chunk)
    return out
