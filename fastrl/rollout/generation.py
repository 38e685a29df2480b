"""The loop of sampling: draw a token for each row, see which rows end, go on with the others."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrl.kernels import Samples, linear_sample
from fastrl.models.head import LmHead
from fastrl.rollout.sampling import Group, GroupStop, SamplingParams

REASONS = ("length", "stop", "pruned")
LENGTH, STOP, PRUNED = range(len(REASONS))


class Rows(Protocol):
    """Rows that decode together; `hidden` `[M, H]` is where their last tokens left them."""

    hidden: Tensor

    def keep(self, rows: Tensor) -> None: ...

    def step(self, tokens: Tensor) -> None: ...


def row_seeds(seed: int, row: Tensor) -> Tensor:
    """One int64 stream per row, mixed so that neighbouring seeds share none."""
    from fastrl.kernels.logprob.reference import splitmix64

    wrapped = (seed + 2**63) % 2**64 - 2**63
    return splitmix64(splitmix64(torch.full_like(row, wrapped)) + row)


def draw(
    hidden: Tensor, head: LmHead, sampling: SamplingParams, seeds: Tensor, positions: Tensor
) -> Samples:
    """One token for each hidden state `[M, H]`; seeds and positions `[M]` int64 decide it."""
    return linear_sample(
        hidden,
        head.weight,
        seeds=seeds,
        positions=positions,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        **head.arguments(),
    )


@dataclass(frozen=True)
class Ending:
    """What ends a row: one of these tokens, a stop string, its limit, or the word of its group."""

    tokens: list[int]
    tokenizer: PreTrainedTokenizerBase | None
    group_size: int
    group_stop: GroupStop | None

    def strings(self, tokens: Tensor, stop: Sequence[str]) -> Tensor:
        """Which rows of tokens `[M, t]` end in a stop string that their newest token completes."""
        reach = max(len(s) for s in stop) + 8
        tail = tokens[:, -reach:].tolist()
        before = [t[:-1] for t in tail]
        texts = self.tokenizer.batch_decode(tail)  # type: ignore[union-attr]
        earlier = self.tokenizer.batch_decode(before)  # type: ignore[union-attr]
        return torch.tensor(
            [
                any(s in text and text.count(s) > old.count(s) for s in stop)
                for text, old in zip(texts, earlier, strict=True)
            ],
            device=tokens.device,
        )

    def pruned(self, tokens: Tensor, first_row: int, count: Tensor, ended: Tensor) -> Tensor:
        """Rows that their group's `group_stop` ends.

        tokens `[B, T]`, count and ended `[B]`; asked are groups of which a row has just ended.
        """
        size = self.group_size
        out = torch.zeros_like(ended)
        for i in range(0, len(ended), size):
            some = slice(i, i + size)
            finished = ended[some].tolist()
            if all(finished) or not any(finished):
                continue
            completions = [
                row[:n] for row, n in zip(tokens[some].tolist(), count[some].tolist(), strict=True)
            ]
            answer = self.group_stop(  # type: ignore[misc]
                Group((first_row + i) // size, completions, finished)
            )
            if isinstance(answer, bool):
                out[some] = answer
            elif len(answer) == size:
                out[some] = torch.tensor(answer, dtype=torch.bool, device=out.device)
            else:
                raise ValueError(
                    f"group_stop returned {len(answer)} values for a group of {size}; "
                    "return a bool, or one for each completion"
                )
        return out & ~ended


def generate(
    rows: Rows,
    head: LmHead,
    sampling: SamplingParams,
    first_row: int,
    limits: Tensor,
    ending: Ending,
    progress: Callable[[int, int], None],
) -> tuple[Tensor, ...]:
    """Tokens, log-probs and untruncated ones `[B, T]`, lengths and indices of `REASONS` `[B]`.

    limits `[B]` holds the most tokens of each row; progress is told the tokens sampled and those
    that rows which ended will not need.
    """
    device = limits.device
    size, steps = len(limits), int(limits.max())
    seeds = row_seeds(sampling.seed, torch.arange(first_row, first_row + size, device=device))
    tokens = torch.zeros(steps, size, dtype=torch.int64, device=device)
    logprobs, untruncated = (
        torch.zeros(steps, size, dtype=torch.float32, device=device) for _ in range(2)
    )
    count, reason = limits.clone(), torch.full_like(limits, LENGTH)
    ended = torch.zeros(size, dtype=torch.bool, device=device)
    live = torch.arange(size, device=device)
    positions = torch.zeros_like(live)
    limit = int(limits.min())  # of the live rows
    for step in range(steps):
        drawn = draw(rows.hidden, head, sampling, seeds, positions)
        tokens[step].index_copy_(0, live, drawn.token)
        logprobs[step].index_copy_(0, live, drawn.logprob)
        untruncated[step].index_copy_(0, live, drawn.untruncated_logprob)
        done = torch.zeros_like(drawn.token, dtype=torch.bool)
        for stop_token in ending.tokens:
            done |= drawn.token == stop_token
        if sampling.stop:
            done |= ending.strings(tokens[: step + 1].T[live], sampling.stop)
        any_done = step + 1 == limit or bool(done.any())
        spared = 0
        if any_done:
            reason[live[done]] = STOP
            done |= limits[live] == step + 1
            count[live[done]] = step + 1
            ended[live[done]] = True
            if ending.group_stop is not None:
                so_far = torch.where(ended, count, step + 1)
                pruned = ending.pruned(tokens.T, first_row, so_far, ended)
                reason[pruned], count[pruned] = PRUNED, step + 1
                ended |= pruned
                done |= pruned[live]
            spared = int((limits[live[done]] - step - 1).sum())
        progress(len(live), spared)
        token = drawn.token
        if any_done:
            if done.all():
                break
            kept = torch.nonzero(~done).squeeze(-1)
            rows.keep(kept)
            live, token, seeds, positions = (x[kept] for x in (live, token, seeds, positions))
            limit = int(limits[live].min())
        rows.step(token)
        positions += 1
    return *(x.T for x in (tokens, logprobs, untruncated)), count, reason


@contextmanager
def progress_bar(show: bool, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar with tokens per second, or with `show` false nothing."""
    if not show:
        yield lambda sampled, spared: None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("sampling"), BarColumn(), TextColumn("{task.fields[rate]}")
    with Progress(*columns) as bar:
        task = bar.add_task("sampling", total=total, rate="")
        tokens = 0

        def update(sampled: int, spared: int) -> None:
            nonlocal tokens
            tokens += sampled
            elapsed = bar.tasks[task].elapsed or 1e-9
            rate = f"{tokens} tokens, {tokens / elapsed:.0f} tokens/s"
            bar.update(task, advance=sampled + spared, rate=rate)

        yield update
