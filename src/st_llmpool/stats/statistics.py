"""Statistical tests of paired scores: over corpora or tasks and over seeds, equivalence, ranks and items.

Two designs are compared by their differences, an array of U units and S seeds. Units are corpora, each the mean of its
tasks; with one corpus they are its tasks. Seeds are crossed with units: a seed is the same data and order everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

ALPHA = 0.05
ROPE = 0.01  # half of the region of practical equivalence, in score
CONFIDENCE = 0.95
DECIMALS = 6  # what mteb's files keep; beyond it, differences that are equal on paper differ by rounding errors
RANKED_CORPORA = 12  # from this number of corpora on, the signed-rank test over corpora is the confirmatory one
_RESAMPLES = 4000
_LEAST_UNITS = 6  # for an interval or an equivalence; fewer cannot be significant either

Array = NDArray[np.float64]


class DifferenceTest(NamedTuple):
    """Tests of many arrays of differences at once; every field has their leading dimensions.

    Args:
        mean: Mean over units and seeds.
        p_units: Two-sided p-value over units, see `difference_test`.
        p: p-value of the comparison: `p_units`, or that of the t test over units and seeds if it is larger; 1 if ranks
            and mean disagree in sign.
        p_equivalent: p-value of the two one-sided t tests (TOST): is the mean within ±rope? 1 below six units, which
            cannot show a difference either.
        error: Standard error of the mean, from units and seeds.
    """

    mean: Array
    p_units: Array
    p: Array
    p_equivalent: Array
    error: Array


def difference_test(
    values: ArrayLike, *, corpora: int, rope: float = ROPE, seed_error: tuple[float, float] | None = None
) -> DifferenceTest:
    """Test whether differences lie around zero, and whether their mean is within ±rope.

    *Over units*: the exact signed-rank test of the tasks of one corpus, or of twelve and more corpora; the exact
    sign-flip test of two to eleven corpora. *Over units and seeds*: the t test with variance s_U² / U + s_S² / S, where
    s_S is the deviation of the paired seed differences; its p-value is the mean of those with the degrees of freedom of
    either part, weighted by the parts (after Cochran and Cox; Welch's single number of degrees of freedom gave up to
    13 % of studies a false winner with three seeds). A comparison needs both tests, because one over units takes the
    luck of its seeds for an effect.

    Args:
        values: Differences (..., U, S), first minus second.
        corpora: Number of corpora that the units are, or belong to.
        rope: Half of the region of practical equivalence.
        seed_error: Variance of the mean difference from seeds, and its degrees of freedom, where they are known better
            than from these differences alone: pooled over pairs (the larger of it and their own counts, so that a
            design with noisier seeds is not tested with those of others), or of designs without common seeds (Welch).

    Example:
        >>> test = difference_test([[0.03], [0.01], [0.04], [0.02], [-0.005], [0.05]], corpora=1)
        >>> float(test.p), round(float(test.mean), 4), round(float(test.p_equivalent), 2)
        (0.0625, 0.0242, 0.93)
    """
    array = np.asarray(values, dtype=float).round(DECIMALS)
    count, seeds = array.shape[-2:]
    units, mean = array.mean(axis=-1).round(DECIMALS), array.mean(axis=(-2, -1))
    ranked = corpora == 1 or corpora >= RANKED_CORPORA
    p_units, sign = _signed_rank(units) if ranked else (_sign_flip(units), np.sign(mean))
    parts: list[tuple[Any, float]] = [(_variance_of_mean(units) if count > 1 else np.inf, max(count - 1, 1))]
    own = _variance_of_mean(array.mean(axis=-2)) if seeds > 1 else 0.0
    if seed_error is not None:
        parts.append((np.maximum(own, seed_error[0]), seed_error[1]))
    elif seeds > 1:
        parts.append((own, seeds - 1))
    variances = [np.broadcast_to(np.asarray(part, dtype=float), mean.shape) for part, _ in parts]
    error = np.sqrt(sum(variances))

    def tail(distance: Array) -> Array:
        """Return P(T > distance / error), the mean of the tails of each part's t weighted by its variance."""
        with np.errstate(divide="ignore", invalid="ignore"):
            tails = [part * stats.t.sf(distance / error, dof) for part, (_, dof) in zip(variances, parts, strict=True)]
            weighted = sum(tails) / error**2
        return np.where(error < 0.1**DECIMALS / 10, distance <= 0, np.where(np.isinf(error), 0.5, weighted))

    p_crossed = 2 * tail(abs(mean)) if len(parts) > 1 else p_units
    p = np.where(np.sign(mean) * sign < 0, 1.0, np.maximum(p_units, p_crossed).clip(max=1))
    p_equivalent = np.maximum(tail(rope - mean), tail(rope + mean)) if count >= _LEAST_UNITS else np.ones(mean.shape)
    return DifferenceTest(mean, p_units, p, p_equivalent, error)


