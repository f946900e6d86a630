from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from st_llmpool.stats.power_analysis import Plan, detectable_effect, detectable_item_effect, power


@pytest.mark.parametrize(
    ("tasks", "tests", "smallest", "reachable"),
    [(5, 1, 1 / 16, False), (6, 1, 1 / 32, True), (6, 2, 1 / 16, False), (8, 6, 6 / 128, True), (1, 3, 1.0, False)],
)
def test_plan_states_the_smallest_corrected_p(tasks, tests, smallest, reachable):
    plan = Plan(tasks, tests)
    assert (plan.smallest_p, plan.reachable) == (smallest, reachable)
    assert math.isfinite(plan.effect) is reachable
    assert ("cannot reach 0.05" in str(plan)) is not reachable


@pytest.mark.parametrize(("tasks", "tests"), [(7, 1), (12, 1), (12, 6), (60, 6)])
def test_planned_effect_is_found_at_the_promised_rate(tasks, tests):
    """By scipy's test on other random numbers."""
    effect = detectable_effect(tasks, tests=tests)
    differences = np.random.default_rng(5).normal(effect, 1, size=(2000, tasks))
    method = "exact" if tasks <= 50 else "asymptotic"
    rate = (stats.wilcoxon(differences, axis=1, method=method).pvalue <= 0.05 / tests).mean()
    assert rate == pytest.approx(0.8, abs=0.03)


def test_without_an_effect_power_is_the_rate_of_false_findings():
    """With 7 tasks the levels that occur are multiples of 1/64: of those at or below 0.05 the largest is 3/64."""
    assert power(0, 7) == pytest.approx(3 / 64, abs=0.01)
    assert power(0, 12, tests=6) <= 0.05 / 6 + 0.003


def test_power_grows_with_the_effect_and_with_tasks_and_falls_with_tests():
    assert power(0.3, 12) < power(0.8, 12) < power(1.5, 12)
    assert detectable_effect(8) > detectable_effect(12) > detectable_effect(40)
    assert detectable_effect(12, tests=6) > detectable_effect(12, tests=1)
    assert detectable_effect(12, rate=0.9) > detectable_effect(12, rate=0.8)


def test_six_tasks_must_all_agree():
    """Only six equal signs are significant, so the power is Φ(effect)⁶ (and next to nothing for six losses)."""
    assert power(1.5, 6) == pytest.approx(stats.norm.cdf(1.5) ** 6, abs=0.015)
    assert detectable_effect(6) == pytest.approx(stats.norm.ppf(0.8 ** (1 / 6)), abs=0.05)


def test_item_effect_is_that_of_the_t_test_on_task_means():
    spread = math.sqrt(0.02**2 + 0.3**2 / 50)
    effect = detectable_item_effect(12, 50, sd_tasks=0.02, sd_items=0.3, tests=3)
    quantile = stats.t.isf(0.05 / 3 / 2, 11)
    found = stats.nct.sf(quantile, 11, effect / spread * math.sqrt(12))
    assert found == pytest.approx(0.8, abs=1e-3)
