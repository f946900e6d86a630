from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from st_llmpool.stats.power_analysis import Pilot, Plan
from st_llmpool.stats.statistics import EQUIVALENT, WORSE


@pytest.mark.parametrize(
    ("corpora", "tasks", "tests", "smallest", "reachable"),
    [
        (1, 5, 1, 1 / 16, False),
        (1, 6, 1, 1 / 32, True),
        (6, 60, 2, 1 / 16, False),
        (8, 8, 6, 6 / 128, True),
        (1, 1, 3, 1.0, False),
    ],
)
def test_plan_states_the_smallest_corrected_p(corpora, tasks, tests, smallest, reachable):
    plan = Plan(corpora, tasks, tests)
    assert (plan.smallest_p, plan.reachable) == (smallest, reachable)
    assert math.isfinite(plan.detectable) is reachable
    assert ("cannot reach 0.05" in str(plan)) is not reachable


@pytest.mark.parametrize("corpora", [1, 12])
def test_without_seed_noise_the_promise_is_kept_by_scipys_test_on_other_random_numbers(corpora):
    plan = Plan(corpora, 12, tests=6, rope=0.0, pilot=Pilot(0.01, 0.0, 0.0))
    differences = np.random.default_rng(5).normal(plan.detectable, 0.01, size=(2000, 12))
    rate = (stats.wilcoxon(differences, axis=1, method="exact").pvalue <= 0.05 / 6).mean()
    assert rate == pytest.approx(0.8, abs=0.03)


def test_six_units_must_all_agree():
    """Only six equal signs are significant, so the power is Φ(effect)⁶."""
    plan = Plan(1, 6, 1, rope=0.0, pilot=Pilot(0.01, 0.0, 0.0))
    assert plan.power(0.015) == pytest.approx(stats.norm.cdf(1.5) ** 6, abs=0.02)
    assert plan.detectable == pytest.approx(0.01 * stats.norm.ppf(0.8 ** (1 / 6)), abs=5e-4)


def test_without_an_effect_power_is_the_rate_of_false_findings():
    plan = Plan(12, 12, 6, seeds=3, designs=4, rope=0.0)
    assert plan.power(0.0) + plan.power(0.0, WORSE) <= 0.05 / 6 + 0.006


def test_power_grows_with_units_and_seeds_and_falls_with_tests():
    plan = Plan(12, 12, 6, seeds=3, designs=5)
    assert plan.power(0.005) < plan.power(0.015) < plan.power(0.03)
    assert replace(plan, corpora=20).detectable < plan.detectable < replace(plan, corpora=8).detectable
    assert replace(plan, seeds=6).detectable < plan.detectable
    assert replace(plan, tests=1).detectable < plan.detectable


def test_equivalence_needs_a_region_that_the_noise_leaves_room_in():
    plan = Plan(12, 12, 1, seeds=3, pilot=Pilot(0.005, 0.001, 0.001))
    assert plan.power(0.0, EQUIVALENT) > 0.8
    assert plan.power(0.01, EQUIVALENT) <= 0.06
    assert replace(plan, rope=0.001).power(0.0, EQUIVALENT) == 0.0


def test_pilot_recovers_the_variances_of_crossed_units_and_seeds():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, (60, 1)) + rng.normal(0, 0.02, (1, 50)) + rng.normal(0, 0.005, (60, 50))
    assert list(vars(Pilot.of(noise)).values()) == pytest.approx([0.01, 0.02, 0.005], rel=0.2)


def test_pilot_of_a_few_units_and_seeds_is_right_on_average():
    rng = np.random.default_rng(1)
    draws = [rng.normal(0, 1, (6, 1)) + rng.normal(0, 1, (1, 4)) + rng.normal(0, 2, (6, 4)) for _ in range(400)]
    squares = np.mean([[value**2 for value in vars(Pilot.of(noise)).values()] for noise in draws], axis=0)
    assert squares == pytest.approx([1.0, 1.0, 4.0], rel=0.35)  # negative estimates count as zero