def pooled_seed_error(parts: Sequence[tuple[int, ArrayLike]], designs: int) -> tuple[Any, float]:
    """Return the variance of a paired seed difference, the mean over the pairs of a family, and its degrees of freedom.

    Args:
        parts: Number S of seeds of each pair, and the variance of its mean difference that seeds make.
        designs: Number of designs in the family; crossed with S seeds they leave (designs - 1)(S - 1) degrees.

    Example:
        >>> pooled_seed_error([(3, 1e-6), (3, 3e-6)], designs=3)
        (np.float64(6e-06), 4)
    """
    if not parts:
        return math.nan, 1
    seeds = max(2, min(count for count, _ in parts))
    return np.mean([count * np.asarray(part) for count, part in parts], axis=0)[()], (designs - 1) * (seeds - 1)


def _variance_of_mean(values: Array) -> Array:
    return np.asarray(values.var(axis=-1, ddof=1) / values.shape[-1])


def _sign_flip(values: Array) -> Array:
    """Return the exact two-sided p-value of the mean of values (..., U) over all assignments of signs."""
    signs = np.array([(1, *rest) for rest in product((1, -1), repeat=values.shape[-1] - 1)])
    sums = abs(values @ signs.T)
    return np.asarray((sums >= sums[..., :1] - 0.1**DECIMALS / 10).mean(axis=-1))


def _signed_rank(values: Array) -> tuple[Array, Array]:
    """Return the exact two-sided p-values of the signed-rank test of values (..., U), and the signs of W+ - W-."""
    rows = values.reshape(-1, values.shape[-1])
    ranks = stats.rankdata(abs(rows), axis=1)
    w_plus = (ranks * (rows > 0)).sum(axis=1)
    table = signed_rank_p(np.arange(1, rows.shape[1] + 1))
    total = len(table) // 2
    p_values = table[(2 * np.minimum(w_plus, total - w_plus)).astype(int)]
    signs = np.sign(2 * w_plus - total)
    ordered = np.sort(abs(rows), axis=1)
    for place in np.flatnonzero((ordered[:, 0] == 0) | (np.diff(ordered, axis=1) == 0).any(axis=1)):  # ties, zeros
        kept = rows[place][rows[place] != 0]
        own = stats.rankdata(abs(kept))
        plus, minus = own[kept > 0].sum(), own[kept < 0].sum()
        p_values[place] = signed_rank_p(own)[round(2 * min(plus, minus))]
        signs[place] = np.sign(plus - minus)
    return p_values.reshape(values.shape[:-1]), signs.reshape(values.shape[:-1])


