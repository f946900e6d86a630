"""Power of a study: the smallest p-value that it can reach, and the minimal detectable effect."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from statsmodels.stats.power import TTestPower

from ..utils.words import counted
from .statistics import signed_rank_p, smallest_p

ALPHA = 0.05
POWER = 0.8
_SIMULATED = 10_000


@dataclass(frozen=True)
class Plan:
    """Power of a family of tests, known before anything runs.

    Args:
        tasks: Number of tasks over which each pair of designs is compared.
        tests: Number of pairs; Holm corrects for them.
        alpha: Level of significance.

    Example:
        >>> print(Plan(tasks=12, tests=6))
        12 tasks, 6 tests: smallest corrected p 0.00293; minimal detectable effect 1.27 standard deviations
        of the task differences at 80 % power.
        >>> print(Plan(tasks=5, tests=1))
        5 tasks, 1 test: smallest corrected p 0.0625; cannot reach 0.05 whatever the scores are.
    """

    tasks: int
    tests: int
    alpha: float = ALPHA

    @property
    def smallest_p(self) -> float:
        """The smallest p-value after Holm's correction, tests · 2^(1 - tasks): all differences of one sign."""
        return min(1.0, self.tests * smallest_p(self.tasks))

    @property
    def reachable(self) -> bool:
        """Whether any result could be significant."""
        return self.smallest_p <= self.alpha

    @property
    def effect(self) -> float:
        """Minimal detectable effect at 80 % power, see `detectable_effect`."""
        return detectable_effect(self.tasks, tests=self.tests, alpha=self.alpha)

    def __str__(self) -> str:
        size = f"{counted(self.tasks, 'task')}, {counted(self.tests, 'test')}"
        start = f"{size}: smallest corrected p {self.smallest_p:.3g}"
        if not self.reachable:
            return f"{start}; cannot reach {self.alpha} whatever the scores are."
        return (
            f"{start}; minimal detectable effect {self.effect:.2f} standard deviations of the task differences at "
            f"{100 * POWER:.0f} % power."
        )


def power(effect: float, tasks: int, *, tests: int = 1, alpha: float = ALPHA) -> float:
    """Return how often the signed-rank test over tasks finds an effect, at the level alpha / tests.

    This is the first and hardest step of Holm's correction. Differences are normal; 10,000 studies are simulated from a
    fixed seed.

    Args:
        effect: Mean of the task differences, in their standard deviations.
        tasks: Number of tasks.
        tests: Number of tests in the family.
        alpha: Level of significance.

    Example:
        >>> power(0.0, 12) <= 0.05, power(1.0, 12) > 0.8
        (True, True)
    """
    if tests * smallest_p(tasks) > alpha:
        return 0.0
    differences = _noise(tasks) + effect
    ranks = abs(differences).argsort(axis=1).argsort(axis=1) + 1
    w_plus = np.where(differences > 0, ranks, 0).sum(axis=1)
    statistics = np.minimum(w_plus, tasks * (tasks + 1) // 2 - w_plus)
    return float((_p_values(tasks)[2 * statistics] <= alpha / tests).mean())


@lru_cache(maxsize=256)
def detectable_effect(tasks: int, *, tests: int = 1, alpha: float = ALPHA, rate: float = POWER) -> float:
    """Return the smallest effect that is found at a given rate; infinite if no result could be significant.

    Args:
        tasks: Number of tasks.
        tests: Number of tests in the family.
        alpha: Level of significance.
        rate: Fraction of studies that must find the effect.

    Returns:
        Mean of the task differences, in their standard deviations.

    Example:
        >>> detectable_effect(5)
        inf
        >>> round(detectable_effect(12), 1)
        0.9
    """
    if tests * smallest_p(tasks) > alpha:
        return math.inf

    return float(
        optimize.bisect(lambda effect: power(effect, tasks, tests=tests, alpha=alpha) - rate, 0, 50, xtol=1e-3)
    )


def detectable_item_effect(
    tasks: int,
    items: int,
    *,
    sd_tasks: float,
    sd_items: float,
    tests: int = 1,
    alpha: float = ALPHA,
    rate: float = POWER,
) -> float:
    """Return the mean difference that `item_test` finds at a given rate, in the unit of the scores.

    More items help until √(sd_items² / items) is small against `sd_tasks`; after that only more tasks do.

    Args:
        tasks: Number of tasks, at least two.
        items: Number of items (queries, pairs, texts) in each task.
        sd_tasks: Standard deviation of the true difference between tasks.
        sd_items: Standard deviation of the difference between items of one task.
        tests: Number of tests in the family.
        alpha: Level of significance.
        rate: Fraction of studies that must find the difference.

    Example:
        >>> round(detectable_item_effect(12, 100, sd_tasks=0.01, sd_items=0.1), 4)
        0.0126
    """
    standardised = TTestPower().solve_power(nobs=tasks, alpha=alpha / tests, power=rate, alternative="two-sided")
    return float(np.squeeze(standardised)) * math.sqrt(sd_tasks**2 + sd_items**2 / items)


@lru_cache(maxsize=8)
def _noise(tasks: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).standard_normal((_SIMULATED, tasks))


@lru_cache(maxsize=8)
def _p_values(tasks: int) -> NDArray[np.float64]:
    return signed_rank_p(np.arange(1, tasks + 1))
