"""Ranks of several designs over tasks: the Friedman test and Nemenyi's critical difference (Demšar 2006, JMLR 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class RankTest:
    """Do the designs differ at all, and which mean ranks lie far enough apart?

    Args:
        tasks: Number of tasks N.
        mean_ranks: Mean rank of each of the k designs, 1 is best, ties share; best first.
        chi_square: Friedman's statistic, corrected for ties.
        p_chi_square: Its p-value, from k - 1 degrees of freedom.
        f: Iman and Davenport's F = (N - 1) χ² / (N (k - 1) - χ²), less conservative for few tasks.
        p: Its p-value, from k - 1 and (k - 1)(N - 1) degrees of freedom.
        critical_difference: Two designs differ at `alpha` if their mean ranks differ by as much (Nemenyi).
        alpha: Level of the critical difference.
        p_nemenyi: Two-sided p-values of all pairs (k, k), corrected for their number by Nemenyi's procedure.
    """

    tasks: int
    mean_ranks: dict[str, float]
    chi_square: float
    p_chi_square: float
    f: float
    p: float
    critical_difference: float
    alpha: float
    p_nemenyi: pd.DataFrame

    @property
    def reachable(self) -> bool:
        """Whether the critical difference can be reached: k designs are at most k - 1 ranks apart."""
        return self.critical_difference <= len(self.mean_ranks) - 1


def rank_test(scores: pd.DataFrame, *, alpha: float = 0.05) -> RankTest:
    """Ranks designs on every task, higher scores first, and tests the mean ranks.

    Args:
        scores: One row for each of N tasks, at least two; one column for each of k designs, at least three; no gaps.
        alpha: Level of the critical difference, q_alpha √(k (k + 1) / (6 N)).

    Raises:
        ValueError: If there are too few rows or columns, or a score is missing.

    Example:
        >>> scores = pd.DataFrame({"a": [3, 3, 3, 2], "b": [2, 2, 1, 3], "c": [1, 1, 2, 1]})
        >>> result = rank_test(scores)
        >>> result.mean_ranks, result.chi_square, round(result.critical_difference, 3), result.reachable
        ({'a': 1.25, 'b': 2.0, 'c': 2.75}, 4.5, 1.657, True)
    """
    tasks, designs = scores.shape
    if tasks < 2 or designs < 3 or scores.isna().to_numpy().any():
        raise ValueError(f"{tasks} tasks of {designs} designs: needed are 2 and 3 at least, each with a score.")
    ranks = scores.rank(axis=1, ascending=False)
    mean_ranks = ranks.mean().sort_values()
    if (ranks.nunique(axis=1) == 1).all():  # nothing but ties
        chi_square, p_chi_square = 0.0, 1.0
    else:
        chi_square, p_chi_square = (float(value) for value in stats.friedmanchisquare(*scores.to_numpy().T))
    rest = tasks * (designs - 1) - chi_square
    f = (tasks - 1) * chi_square / rest if rest > 1e-9 else math.inf
    standard_error = math.sqrt(designs * (designs + 1) / (6 * tasks))
    apart = abs(np.subtract.outer(mean_ranks.to_numpy(), mean_ranks.to_numpy()))
    # Nemenyi's q is the studentized range for infinitely many degrees of freedom, divided by √2.
    p_nemenyi = stats.studentized_range.sf(apart * math.sqrt(2) / standard_error, designs, np.inf)
    return RankTest(
        tasks=tasks,
        mean_ranks={str(name): float(rank) for name, rank in mean_ranks.items()},
        chi_square=chi_square,
        p_chi_square=p_chi_square,
        f=f,
        p=float(stats.f.sf(f, designs - 1, (designs - 1) * (tasks - 1))),
        critical_difference=float(stats.studentized_range.isf(alpha, designs, np.inf)) / math.sqrt(2) * standard_error,
        alpha=alpha,
        p_nemenyi=pd.DataFrame(p_nemenyi, index=mean_ranks.index, columns=mean_ranks.index),
    )