def signed_rank_p(ranks: ArrayLike) -> Array:
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
    """Return the smallest two-sided p-value of n differences other than zero: all signs equal, tied or not.

    Example:
        >>> smallest_p(5), smallest_p(6)
        (0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - n))


def rank_biserial(values: Array) -> float:
    """Return the matched-pairs rank-biserial correlation of values (U,), (W+ - W-) / (W+ + W-); 1 if all are positive.

    Example:
        >>> round(rank_biserial(np.array([0.03, 0.01, 0.04, 0.02, -0.005, 0.05])), 3)
        0.905
    """
    kept = values.round(DECIMALS)
    kept = kept[kept != 0]
    ranks = stats.rankdata(abs(kept))
    return float((np.sign(kept) * ranks).sum() / ranks.sum()) if len(kept) else 0.0


def holm(p_values: ArrayLike) -> Array:
    """Return p-values (..., T) corrected for T tests along the last axis (Holm 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3)
        array([0.03, 0.06, 0.06])
    """
    values = np.asarray(p_values, dtype=float)
    order = values.argsort(axis=-1)
    steps = np.take_along_axis(values, order, axis=-1) * np.arange(values.shape[-1], 0, -1)
    corrected = np.maximum.accumulate(steps, axis=-1).clip(max=1)
    return np.take_along_axis(corrected, order.argsort(axis=-1), axis=-1)


BETTER, WORSE, UNDECIDED, EQUIVALENT = 1, -1, 0, 2


def decide(tested: DifferenceTest, *, alpha: float = ALPHA, in_rope: ArrayLike = 1.0) -> NDArray[np.int_]:
    """Return the verdict on each of T comparisons: `BETTER`, `WORSE`, `EQUIVALENT` or `UNDECIDED`.

    Both kinds of p-values are corrected for the T tests by Holm. Equivalent takes precedence: a difference that is
    significant and within ±rope does not matter.

    Args:
        tested: Tests with fields (..., T).
        alpha: Level of significance.
        in_rope: Bayesian probability of equivalence (..., T); an equivalence needs 1 - alpha.
    """
    equivalent = (holm(tested.p_equivalent) <= alpha) & (np.asarray(in_rope) >= 1 - alpha)
    ordered = np.where(holm(tested.p) <= alpha, np.sign(tested.mean).astype(int), UNDECIDED)
    return np.where(equivalent, EQUIVALENT, ordered)


def signed_rank_posterior(values: ArrayLike, rope: float, *, samples: int = 4000) -> tuple[float, float, float]:
    """Return the probabilities that the second is better, that both are equivalent, and that the first is better.

    The Bayesian signed-rank test (Benavoli et al. 2017, JMLR 18): weights of the units are Dirichlet, with a prior
    strength of 0.5 on an equivalent unit, and a sample counts for the region in which most means of two units lie.

    Args:
        values: Differences (U,), first minus second.
        rope: Half of the region of practical equivalence.
        samples: Number of samples of the weights.

    Example:
        >>> _, _, first = signed_rank_posterior([0.03, 0.05, 0.04, 0.06, 0.02, 0.05, 0.04], 0.01)
        >>> first > 0.99
        True
    """
    points = np.concatenate([[0.0], np.asarray(values, dtype=float)])
    weights = np.random.default_rng(0).dirichlet([0.5, *np.ones(len(points) - 1)], size=samples)
    means = np.add.outer(points, points) / 2
    masses = [
        ((weights @ region) * weights).sum(axis=1) for region in (means < -rope, abs(means) <= rope, means > rope)
    ]
    left, within, right = np.bincount(np.argmax(masses, axis=0), minlength=3) / samples
    return float(left), float(within), float(right)


def resampled_interval(corpora: Sequence[Array], seed_error: tuple[float, float] | None = None) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference, by resampling corpora and then the tasks within each.

    Resampling few units gives intervals that are too short, so deviations are stretched by √(U / (U - 1)) and by the
    quantile of t over that of the normal distribution. The luck of seeds is added as draws of t.

    Args:
        corpora: Differences of the tasks of each corpus, averaged over seeds.
        seed_error: Variance of the mean difference that seeds make, and its degrees of freedom.

    Returns:
        The ends; NaN for fewer than six units.

    Example:
        >>> low, high = resampled_interval([np.array([0.01 * n]) for n in range(12)])
        >>> round(low, 3), round(high, 3)
        (0.033, 0.077)
    """
    sizes = np.array([len(tasks) for tasks in corpora])
    units = len(corpora) if len(corpora) > 1 else sizes[0]
    if units < _LEAST_UNITS:
        return math.nan, math.nan
    rng = np.random.default_rng(0)
    padded = np.zeros((len(corpora), sizes.max()))
    for row, tasks in zip(padded, corpora, strict=True):
        row[: len(tasks)] = tasks
    drawn = (
        rng.integers(len(corpora), size=(_RESAMPLES, len(corpora)))
        if len(corpora) > 1
        else np.zeros((_RESAMPLES, 1), int)
    )
    places = (rng.random((*drawn.shape, sizes.max())) * sizes[drawn][..., None]).astype(int)
    inside = np.arange(sizes.max()) < sizes[drawn][..., None]
    means = ((padded[drawn[..., None], places] * inside).sum(axis=-1) / sizes[drawn]).mean(axis=-1)
    middle = float(np.mean([tasks.mean() for tasks in corpora]))
    tail = (1 - CONFIDENCE) / 2
    stretch = math.sqrt(units / (units - 1)) * stats.t.ppf(tail, units - 1) / stats.norm.ppf(tail)
    deviations = (means - middle) * stretch
    if seed_error is not None:
        deviations = deviations + math.sqrt(seed_error[0]) * rng.standard_t(seed_error[1], size=_RESAMPLES)
    low, high = middle + np.quantile(deviations, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class ItemTest:
    """The mean difference over items, for other items of the same tasks and for no other tasks.

    Args:
        tasks: Number of tasks T.
        items: Number of items in all tasks.
        mean_difference: Mean over tasks of the mean over their items, so that every task has the same weight.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p: Two-sided p-value.
    """

    tasks: int
    items: int
    mean_difference: float
    low: float
    high: float
    p: float


def item_test(differences: Mapping[str, ArrayLike]) -> ItemTest:
    """Test the mean difference over items of fixed tasks, variance Σ s_t² / n_t / T², Welch's degrees of freedom.

    Args:
        differences: Task to the differences of its items, first minus second, at least two.

    Raises:
        ValueError: If there is no task, or a task has fewer than two differences or one that is not finite.

    Example:
        >>> test = item_test({"a": [0.1, 0.3, 0.2], "b": [0.0, 0.2, 0.1], "c": [0.3, 0.1, 0.2]})
        >>> round(test.mean_difference, 3), round(test.p, 3)
        (0.167, 0.002)
    """
    groups = {task: np.asarray(values, dtype=float) for task, values in differences.items()}
    for task, values in groups.items():
        if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
            raise ValueError(f"task {task} must have at least two differences, all finite; it has {values}.")
    if not groups:
        raise ValueError("there is no task.")
    means, sizes, variances = np.array([(v.mean(), len(v), v.var(ddof=1)) for v in groups.values()]).T
    noise, mean = variances / sizes, float(means.mean())
    dof = noise.sum() ** 2 / (noise**2 / (sizes - 1)).sum() if noise.any() else np.float64(1.0)
    error = np.sqrt(noise.sum()) / len(groups)
    half = float(stats.t.isf((1 - CONFIDENCE) / 2, dof) * error)
    p = float(2 * stats.t.sf(abs(mean) / error, dof)) if error else float(mean == 0)
    return ItemTest(len(groups), int(sizes.sum()), mean, mean - half, mean + half, p)


@dataclass(frozen=True)
class RankTest:
    """Friedman's test: do the designs differ at all?

    Args:
        units: Number of corpora, or of tasks of one corpus, N.
        mean_ranks: Mean rank of each of the k designs, 1 is best, ties averaged; best first.
        chi_square: Friedman's statistic, corrected for ties.
        f: Iman and Davenport's F = (N - 1) χ² / (N (k - 1) - χ²), less conservative for few units.
        p: p-value of F, with k - 1 and (k - 1)(N - 1) degrees of freedom.
    """

    units: int
    mean_ranks: dict[str, float]
    chi_square: float
    f: float
    p: float


def rank_test(scores: pd.DataFrame) -> RankTest:
    """Rank designs on every unit, higher scores first, and test the mean ranks.

    Args:
        scores: One row for each of N >= 2 units, one column for each of k >= 3 designs, without gaps.

    Raises:
        ValueError: If there are too few rows or columns, or a score is missing.

    Example:
        >>> result = rank_test(pd.DataFrame({"a": [3, 3, 3, 2], "b": [2, 2, 1, 3], "c": [1, 1, 2, 1]}))
        >>> result.mean_ranks, result.chi_square
        ({'a': 1.25, 'b': 2.0, 'c': 2.75}, 4.5)
    """
    units, designs = scores.shape
    if units < 2 or designs < 3 or scores.isna().to_numpy().any():
        raise ValueError(f"{units} rows of {designs} designs: needed are 2 and 3 at least, each with a score.")
    ranks = scores.rank(axis=1, ascending=False)
    all_tied = (ranks.nunique(axis=1) == 1).all()
    chi_square = 0.0 if all_tied else float(stats.friedmanchisquare(*scores.to_numpy().T).statistic)
    rest = units * (designs - 1) - chi_square
    f = (units - 1) * chi_square / rest if rest > 1e-9 else math.inf
    mean_ranks = {str(name): float(rank) for name, rank in ranks.mean().sort_values().items()}
    return RankTest(units, mean_ranks, chi_square, f, float(stats.f.sf(f, designs - 1, (designs - 1) * (units - 1))))
