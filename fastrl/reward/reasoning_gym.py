"""Verifiable tasks from the reasoning-gym library: problems, answers and their verifier."""

import difflib
import random
import string
from collections.abc import Callable
from typing import Any

from fastrl import installation

Problem = dict[str, Any]
KINDS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)


def _create(task: str, **arguments: Any):
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"reasoning_gym task {task!r} needs that package, fastrl's extra gym: "
            f"{installation.get('reasoning_gym')} ({error})"
        ) from None

    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see reasoning_gym.factory.DATASETS"
        raise ValueError(f"reasoning_gym task {task!r} is unknown; {hint}")
    try:
        return reasoning_gym.create_dataset(task, **arguments)
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"reasoning_gym task {task!r} with options {arguments}: {error}"
        ) from error


def _render(template: str, entry: Problem) -> str:
    try:
        return template.format(**(entry["metadata"] | {"question": entry["question"]}))
    except (KeyError, IndexError, ValueError) as error:
        fields = ", ".join(["question", *entry["metadata"]])
        raise ValueError(
            f"prompt template {template!r} does not fit ({error}); fields: {fields}"
        ) from None


def ranking(answer: str, count: int, seed: int) -> list[str]:
    """The answer and ever worse copies of it: in the k-th, k characters are wrong.

    Wrong characters are of the kinds that the answer has (digits where it has neither digits nor
    letters) and differ by more than case, so that a copy looks like an answer and no verifier takes
    it for one; an answer with fewer characters than are to be wrong grows by wrong ones.
    """
    chance = random.Random(f"{seed} {answer}")
    kinds = [kind for kind in KINDS if set(kind) & set(answer)] or KINDS[:1]
    alphabet = sorted(set(answer).union(*kinds))
    out, text = [answer], list(answer)
    places = chance.sample(range(len(text)), min(len(text), count - 1))
    for k in range(count - 1):
        if k < len(places):
            at = places[k]
            text[at] = chance.choice([c for c in alphabet if c.lower() != text[at].lower()])
        else:
            text.append(chance.choice(alphabet))
        out.append("".join(text))
    return out


def make_slips(rows: list[Problem], share: float, seed: int) -> list[Problem]:
    """The rows, of which a share has a completion that is wrong by one in its last digit."""
    chance = random.Random(seed)

    def slip(text: str) -> str:
        at = max((i for i, c in enumerate(text) if c.isdigit()), default=None)
        if at is None:
            raise ValueError(f"slips need answers that hold a digit, got {text!r}")
        return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]

    return [
        row | {"completion": slip(row["completion"])} if chance.random() < share else row
        for row in rows
    ]


def make_flips(rows: list[Problem], share: float, seed: int) -> list[Problem]:
    """The rows, of which a share has its ranking the wrong way round."""
    chance = random.Random(f"flips {seed}")
    return [
        row | {"ranked": row["ranked"][::-1]} if chance.random() < share else row for row in rows
    ]


def make_problems(
    task: str,
    options: dict[str, Any],
    size: int,
    eval_size: int,
    seed: int,
    template: str,
    ranked: int = 2,
) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems of a task, as rows with `prompt`, `completion` and `entry`.

    Each also has `ranked`: the answer and worse copies of it, `ranked` in all; see `ranking`.
    The held-out problems are distinct, and none of their prompts is among the training ones.
    Raises `ValueError` for an unknown task, bad options, a template that does not fit, and for a
    task with too few distinct problems to hold any out.
    """

    def rows(dataset) -> list[Problem]:
        return [
            {
                "prompt": _render(template, e),
                "completion": str(e["answer"]),
                "ranked": ranking(str(e["answer"]), ranked, seed),
                "entry": e,
            }
            for e in dataset
        ]

    held_out: dict[str, Problem] = {}
    if eval_size:
        for row in rows(_create(task, seed=seed + 1, size=4 * eval_size, **options)):
            held_out.setdefault(row["prompt"], row)
            if len(held_out) == eval_size:
                break
    train = [
        row
        for row in rows(_create(task, seed=seed, size=size, **options))
        if row["prompt"] not in held_out
    ]
    if not train:
        raise ValueError(
            f"reasoning_gym task {task!r} has too few distinct problems for eval_size={eval_size}: "
            "none is left to train on"
        )
    return train, list(held_out.values())


def verifier(task: str, options: dict[str, Any]) -> Callable[..., list[float]]:
    """A reward function that scores completions with the task's own verifier, in [0, 1].

    The answer is the text inside `<answer>` tags where there are any, else the whole completion,
    stripped.
    """
    dataset = _create(task, seed=0, size=1, **options)
    from reasoning_gym.utils import extract_answer

    def reasoning_gym(prompts, completions, entry, **_) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        answers = [extract_answer(t) if "<answer>" in t else t.strip() for t in texts]
        return [
            float(dataset.score_answer(a, entry=e)) for a, e in zip(answers, entry, strict=True)
        ]

    return reasoning_gym
