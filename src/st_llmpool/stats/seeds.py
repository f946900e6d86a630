"""Seed noise: how much the same design differs from itself when only the seed changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .statistics import CONFIDENCE


@dataclass(frozen=True)
class SeedNoise:
    """Seeds nested in designs: the variance of runs, split into that of designs and that of seeds.

    Args:
        runs: Number of runs (seeds) of each design.
        sd_seeds: Standard deviation between runs of one design, pooled over designs.
        sd_designs: Standard deviation between designs, without the part that the seeds make. Zero if the designs
            differ no more than seeds do.
        dof: Degrees of freedom of `sd_seeds`, runs minus designs.
        p: p-value of the one-way analysis of variance: do designs differ more than seeds do?
    """

    runs: dict[str, int]
    sd_seeds: float
    sd_designs: float
    dof: int
    p: float

    def least_difference(self, first: str, second: str) -> float:
        """Returns t · sd_seeds · √(1/n₁ + 1/n₂): means that differ by less differ no more than seeds do (at 95 %)."""
        quantile = float(stats.t.isf((1 - CONFIDENCE) / 2, self.dof))
        return quantile * self.standard_error(first, second)

    def standard_error(self, first: str, second: str) -> float:
        """Returns the standard deviation that seeds give to the difference of two means."""
        return self.sd_seeds * math.sqrt(1 / self.runs[first] + 1 / self.runs[second])


def seed_noise(scores: Mapping[str, ArrayLike]) -> SeedNoise | None:
    """Compares the variance between seeds with the variance between designs.

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
    # Runs per design; where they differ, the number that makes the expected mean squares right.
    each = (total - sum(n**2 for n in runs.values()) / total) / (designs - 1)
    p = float(stats.f.sf(between / within, designs - 1, dof)) if within else float(between == 0)
    return SeedNoise(runs, math.sqrt(within), math.sqrt(max(0.0, (between - within) / each)), dof, p)
