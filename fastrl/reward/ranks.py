"""Rank statistics of paired scores, on numpy; ties are counted."""

import numpy as np


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b of `[N]` against `[N]`: (concordant - discordant) / sqrt(n_x n_y).

    n_x and n_y count the pairs that are not tied in x and in y. NaN where either is constant.
    """
    a, b = _signs(x), _signs(y)
    norm = np.sqrt(np.abs(a).sum() * np.abs(b).sum(dtype=float))
    return float((a * b).sum() / norm) if norm else float("nan")


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho: the correlation of the ranks, ties at their mean rank; NaN for constants."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm else float("nan")


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties at their mean."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[group]


def _signs(x: np.ndarray) -> np.ndarray:
    """The sign of every pair's difference, each pair once."""
    i, j = np.triu_indices(len(x), 1)
    return np.sign(np.asarray(x)[i] - np.asarray(x)[j])
