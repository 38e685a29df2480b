"""The loop of sampling: draw a token for each row, see which rows end, go on with the others."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrl.kernels import GroupLayout, Samples, linear_sample
from fastrl.models.head import LmHead
from fastrl.rollout.request import Request
from fastrl.rollout.sampling import Group, GroupStop, Rollouts, SamplingParams

REASONS = ("length", "stop", "pruned")
LENGTH, STOP, PRUNED = range(len(REASONS))


@dataclass(frozen=True)
class Drawn:
    """Tokens and log-probs `[M, n]` of rows, of which the first count `[M]` were drawn."""

    token: Tensor
    logprob: Tensor
    untruncated_logprob: Tensor
    count: Tensor

    def last(self) -> Tensor:
        """The token that each row drew last, `[M]`, contiguous: its address is handed on."""
        if self.token.shape[1] == 1:
            return self.token[:, 0].contiguous()
        return self.token.gather(1, self.count.unsqueeze(1) - 1).squeeze(1)

    def total(self) -> int:
        """Tokens drawn by all rows."""
        return len(self.token) if self.token.shape[1] == 1 else int(self.count.sum())


@dataclass(frozen=True)
class Turn:
    """What rows are to draw: at most `most` tokens each, no more than their room `[M]`.

    seeds and positions `[M]` int64 decide the first draw. A row ends with a token of `stops`; rows
    may return early once no more than `fewest` of them are left.
    """

    head: LmHead
    sampling: SamplingParams
    seeds: Tensor
    positions: Tensor
    room: Tensor
    stops: list[int]
    most: int
    fewest: int

    def once(self, hidden: Tensor) -> Drawn:
        """One token for each hidden state `[M, H]`."""
        drawn = draw(hidden, self.head, self.sampling, self.seeds, self.positions)
        token, logprob, untruncated = (x.unsqueeze(1) for x in drawn)
        return Drawn(token, logprob, untruncated, torch.ones_like(self.positions))


class Rows(Protocol):
    """Rows that decode together; each reads what it drew last before it draws again."""

    joins: bool  # whether rows can be added while others go on

    def add(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> None: ...

    def keep(self, rows: Tensor) -> None: ...

    def draw(self, turn: Turn) -> Drawn: ...


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

    def strings(self, tokens: Tensor, count: Tensor, stop: Sequence[str]) -> Tensor:
        """Which rows of tokens `[M, T]`, `[M]` of each, end in a stop string just completed."""
        reach = max(len(s) for s in stop) + 8
        at = count.unsqueeze(-1) - torch.arange(reach, 0, -1, device=count.device)
        window = tokens.gather(1, at.clamp(min=0)).tolist()
        tail = [row[max(0, reach - n) :] for row, n in zip(window, count.tolist(), strict=True)]
        texts = self.tokenizer.batch_decode(tail)  # type: ignore[union-attr]
        earlier = self.tokenizer.batch_decode([t[:-1] for t in tail])  # type: ignore[union-attr]
        return torch.tensor(
            [
                any(s in text and text.count(s) > old.count(s) for s in stop)
                for text, old in zip(texts, earlier, strict=True)
            ],
            device=tokens.device,
        )

    def pruned(self, group: int, tokens: Tensor, count: Tensor, ended: Tensor) -> Tensor:
        """Rows of a group that its `group_stop` ends; tokens `[G, T]`, count and ended `[G]`."""
        finished = ended.tolist()
        if all(finished):
            return torch.zeros_like(ended)
        completions = [row[:n] for row, n in zip(tokens.tolist(), count.tolist(), strict=True)]
        answer = self.group_stop(Group(group, completions, finished))  # type: ignore[misc]
        if isinstance(answer, bool):
            return ~ended if answer else torch.zeros_like(ended)
        if len(answer) != self.group_size:
            raise ValueError(
                f"group_stop returned {len(answer)} values for a group of {self.group_size}; "
                "return a bool, or one for each completion"
            )
        return torch.tensor(answer, dtype=torch.bool, device=ended.device) & ~ended


class Completions:
    """What has been sampled for B rows: tokens, log-probs, lengths and reasons of ending."""

    def __init__(self, limits: Tensor):
        rows, most = len(limits), int(limits.max())
        self.tokens = torch.zeros(rows, most, dtype=torch.int64, device=limits.device)
        self.logprobs = torch.zeros(rows, most, dtype=torch.float32, device=limits.device)
        self.untruncated = torch.zeros_like(self.logprobs)
        self.count = torch.zeros_like(limits)
        self.reason = torch.full_like(limits, LENGTH)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=limits.device)

    def put(self, at: Tensor, drawn: Drawn) -> None:
        """Write what rows drew, from a place of the flattened `[B, T]` on for each."""
        ahead = torch.arange(drawn.token.shape[1], device=at.device)
        places, made = at.unsqueeze(1) + ahead, ahead < drawn.count.unsqueeze(1)
        whole = len(ahead) == 1 or bool(made.all())  # then nothing has to be looked for
        for to, values in (
            (self.tokens, drawn.token),
            (self.logprobs, drawn.logprob),
            (self.untruncated, drawn.untruncated_logprob),
        ):
            some = (places, values) if whole else (places[made], values[made])
            to.view(-1).index_copy_(0, *(x.flatten() for x in some))

    def end(self, rows: Tensor, count: Tensor, reason: int) -> None:
        """Rows end, after `count` tokens each."""
        self.count[rows], self.reason[rows], self.ended[rows] = count, reason, True

    def rollouts(self, request: Request, weight_version: int, device: torch.device) -> Rollouts:
        """The same as an engine returns it, on a device."""
        steps = int(self.count.max())
        counts = self.count.view(-1, request.group_size)
        mask = torch.arange(steps, device=counts.device) < self.count.unsqueeze(-1)
        return Rollouts(
            prompt_ids=[ids for ids in request.prompts for _ in range(request.group_size)],
            completion_ids=self.tokens[:, :steps].contiguous().to(device),
            completion_mask=mask.to(device),
            logprobs=self.logprobs[:, :steps].contiguous().to(device),
            untruncated_logprobs=self.untruncated[:, :steps].contiguous().to(device),
            finish_reason=[REASONS[r] for r in self.reason.tolist()],
            layout=GroupLayout.from_lengths(
                [len(ids) for ids in request.prompts], counts.tolist(), device
            ),
            weight_version=weight_version,
        )


def generate(
    rows: Rows,
    head: LmHead,
    request: Request,
    ending: Ending,
    max_rows: int,
    first_row: int,
    progress: Callable[[int, int], None],
) -> Completions:
    """Sample all rows of a request, which are numbered from `first_row`, `max_rows` at a time.

    Whole groups wait for places (single rows, where a group is more than `max_rows`) and take those
    of rows that have ended. progress is told the tokens sampled and those that rows which ended
    will not need.
    """
    sampling, size = request.sampling, request.group_size
    device = head.weight.device
    limits = torch.tensor(request.limits, device=device).repeat_interleave(size)
    out = Completions(limits)
    total, width = out.tokens.shape
    unit = size if size <= max_rows else 1
    numbers = torch.arange(first_row, first_row + total, device=device)
    seeds = row_seeds(sampling.seed, numbers)
    live = torch.zeros(0, dtype=torch.int64, device=device)
    positions, at = live, live  # tokens sampled for each live row; where its next one goes
    waiting, least = 0, 0  # the first row that waits; draws until a live row reaches its limit
    watched = bool(sampling.stop) or ending.group_stop is not None  # after each token
    while True:
        free = max_rows - len(live)
        # A few places are not worth a prefill of their own.
        enough = max(unit, max_rows // 8) if rows.joins else max_rows
        if waiting < total and (free >= enough or not len(live)):
            new = torch.arange(waiting, min(total, waiting + free // unit * unit), device=device)
            waiting += len(new)
            groups, copies = torch.unique_consecutive(new // size, return_counts=True)
            rows.add([request.prompts[g] for g in groups.tolist()], copies.tolist())
            live = torch.cat([live, new])
            positions = torch.cat([positions, torch.zeros_like(new)])
            at = live * width + positions
            least = int((limits[live] - positions).min())
        turn = Turn(
            head,
            sampling,
            seeds[live],
            positions,
            limits[live] - positions,
            ending.tokens,
            most=1 if watched else width,
            fewest=max_rows - enough if waiting < total else 0,
        )
        drawn = rows.draw(turn)
        out.put(at, drawn)
        positions = positions + drawn.count
        at = at + drawn.count
        least -= drawn.token.shape[1]
        last = drawn.last()
        done = torch.zeros_like(last, dtype=torch.bool)
        for stop_token in ending.tokens:
            done |= last == stop_token
        if sampling.stop:
            done |= ending.strings(out.tokens[live], positions, sampling.stop)
        any_done = least <= 0 or bool(done.any())
        spared = 0
        if any_done:
            full = (positions == limits[live]) & ~done
            out.end(live[done], positions[done], STOP)
            out.end(live[full], positions[full], LENGTH)
            done |= full
            if ending.group_stop is not None:
                out.count[live] = positions
                for group in (live[done] // size).unique().tolist():
                    some = slice(group * size, group * size + size)
                    pruned = ending.pruned(
                        group, out.tokens[some], out.count[some], out.ended[some]
                    )
                    out.reason[some].masked_fill_(pruned, PRUNED)
                    out.ended[some] |= pruned
                done = out.ended[live]
            spared = int((limits[live] - positions)[done].sum())
        progress(drawn.total(), spared)
        if any_done:
            kept = torch.nonzero(~done).squeeze(-1)
            rows.keep(kept)
            live, positions, at = (x[kept] for x in (live, positions, at))
            if len(live):
                least = int((limits[live] - positions).min())
            elif waiting == total:
                return out


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
