"""Power of a study: the smallest p-value that it can reach, and the difference that its verdicts find."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from scipy import optimize

from ..utils.words import counted
from .results import counted_corpora
from .statistics import (
    ALPHA,
    BETTER,
    EQUIVALENT,
    ROPE,
    Array,
    DifferenceTest,
    decide,
    difference_test,
    pooled_seed_error,
    signed_rank_posterior,
    smallest_p,
)

POWER = 0.8
_SIMULATED = 2000
_WITH_POSTERIOR = 300


@dataclass(frozen=True)
class Pilot:
    """Standard deviations of the difference of two designs, from earlier runs.

    Args:
        units: Between corpora, or between the tasks of one corpus.
        seeds: Between seeds, common to all units.
        rest: Of a unit and seed, beyond both.
    """

    units: float = 0.01
    seeds: float = 0.003
    rest: float = 0.003

    @classmethod
    def of(cls, values: Array) -> Pilot:
        """Estimate the three from differences (U, S) by the analysis of variance of two crossed factors.

        Example:
            >>> Pilot.of(np.array([[0.01, 0.02], [0.03, 0.04], [0.02, 0.03]]))
            Pilot(units=0.01, seeds=0.0071, rest=0.0)
        """
        count, seeds = values.shape
        by_unit, by_seed = values.mean(axis=1), values.mean(axis=0)
        rest = values - by_unit[:, None] - by_seed + values.mean()
        noise = (rest**2).sum() / max((count - 1) * (seeds - 1), 1)
        of_units = (by_unit.var(ddof=1) if count > 1 else 0.0) - noise / seeds
        of_seeds = (by_seed.var(ddof=1) if seeds > 1 else 0.0) - noise / count
        return cls(*(round(math.sqrt(max(0.0, float(v))), 4) for v in (of_units, of_seeds, noise)))


@dataclass(frozen=True)
class Plan:
    """Power of a family of comparisons, known before anything runs.

    Args:
        corpora: Number of corpora over which each pair of designs is compared.
        tasks: Number of their tasks.
        tests: Number of pairs; Holm corrects for them.
        seeds: Number of crossed seeds.
        designs: Number of designs in these pairs, whose seed noise is pooled.
        alpha: Level of significance.
        rope: Half of the region of practical equivalence.
        pilot: How much differences vary.

    Example:
        >>> print(Plan(corpora=12, tasks=12, tests=6, seeds=3, designs=5))
        12 corpora, 12 tasks, 3 seeds, 6 tests: smallest corrected p 0.00293; finds a difference of 0.0151 in 80 % of
        studies and calls equal designs equivalent in 17 %, if differences vary by 0.0100 (corpora), 0.0030 (seeds) and
        0.0030 (rest).
        >>> print(Plan(corpora=1, tasks=5, tests=1))
        1 corpus, 5 tasks, 1 seed, 1 test: smallest corrected p 0.0625; cannot reach 0.05 whatever the scores are.
    """

    corpora: int
    tasks: int
    tests: int
    seeds: int = 1
    designs: int = 2
    alpha: float = ALPHA
    rope: float = ROPE
    pilot: Pilot = Pilot()

    @property
    def units(self) -> int:
        """Number of corpora, or of tasks of a single corpus."""
        return self.corpora if self.corpora > 1 else self.tasks

    @property
    def smallest_p(self) -> float:
        """The smallest p-value after Holm's correction, tests · 2^(1 - units): all differences of one sign."""
        return min(1.0, self.tests * smallest_p(self.units))

    @property
    def reachable(self) -> bool:
        """Whether any result could be significant."""
        return self.smallest_p <= self.alpha

    @cached_property
    def detectable(self) -> float:
        """The difference that the verdicts find in 80 % of studies; infinite if they cannot, see `power`."""
        return _detectable(replace(self, tasks=self.units))

    def power(self, difference: float, outcome: int = BETTER) -> float:
        """Return how often one pair gets a verdict among `tests` pairs, whose others do not differ.

        Studies are simulated with the variances of `pilot` and decided by `statistics.decide`, as real ones are.

        Args:
            difference: True mean difference of the pair.
            outcome: The verdict.
        """
        if not self.reachable:
            return 0.0
        simulation = _simulation(replace(self, tasks=self.units))
        return simulation.rate(difference, outcome)

    def __str__(self) -> str:
        names = ((self.tasks, "task"), (self.seeds, "seed"), (self.tests, "test"))
        size = ", ".join([counted_corpora(self.corpora), *(counted(number, noun) for number, noun in names)])
        start = f"{size}: smallest corrected p {self.smallest_p:.3g}"
        if not self.reachable:
            return f"{start}; cannot reach {self.alpha} whatever the scores are."
        pilot, what = self.pilot, "corpora" if self.corpora > 1 else "tasks"
        found = f"finds a difference of {self.detectable:.4f} in {100 * POWER:.0f} % of studies"
        return (
            f"{start}; {found} and calls equal designs equivalent in {100 * self.power(0.0, EQUIVALENT):.0f} %, if "
            f"differences vary by {pilot.units:.4f} ({what}), {pilot.seeds:.4f} (seeds) and {pilot.rest:.4f} (rest)."
        )


class _Simulation:
    """Simulated studies of a plan; the pairs that do not differ are tested once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        rng = np.random.default_rng(0)
        shape = (plan.tests, _SIMULATED, plan.units, plan.seeds)
        noise = np.zeros(shape)
        for spread, axes in ((plan.pilot.units, (3,)), (plan.pilot.seeds, (2,)), (plan.pilot.rest, ())):
            size = [1 if axis in axes else length for axis, length in enumerate(shape)]
            noise += rng.normal(0, spread, size=size)
        self._seed_error = None
        if plan.seeds > 1:
            own = noise.mean(axis=2).var(axis=-1, ddof=1) / plan.seeds
            variance, dof = pooled_seed_error([(plan.seeds, part) for part in own], plan.designs)
            self._seed_error = (variance / plan.seeds, dof)
        self._noise = noise[0]
        self._others = self._test(noise[1:]) if plan.tests > 1 else None

    def rate(self, difference: float, outcome: int) -> float:
        tested = self._test(self._noise[None] + difference)
        if self._others is not None:
            tested = DifferenceTest(*(np.concatenate(both) for both in zip(tested, self._others, strict=True)))
        tested = DifferenceTest(*(field.T for field in tested))
        found = decide(tested, alpha=self._plan.alpha)[:, 0] == outcome
        if outcome != EQUIVALENT:
            return float(found.mean())
        units = (self._noise.mean(axis=-1) + difference)[:_WITH_POSTERIOR]  # the posterior of each takes milliseconds
        least = 1 - self._plan.alpha
        sure = [
            within and signed_rank_posterior(row, self._plan.rope)[1] >= least
            for within, row in zip(found, units, strict=False)
        ]
        return float(np.mean(sure))

    def _test(self, values: Array) -> DifferenceTest:
        plan = self._plan
        return difference_test(values, corpora=plan.corpora, rope=plan.rope, seed_error=self._seed_error)


@lru_cache(maxsize=16)
def _simulation(plan: Plan) -> _Simulation:
    return _Simulation(plan)


@lru_cache(maxsize=256)
def _detectable(plan: Plan) -> float:
    pilot = plan.pilot
    largest = plan.rope + 50 * max(pilot.units, pilot.seeds, pilot.rest, 1e-4)
    if plan.power(largest) < POWER:
        return math.inf
    return float(optimize.bisect(lambda effect: plan.power(effect) - POWER, 0, largest, xtol=1e-5))
