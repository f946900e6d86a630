"""Statistical tests of paired scores: over tasks, over items, over ranks, and the noise of seeds.

The unit is the task: a design has one score for each, averaged over its seeds, and two designs are compared by their
differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

CONFIDENCE = 0.95
DECIMALS = 6  # what mteb's files keep; beyond it, differences that are equal on paper differ by rounding errors
_RESAMPLES = 9999


@dataclass(frozen=True)
class PairedTest:
    """The Wilcoxon signed-rank test of paired differences, with their mean and its interval.

    Args:
        n: Number of pairs.
        zeros: Number of pairs without a difference; they are dropped before ranking, as Wilcoxon does.
        mean_difference: Mean over all pairs, zeros included.
        low: Lower end of the bootstrap interval of the mean difference (BCa, 95 %); NaN below six pairs. It is too
            short for few pairs: it covers the true mean of normal differences in 85 % of samples of 6 and 92 % of
            samples of 12.
        high: Upper end.
        w_plus: Sum of the ranks of the positive differences.
        w_minus: Sum of the ranks of the negative differences.
        p: Exact two-sided p-value, with ties too, over the 2^m assignments of signs to the m non-zero differences.
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
    """Test whether paired differences lie symmetrically around zero.

    Args:
        differences: One finite number for each pair (n,), first minus second.
        decimals: Decimals to which differences are rounded before they are ranked.

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
    low, high = bootstrap_interval(values)
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
    """Return p-values corrected for the number of tests (Holm 1979), in the order given.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    if len(p_values) < 2:
        return list(p_values)
    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def signed_rank_p(ranks: ArrayLike) -> NDArray[np.float64]:
    """Return the exact two-sided p-value of every value of the signed-rank statistic.

    scipy's exact p-values need untied ranks, and its enumeration of signs takes seconds for twelve pairs.

    Args:
        ranks: The m ranks; half ranks where values tie.

    Returns:
        An array whose element 2 W is the p-value of the statistic W.

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
    """Return the smallest two-sided p-value of n pairs: all signs equal, 2 of the 2^n assignments.

    Example:
        >>> smallest_p(5), smallest_p(6)
        (0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - n))


@dataclass(frozen=True)
class ItemTest:
    """The mean difference over items, for tasks like these and for these tasks only.

    Args:
        tasks: Number of tasks T.
        items: Number of items in all tasks.
        mean_difference: Mean over tasks of the mean over their items, so that every task has the same weight.
        low: Lower end of the 95 % interval for tasks like these.
        high: Upper end.
        p: Two-sided p-value for tasks like these; NaN with one task.
        low_here: Lower end of the 95 % interval for these tasks only.
        high_here: Upper end.
        p_here: Two-sided p-value for these tasks only.
        sd_tasks: Standard deviation of the true difference between tasks, sampling of items excluded.
        sd_items: Standard deviation of the difference between items of one task.
    """

    tasks: int
    items: int
    mean_difference: float
    low: float
    high: float
    p: float
    low_here: float
    high_here: float
    p_here: float
    sd_tasks: float
    sd_items: float


def item_test(differences: Mapping[str, ArrayLike]) -> ItemTest:
    """Test the mean difference over items, with errors clustered by task.

    **Tasks like these** (`p`): a linear model of the item differences with only a constant, equal weight per task,
    standard errors clustered by task (CR1), T - 1 degrees of freedom. With these weights it is the t test of the T task
    means, so items of a task may depend on each other. A percentile bootstrap over tasks and then items was measured
    and rejected: it has too many false positives with few tasks and counts item noise twice with many.

    **These tasks only** (`p_here`): the tasks are fixed and their items drawn independently, with variance
    Σ s_t² / n_t / T² and Welch's degrees of freedom. It says nothing about other tasks.

    Args:
        differences: Task to the differences of its items, first minus second, at least two.

    Raises:
        ValueError: If there is no task, or a task has fewer than two differences or one that is not finite.

    Example:
        >>> test = item_test({"a": [0.1, 0.3, 0.2], "b": [0.0, 0.2, 0.1], "c": [0.3, 0.1, 0.2]})
        >>> round(test.mean_difference, 3), round(test.p, 3), round(test.p_here, 3)
        (0.167, 0.038, 0.002)
    """
    groups = {task: np.asarray(values, dtype=float) for task, values in differences.items()}
    for task, values in groups.items():
        if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
            raise ValueError(f"task {task} must have at least two differences, all finite; it has {values}.")
    if not groups:
        raise ValueError("there is no task.")
    means, sizes, variances = np.array([(v.mean(), len(v), v.var(ddof=1)) for v in groups.values()]).T
    tasks, noise, mean = len(groups), variances / sizes, float(means.mean())
    spread = means.var(ddof=1) if tasks > 1 else math.nan
    dof_here = noise.sum() ** 2 / (noise**2 / (sizes - 1)).sum() if noise.any() else 1.0
    low, high, p = _t_test(mean, math.sqrt(spread / tasks), tasks - 1)
    low_here, high_here, p_here = _t_test(mean, math.sqrt(noise.sum()) / tasks, dof_here)
    return ItemTest(
        tasks=tasks,
        items=int(sizes.sum()),
        mean_difference=mean,
        low=low,
        high=high,
        p=p,
        low_here=low_here,
        high_here=high_here,
        p_here=p_here,
        sd_tasks=math.sqrt(max(0.0, spread - noise.mean())) if tasks > 1 else math.nan,
        sd_items=math.sqrt(((sizes - 1) * variances).sum() / (sizes - 1).sum()),
    )


