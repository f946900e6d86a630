"""The test over items (queries, pairs, texts), clustered by task: what many items add to few tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from .statistics import CONFIDENCE


@dataclass(frozen=True)
class ItemTest:
    """Two answers from the same items: for tasks like these, and for these tasks only.

    Args:
        tasks: Tasks T.
        items: Items in all tasks.
        mean_difference: Mean over tasks of the mean over their items: every task counts alike, as in the test over
            tasks.
        low: Lower end of the 95 % interval for tasks like these.
        high: Upper end.
        p: Two-sided p-value for tasks like these; NaN with one task.
        low_here: Lower end of the 95 % interval for these tasks only.
        high_here: Upper end.
        p_here: Two-sided p-value for these tasks only.
        sd_tasks: Standard deviation of the difference between tasks, without the part that the choice of items makes.
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
    """Tests the mean difference over items, whose errors are taken as related within a task.

    **Tasks like these** (`p`): a linear model of the item differences with a constant only, every task weighing the
    same, standard errors clustered by task (CR1) and T - 1 degrees of freedom. With these weights it is the t test of
    the T task means. Items of one task need not be independent, and tasks may differ in their true difference.
    A percentile bootstrap over tasks and then items, the usual alternative, was measured and rejected: with few tasks
    it finds differences between equal designs far too often, with many it counts the noise of the items twice.

    **These tasks only** (`p_here`): the tasks are fixed, their items are drawn independently. The variance is
    Σ s_t² / n_t / T², with Welch's degrees of freedom. It says whether other items of the same tasks would show the
    same, and nothing about other tasks.

    Args:
        differences: Task to the differences of its items, first minus second, two items at least.

    Raises:
        ValueError: If there is no task, or a task has fewer than two items or one that is not finite.

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
    means = np.array([values.mean() for values in groups.values()])
    sizes = np.array([len(values) for values in groups.values()])
    variances = np.array([values.var(ddof=1) for values in groups.values()])
    tasks, noise = len(groups), variances / sizes
    spread = means.var(ddof=1) if tasks > 1 else math.nan
    mean = float(means.mean())
    low, high, p = _t_test(mean, math.sqrt(spread / tasks), tasks - 1)
    dof_here = noise.sum() ** 2 / (noise**2 / (sizes - 1)).sum() if noise.any() else 1.0
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


def _t_test(mean: float, standard_error: float, dof: float) -> tuple[float, float, float]:
    if math.isnan(standard_error):
        return math.nan, math.nan, math.nan
    if standard_error == 0:
        return mean, mean, float(mean == 0)
    half = float(stats.t.isf((1 - CONFIDENCE) / 2, dof)) * standard_error
    return mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / standard_error, dof))
