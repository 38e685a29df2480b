"""Scores of a file of pairs of any length, that survive a kill and go on where they stopped."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastrl.reward.build import CALIBRATION_TOKENS
from fastrl.reward.checkpoint import Checkpoint
from fastrl.reward.ensemble import combine
from fastrl.reward.model import QuantizedRewardModel
from fastrl.reward.pairs import Ids, Pair, encode_pair

WINDOW = 8  # batches between two writes


class Line(NamedTuple):
    """A line of the input that is not blank."""

    number: int
    text: bytes
    end: int  # in bytes


def load_scorer(
    path: str,
    scheme: str | None,
    keep_bf16: Sequence[str],
    smooth: Path | None,
    device: str,
    batch_tokens: int,
    activations: str | None = None,
) -> QuantizedRewardModel:
    """The model that `fastrl score` names; `smooth` is a file like the one to score.

    Raises `ValueError` as `QuantizedRewardModel.from_pretrained` does, and for options that do not
    go with the scheme `bitsandbytes`.
    """
    if scheme == "bitsandbytes":
        if keep_bf16 or smooth is not None:
            raise ValueError(
                "scheme 'bitsandbytes' takes a checkpoint as it is; it has no keep_bf16 and smooth"
            )
        return QuantizedRewardModel.from_bitsandbytes(
            path, device=device, batch_tokens=batch_tokens, activations=activations
        )
    checkpoint = Checkpoint.open(path)
    tokenizer = checkpoint.tokenizer()
    texts = None if smooth is None else _calibration(smooth, tokenizer)
    return QuantizedRewardModel.from_pretrained(
        checkpoint,
        scheme,
        keep_bf16=keep_bf16,
        smooth=texts,
        tokenizer=tokenizer,
        device=device,
        batch_tokens=batch_tokens,
        activations=activations,
    )


def _calibration(path: Path, tokenizer: Any) -> list[Ids]:
    """As many of a file's pairs, as token ids, as calibration reads."""
    if not path.is_file():
        raise ValueError(f"smooth file {str(path)!r} does not exist")
    out, tokens = [], 0
    with path.open("rb") as file:
        for line in _lines(file):
            try:
                pair = _pair(line, tokenizer, {})
            except ValueError as error:
                raise ValueError(f"{path}, line {line.number}: {error}") from None
            out.append(pair.prompt + pair.completion)
            tokens += len(out[-1])
            if tokens >= CALIBRATION_TOKENS:
                break
    return out


def score_file(
    model: QuantizedRewardModel,
    pairs: Path,
    out: Path,
    *,
    ensemble: str | None = None,
    variance_weight: float = 0.5,
    console: Console | None = None,
) -> int:
    """Score a file of JSON lines with `prompt` and `completion`; returns the number of scores made.

    Writes a line `{"score": ..., "pair": ...}` for each, in order: a number, or the list of all
    heads' where there are several and no ensemble; and a digest of model, settings and input line.
    What is written is on disk, in whole lines, before the next pairs are scored. Where `out` exists
    it is continued; with an int8 model to the same bytes as without the stop. Raises `ValueError`
    where its lines do not belong to the input or were made by another model or setting, and naming
    the line for a pair that cannot be used; scores before it are kept.
    """
    if not pairs.is_file():
        raise ValueError(f"pairs file {str(pairs)!r} does not exist")
    if out.exists() and pairs.samefile(out):
        raise ValueError(f"out={str(out)!r} is the pairs file itself")
    if ensemble is not None:  # what is wrong with it is an error now
        combine(torch.zeros(0, model.spec.scores), ensemble, variance_weight)
    seed = _fingerprint(model, ensemble, variance_weight)
    made = 0
    with pairs.open("rb") as source, out.open("a+b") as sink, _progress(console) as progress:
        lines = _lines(source)
        done = _resume(sink, lines, seed, pairs, out)
        bar = progress.add_task("", total=pairs.stat().st_size, pairs=done.pairs)
        progress.update(bar, completed=done.end)
        for window, error in _windows(model, lines, pairs):
            scores = model.score_pairs([pair for _, pair in window])
            if ensemble is not None:
                scores = combine(scores, ensemble, variance_weight)
            rows = zip(window, scores.tolist(), strict=True)
            text = "".join(
                json.dumps({"score": score, "pair": _digest(seed, line)}) + "\n"
                for (line, _), score in rows
            )
            sink.write(text.encode())
            sink.flush()
            os.fsync(sink.fileno())
            made += len(window)
            if window:
                completed = window[-1][0].end
                progress.update(bar, completed=completed, pairs=done.pairs + made)
            if error is not None:
                raise error
    return made


def _progress(console: Console | None) -> Progress:
    return Progress(
        BarColumn(),
        TextColumn("{task.percentage:.0f}%  {task.fields[pairs]} pairs"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )


def _lines(file: BinaryIO) -> Iterator[Line]:
    end = 0
    for number, text in enumerate(file, 1):
        end += len(text)
        if text.strip():
            yield Line(number, text.strip(), end)


def _windows(
    model: QuantizedRewardModel, lines: Iterator[Line], path: Path
) -> Iterator[tuple[list[tuple[Line, Pair]], ValueError | None]]:
    """Runs of pairs to score together; the last one with what is wrong with the line after it."""
    window: list[tuple[Line, Pair]] = []
    tokens, known = 0, dict[str, Ids]()
    for line in lines:
        try:
            pair = _pair(line, model.tokenizer, known)
            model.check(pair)
        except ValueError as error:
            yield window, ValueError(f"{path}, line {line.number}: {error}")
            return
        window.append((line, pair))
        tokens += len(pair.prompt) + len(pair.completion)
        if tokens >= WINDOW * model.batch_tokens:
            yield window, None
            window, tokens, known = [], 0, {}
    yield window, None


def _pair(line: Line, tokenizer: Any, known: dict[str, Ids]) -> Pair:
    try:
        row: Any = json.loads(line.text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from None
    if not isinstance(row, dict) or not {"prompt", "completion"} <= row.keys():
        raise ValueError(
            f"must be a JSON object with prompt and completion, got {line.text[:60].decode()!r}"
        )
    return encode_pair(row["prompt"], row["completion"], tokenizer, known)


def _fingerprint(model: QuantizedRewardModel, *settings: Any) -> bytes:
    return f"{model.fingerprint()} {settings}".encode()


def _digest(seed: bytes, line: Line) -> str:
    return hashlib.blake2b(line.text, key=hashlib.sha256(seed).digest(), digest_size=8).hexdigest()


class Done(NamedTuple):
    """How much of the input has been scored: pairs, and bytes."""

    pairs: int
    end: int


def _resume(sink: BinaryIO, lines: Iterator[Line], seed: bytes, pairs: Path, out: Path) -> Done:
    """Walk past the lines that have their scores; a half-written last line is cut off."""
    sink.seek(0)
    count = end = written = 0
    for text in sink:
        if not text.endswith(b"\n"):
            break
        line = next(lines, None)
        try:
            made_from = json.loads(text)["pair"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise ValueError(
                f"{out}, line {count + 1}: not a score that was written here"
            ) from None
        if line is None or made_from != _digest(seed, line):
            of = f"line {line.number} of {pairs}" if line else f"{pairs}, which has fewer lines"
            raise ValueError(
                f"{out}, line {count + 1} is not the score of {of}, from this model with these "
                "settings; give another file for the scores"
            )
        count, end, written = count + 1, line.end, written + len(text)
    sink.truncate(written)
    sink.seek(0, os.SEEK_END)
    return Done(count, end)
