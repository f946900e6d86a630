"""Holm's correction by another road: closed testing with Bonferroni tests, by trying every set of hypotheses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def closed_bonferroni(p_values: Sequence[float]) -> list[float]:
    """A hypothesis is rejected if every set that holds it is; a set's p-value is its size times its smallest p."""
    every = range(len(p_values))
    adjusted = [0.0] * len(p_values)
    for size in range(1, len(p_values) + 1):
        for chosen in itertools.combinations(every, size):
            p = min(1.0, size * min(p_values[place] for place in chosen))
            for place in chosen:
                adjusted[place] = max(adjusted[place], p)
    return adjusted
