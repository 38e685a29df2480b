"""Prompts and completions: to token ids, and packed so that a prompt is computed once."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from fastrl.kernels import GroupLayout
from fastrl.reward.backbone import Batch

Ids = tuple[int, ...]


class Pair(NamedTuple):
    """Token ids of a prompt and its completion; together they are what the text tokenises to."""

    prompt: Ids
    completion: Ids


def encode(
    prompts: Sequence[Any], completions: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None
) -> list[Pair]:
    """Each pair as token ids, whatever it is given as; see `encode_pair`.

    Raises `ValueError` for lists of different lengths, and naming the pair that cannot be used.
    """
    if isinstance(prompts, str) or isinstance(completions, str):
        raise ValueError("prompts and completions must be lists, one entry for each pair")
    if len(prompts) != len(completions):
        raise ValueError(
            f"prompts and completions must be of one length, got {len(prompts)} and "
            f"{len(completions)}"
        )
    pairs, known = [], dict[str, Ids]()
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        try:
            pairs.append(encode_pair(prompt, completion, tokenizer, known))
        except ValueError as error:
            raise ValueError(f"pair {i}: {error}") from None
    return pairs


def encode_pair(prompt: Any, completion: Any, tokenizer: Any, known: dict[str, Ids]) -> Pair:
    """A pair of token ids, of texts, or of messages and their answer, as token ids.

    The text of prompt and completion is tokenised as a whole; the prompt is what that and the
    prompt alone begin with, so that both together are the whole text's tokens, and a pair's ids
    depend on nothing but the pair. `known` keeps prompts that were tokenised before. Raises
    `ValueError` for what is none of these.
    """
    if _is_ids(prompt) and _is_ids(completion):
        return Pair(tuple(map(int, prompt)), tuple(map(int, completion)))
    if isinstance(prompt, str) and isinstance(completion, str):
        start, whole, special = prompt, prompt + completion, True
    elif _is_conversation(prompt) and (isinstance(completion, str) or _is_conversation(completion)):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("it is a conversation, but there is no chat template to render it")
        answer: Any = completion
        if isinstance(completion, str):
            answer = [{"role": "assistant", "content": completion}]
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
        special = False  # the template writes them itself
    else:
        raise ValueError(
            "prompt and completion must both be texts, token ids or messages (a completion to "
            f"messages may be text), got {prompt!r:.60} and {completion!r:.60}"
        )
    if tokenizer is None:
        raise ValueError("it is text, but the reward model has no tokenizer; give one, or ids")
    ids = tuple(tokenizer(whole, add_special_tokens=special)["input_ids"])
    if start not in known:
        known[start] = tuple(tokenizer(start, add_special_tokens=special)["input_ids"])
    split = _common(ids, known[start])
    return Pair(ids[:split], ids[split:])


def _is_ids(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 1 and not value.is_floating_point() and value.dtype != torch.bool
    return (
        not isinstance(value, str)
        and isinstance(value, Sequence)
        and all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    )


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    )


def _common(one: Ids, two: Ids) -> int:
    shorter = min(len(one), len(two))
    return next((i for i in range(shorter) if one[i] != two[i]), shorter)


def check_pair(pair: Pair, vocabulary: int, context: int | None) -> None:
    """Raise `ValueError` for a pair without tokens, over the context, or with unknown ids."""
    ids = (*pair.prompt, *pair.completion)
    if not ids:
        raise ValueError("it has no token at all; there is nothing to score")
    if context is not None and len(ids) > context:
        raise ValueError(f"it has {len(ids)} tokens, more than the model's context of {context}")
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"it holds token {wrong}; the model's vocabulary is [0, {vocabulary})")


def pack(
    pairs: Sequence[Pair],
    batch_tokens: int,
    *,
    share_prompts: bool = True,
    every_token: bool = False,
) -> Iterator[tuple[list[int], Batch]]:
    """Rows and their packed batch, of at most `batch_tokens` tokens unless one pair has more.

    Pairs with equal prompts are a group wherever they stand; one that is too large is taken in
    pieces. A row's last token is pooled or, with every_token, all tokens of its completion.
    """
    groups: dict[Any, list[int]] = {}
    for row, pair in enumerate(pairs):
        groups.setdefault(pair.prompt if share_prompts else row, []).append(row)
    batch: list[list[int]] = []
    tokens = 0
    for rows in groups.values():
        piece: list[int] = []
        prompt = len(pairs[rows[0]].prompt)
        for row in rows:
            size = len(pairs[row].completion)
            more = size if piece else prompt + size
            if tokens and tokens + more > batch_tokens:
                if piece:
                    batch.append(piece)
                yield _packed(pairs, batch, every_token)
                batch, piece, tokens = [], [], 0
                more = prompt + size
            piece.append(row)
            tokens += more
        batch.append(piece)
    if batch:
        yield _packed(pairs, batch, every_token)


def _packed(
    pairs: Sequence[Pair], groups: Sequence[Sequence[int]], every_token: bool
) -> tuple[list[int], Batch]:
    layout = GroupLayout.from_lengths(
        [len(pairs[g[0]].prompt) for g in groups],
        [[len(pairs[row].completion) for row in g] for g in groups],
    )
    ids = [
        t
        for g in groups
        for part in (pairs[g[0]].prompt, *(pairs[r].completion for r in g))
        for t in part
    ]
    pooled, at = list[int](), 0
    for g in groups:
        at += len(pairs[g[0]].prompt)
        end_of_prompt = at - 1
        for row in g:
            start, at = at, at + len(pairs[row].completion)
            last = at - 1 if pairs[row].completion else end_of_prompt
            pooled += range(start, at) if every_token else [last]
    rows = [row for g in groups for row in g]
    return rows, Batch(torch.tensor(ids), layout, torch.tensor(pooled, dtype=torch.int64))