@dataclass(frozen=True)
class RankTest:
    """Friedman's test: do the designs differ at all?

    Args:
        tasks: Number of tasks N.
        mean_ranks: Mean rank of each of the k designs, 1 is best, ties averaged; best first.
        chi_square: Friedman's statistic, corrected for ties.
        f: Iman and Davenport's F = (N - 1) χ² / (N (k - 1) - χ²), less conservative for few tasks.
        p: p-value of F, with k - 1 and (k - 1)(N - 1) degrees of freedom.
    """

    tasks: int
    mean_ranks: dict[str, float]
    chi_square: float
    f: float
    p: float


def rank_test(scores: pd.DataFrame) -> RankTest:
    """Rank designs on every task, higher scores first, and test the mean ranks.

    Args:
        scores: One row for each of N >= 2 tasks, one column for each of k >= 3 designs, without gaps.

    Raises:
        ValueError: If there are too few rows or columns, or a score is missing.

    Example:
        >>> result = rank_test(pd.DataFrame({"a": [3, 3, 3, 2], "b": [2, 2, 1, 3], "c": [1, 1, 2, 1]}))
        >>> result.mean_ranks, result.chi_square
        ({'a': 1.25, 'b': 2.0, 'c': 2.75}, 4.5)
    """
    tasks, designs = scores.shape
    if tasks < 2 or designs < 3 or scores.isna().to_numpy().any():
        raise ValueError(f"{tasks} tasks of {designs} designs: needed are 2 and 3 at least, each with a score.")
    ranks = scores.rank(axis=1, ascending=False)
    all_tied = (ranks.nunique(axis=1) == 1).all()
    chi_square = 0.0 if all_tied else float(stats.friedmanchisquare(*scores.to_numpy().T).statistic)
    rest = tasks * (designs - 1) - chi_square
    f = (tasks - 1) * chi_square / rest if rest > 1e-9 else math.inf
    mean_ranks = {str(name): float(rank) for name, rank in ranks.mean().sort_values().items()}
    return RankTest(tasks, mean_ranks, chi_square, f, float(stats.f.sf(f, designs - 1, (designs - 1) * (tasks - 1))))


@dataclass(frozen=True)
class SeedNoise:
    """Variance of runs, split into that between designs and that between seeds of one design.

    Args:
        runs: Number of runs (seeds) of each design.
        sd_seeds: Standard deviation between runs of one design, pooled over designs.
        sd_designs: Standard deviation between designs, seed noise excluded; zero if they differ no more than seeds do.
        dof: Degrees of freedom of `sd_seeds`, runs minus designs.
        p: p-value of the one-way analysis of variance: do designs differ more than seeds do?
    """

    runs: dict[str, int]
    sd_seeds: float
    sd_designs: float
    dof: int
    p: float

    def least_difference(self, first: str, second: str) -> float:
        """Return t · sd_seeds · √(1/n₁ + 1/n₂), the 95 % bound of the difference that seeds alone make."""
        return float(stats.t.isf((1 - CONFIDENCE) / 2, self.dof)) * self.standard_error(first, second)

    def standard_error(self, first: str, second: str) -> float:
        """Return the standard deviation that seeds give to the difference of two means."""
        return self.sd_seeds * math.sqrt(1 / self.runs[first] + 1 / self.runs[second])


def seed_noise(scores: Mapping[str, ArrayLike]) -> SeedNoise | None:
    """Compare the variance between seeds with the variance between designs.

    Args:
        scores: Design to the scores of its runs, each the mean over the same tasks.

    Returns:
        None if no design has two runs: the noise of seeds is then unknown, not zero.

    Example:
        >>> noise = seed_noise({"a": [0.50, 0.52, 0.51], "b": [0.53, 0.51, 0.52]})
        >>> round(noise.sd_seeds, 4), round(noise.sd_designs, 4), round(noise.least_difference("a", "b"), 4)
        (0.01, 0.0041, 0.0227)
    """
    groups = {design: np.asarray(values, dtype=float) for design, values in scores.items()}
    runs = {design: len(values) for design, values in groups.items()}
    total, designs = sum(runs.values()), len(groups)
    dof = total - designs
    if dof < 1:
        return None
    grand = np.concatenate(list(groups.values())).mean()
    within = sum(((values - values.mean()) ** 2).sum() for values in groups.values()) / dof
    if designs < 2:
        return SeedNoise(runs, math.sqrt(within), math.nan, dof, math.nan)
    between = sum(len(values) * (values.mean() - grand) ** 2 for values in groups.values()) / (designs - 1)
    each = (total - sum(n**2 for n in runs.values()) / total) / (designs - 1)  # runs per design, if unequal
    p = float(stats.f.sf(between / within, designs - 1, dof)) if within else float(between == 0)
    return SeedNoise(runs, math.sqrt(within), math.sqrt(max(0.0, (between - within) / each)), dof, p)


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % BCa bootstrap interval of the mean of values (n,); NaN below six values."""
    if smallest_p(len(values)) > 1 - CONFIDENCE:
        return math.nan, math.nan
    if np.ptp(values) < 0.5 * 10.0**-DECIMALS:  # nothing to resample, and BCa divides by the spread
        return float(values[0]), float(values[0])
    interval = stats.bootstrap(
        (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=_RESAMPLES, rng=np.random.default_rng(0)
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _t_test(mean: float, standard_error: float, dof: float) -> tuple[float, float, float]:
    if math.isnan(standard_error):
        return math.nan, math.nan, math.nan
    if standard_error == 0:
        return mean, mean, float(mean == 0)
    half = float(stats.t.isf((1 - CONFIDENCE) / 2, dof)) * standard_error
    return mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / standard_error, dof))
