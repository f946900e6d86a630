"""Paired tests: is one design better than another over the tasks on which both were scored?

Everything here is a pure function of numbers. The unit is the task: a design has one score for each, averaged over
its seeds, and two designs are compared by the differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

CONFIDENCE = 0.95
DECIMALS = 6  # what mteb's files keep; beyond it, differences that are equal on paper differ by rounding errors
_RESAMPLES = 9999


@dataclass(frozen=True)
class PairedTest:
    """The Wilcoxon signed-rank test of paired differences, with how large and how consistent they are.

    Args:
        n: Pairs.
        zeros: Pairs without a difference. They are dropped before ranking (Wilcoxon's own treatment).
        mean_difference: Mean over all pairs, zeros included.
        low: Lower end of the bootstrap interval of the mean difference (BCa, 95 %). NaN below six pairs, where nothing
            can be said at 95 % without assumptions. From few pairs it is too short: it holds the true mean of normal
            differences in 85 % of samples of 6 and in 92 % of samples of 12. The p-value has no such fault.
        high: Upper end.
        w_plus: Sum of the ranks of the positive differences.
        w_minus: Sum of the ranks of the negative differences.
        p: Two-sided p-value, exact also where differences tie: twice the share of the 2^m assignments of signs to
            the m ranks whose smaller sum is as small, m the pairs that differ.
    """

    n: int
    zeros: int
    mean_difference: float
    low: float
    high: float
    w_plus: float
    w_minus: float
    p: float

    @property
    def statistic(self) -> float:
        """Wilcoxon's statistic, the smaller of the two sums of ranks."""
        return min(self.w_plus, self.w_minus)

    @property
    def effect_size(self) -> float:
        """Matched-pairs rank-biserial correlation, (W+ - W-) / (W+ + W-): 1 if every difference is positive."""
        total = self.w_plus + self.w_minus
        return (self.w_plus - self.w_minus) / total if total else 0.0


def paired_test(differences: ArrayLike, *, decimals: int = DECIMALS) -> PairedTest:
    """Tests whether paired differences lie symmetrically around zero.

    Args:
        differences: One finite number for each pair (n,), first minus second.
        decimals: Differences are rounded to so many decimals before they are ranked.

    Raises:
        ValueError: If there is no difference, or one is not finite.

    Example:
        >>> test = paired_test([0.03, 0.01, 0.04, 0.02, -0.005, 0.05])
        >>> test.p, test.statistic
        (0.0625, 1.0)
        >>> round(test.effect_size, 3)
        0.905
    """
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"differences must be at least one finite number, in one dimension; they are {values}.")
    rounded = values.round(decimals)
    ranked = rounded[rounded != 0]
    ranks = stats.rankdata(abs(ranked))
    w_plus, w_minus = float(ranks[ranked > 0].sum()), float(ranks[ranked < 0].sum())
    low, high = _bootstrap_interval(values)
    return PairedTest(
        n=len(values),
        zeros=len(values) - len(ranked),
        mean_difference=float(values.mean()),
        low=low,
        high=high,
        w_plus=w_plus,
        w_minus=w_minus,
        p=float(signed_rank_p(ranks)[round(2 * min(w_plus, w_minus))]),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for the number of tests (Holm 1979), in the order given.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    if len(p_values) < 2:
        return list(p_values)
    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def signed_rank_p(ranks: ArrayLike) -> NDArray[np.float64]:
    """Returns the exact two-sided p-value of every value that the signed-rank statistic can have.

    scipy's exact p-values hold only without ties, and its enumeration of signs takes seconds for twelve pairs; adding
    one rank at a time takes none.

    Args:
        ranks: The m ranks; where values tie, half ranks occur.

    Returns:
        Its element 2 W is the p-value of the statistic W.

    Example:
        >>> signed_rank_p([1, 2, 3])[[0, 2, 4, 6]]
        array([0.25, 0.5 , 0.75, 1.  ])
    """
    steps = (2 * np.asarray(ranks, dtype=float)).round().astype(int)
    mass = np.zeros(steps.sum() + 1)
    mass[0] = 1.0
    for step in steps:
        mass = (mass + np.roll(mass, step)) / 2  # what is rolled over the end is zero
    return np.minimum(1.0, 2 * mass.cumsum())


def smallest_p(n: int) -> float:
    """Returns the smallest two-sided p-value that n pairs can give: all signs alike, 2 of the 2^n assignments.

    Example:
        >>> smallest_p(5), smallest_p(6)
        (0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - n))


def _bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    if smallest_p(len(values)) > 1 - CONFIDENCE:
        return math.nan, math.nan
    if np.ptp(values) < 0.5 * 10.0**-DECIMALS:  # nothing to resample, and BCa divides by the spread
        return float(values[0]), float(values[0])
    interval = stats.bootstrap(
        (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=_RESAMPLES, rng=np.random.default_rng(0)
    ).confidence_interval
    return float(interval.low), float(interval.high)
