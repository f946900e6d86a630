from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from st_llmpool.stats.seeds import seed_noise

RUNS = {"a": [0.50, 0.53, 0.51], "b": [0.55, 0.52], "c": [0.60, 0.58, 0.61, 0.59]}


def test_p_is_that_of_the_one_way_analysis_of_variance():
    assert seed_noise(RUNS).p == pytest.approx(stats.f_oneway(*RUNS.values()).pvalue)


def test_noise_of_seeds_is_the_pooled_deviation_from_the_mean_of_the_own_design():
    noise = seed_noise(RUNS)
    squares = sum((score - sum(own) / len(own)) ** 2 for own in RUNS.values() for score in own)
    assert (noise.dof, noise.sd_seeds) == (6, pytest.approx(math.sqrt(squares / 6)))


def test_least_difference_is_half_the_interval_of_two_means():
    """With two designs that is the usual t interval of two samples."""
    two = {name: RUNS[name] for name in "ab"}
    interval = stats.ttest_ind(two["a"], two["b"]).confidence_interval()
    assert seed_noise(two).least_difference("a", "b") == pytest.approx((interval.high - interval.low) / 2)


def test_variance_of_designs_is_found_beside_that_of_seeds():
    rng = np.random.default_rng(0)
    noise = seed_noise({str(d): rng.normal(mean, 0.01, size=3) for d, mean in enumerate(rng.normal(0, 0.03, size=500))})
    assert (noise.sd_seeds, noise.sd_designs) == (pytest.approx(0.01, rel=0.05), pytest.approx(0.03, rel=0.1))


def test_designs_that_differ_as_seeds_do_have_no_variance_of_their_own():
    assert seed_noise({"a": [0.1, 0.3], "b": [0.3, 0.1]}).sd_designs == 0.0


def test_unequal_numbers_of_runs_keep_the_estimate_unbiased():
    rng = np.random.default_rng(1)
    estimates = []
    for _ in range(300):
        means = rng.normal(0, 0.03, size=6)
        runs = {str(d): rng.normal(m, 0.01, size=1 + 2 * (d % 3)) for d, m in enumerate(means)}
        estimates.append(seed_noise(runs).sd_designs ** 2)
    assert math.sqrt(np.mean(estimates)) == pytest.approx(0.03, rel=0.08)


def test_single_runs_leave_the_noise_unknown():
    assert seed_noise({"a": [0.5], "b": [0.6]}) is None
