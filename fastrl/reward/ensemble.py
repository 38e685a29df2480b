"""One reward from the K heads of an ensemble with a shared backbone."""

from collections.abc import Callable

from torch import Tensor

COMBINATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mean": lambda scores, _: scores.mean(-1),
    "worst_case": lambda scores, _: scores.amin(-1),
    "uncertainty": lambda scores, weight: scores.mean(-1) - weight * scores.var(-1, correction=0),
}


def combine(scores: Tensor, how: str | None, variance_weight: float = 0.5) -> Tensor:
    """Scores `[B, K]` to `[B]`.

    `mean`; `worst_case` is the smallest; `uncertainty` is `mean - variance_weight * variance`, the
    variance being that of the K heads themselves (2310.02743). Scores `[B]`, of a single head, pass
    as they are. Raises `ValueError` for another `how`, and for several heads without one.
    """
    if how is not None and how not in COMBINATIONS:
        raise ValueError(f"ensemble={how!r} is unknown; use one of {', '.join(COMBINATIONS)}")
    if not variance_weight >= 0:
        raise ValueError(f"variance_weight={variance_weight} must not be negative")
    if scores.dim() == 1:
        return scores
    if how is None:
        raise ValueError(
            f"the reward model has {scores.shape[1]} heads; choose how they become one reward with "
            f"ensemble={'|'.join(COMBINATIONS)}"
        )
    return COMBINATIONS[how](scores, variance_weight)
