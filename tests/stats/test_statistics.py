from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from st_llmpool.stats.statistics import holm, paired_test, signed_rank_p, smallest_p
from tests.stats.closed_testing import closed_bonferroni
from tests.stats.demsar import AUC


def enumerated(differences: list[float]) -> tuple[float, float, float]:
    """W+, W- and the two-sided p-value by trying every assignment of signs; zeros are dropped."""
    nonzero = [d for d in differences if d != 0]
    sizes = sorted(abs(d) for d in nonzero)
    rank = {size: np.mean([i for i, s in enumerate(sizes, start=1) if s == size]) for size in sizes}
    w_plus = sum(rank[abs(d)] for d in nonzero if d > 0)
    w_minus = sum(rank[abs(d)] for d in nonzero if d < 0)
    extreme = 0
    for signs in itertools.product([0, 1], repeat=len(nonzero)):
        plus = sum(rank[size] for size, sign in zip(sizes, signs, strict=True) if sign)
        extreme += min(plus, sum(rank[size] for size in sizes) - plus) <= min(w_plus, w_minus)
    return w_plus, w_minus, extreme / 2 ** len(nonzero)


def test_six_differences_by_hand():
    """|d| ranks 4, 2, 5, 3, 1, 6, only rank 1 is negative; W <= 1 in 2 of 64 assignments on each side."""
    test = paired_test([0.03, 0.01, 0.04, 0.02, -0.005, 0.05])
    assert (test.w_plus, test.w_minus, test.statistic, test.p) == (20, 1, 1, 4 / 64)
    assert test.effect_size == pytest.approx(19 / 21)
    assert test.mean_difference == pytest.approx(0.145 / 6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_p_is_that_of_all_sign_assignments_also_with_ties_and_zeros(differences):
    test = paired_test(differences)
    w_plus, w_minus, p = enumerated(differences)
    assert (test.w_plus, test.w_minus, test.zeros) == (w_plus, w_minus, differences.count(0))
    # Where both sums are equal, twice the share of one side would count the middle twice: at most 1.
    assert test.p == pytest.approx(p if differences.count(0) < len(differences) else 1.0)


@pytest.mark.parametrize("n", [6, 12, 25, 50])
def test_p_and_statistic_are_those_of_scipy_without_ties(n):
    differences = np.random.default_rng(n).normal(0.3, 1, size=n)
    expected = stats.wilcoxon(differences.round(6), method="exact")
    test = paired_test(differences)
    assert test.statistic == expected.statistic
    assert test.p == pytest.approx(expected.pvalue, rel=1e-9)


def test_p_is_that_of_scipy_with_ties():
    differences = (AUC["C4.5+m"] - AUC["C4.5"]).round(6).to_numpy()
    nonzero = differences[differences != 0]
    expected = stats.wilcoxon(nonzero, method=stats.PermutationMethod(n_resamples=2 ** len(nonzero)))
    test = paired_test(differences)
    assert (test.n, test.zeros, test.statistic) == (14, 2, expected.statistic)
    assert test.p == pytest.approx(expected.pvalue)


def test_statistic_of_the_published_example():
    """Demšar gives R+ 93 and R- 12 with the two zeros ranked 1.5 and split; dropping them takes 2 from every rank."""
    test = paired_test(AUC["C4.5+m"] - AUC["C4.5"])
    assert test.w_plus == 93 - 1.5 - 10 * 2
    assert test.w_minus == 12 - 1.5 - 2 * 2


def test_equal_designs_are_called_different_at_most_as_often_as_the_level_says():
    """Exactly, not by chance: under the null every assignment of signs is as likely as any other."""
    for sizes in ([1, 2, 3, 4, 5, 6, 7], [1, 1, 2, 2, 2, 3, 5]):
        signs = itertools.product([-1, 1], repeat=len(sizes))
        p_values = np.array([paired_test(np.multiply(sign, sizes)).p for sign in signs])
        for level in (0.01, 0.05, 0.1, 0.5):
            assert (p_values <= level).mean() <= level


def test_differences_that_are_equal_on_paper_tie():
    """0.3 - 0.2, 0.2 - 0.1 and 0.7 - 0.6 are three numbers for a computer."""
    noisy = [0.3 - 0.2, 0.2 - 0.1, 0.7 - 0.6, -(0.4 - 0.3), 0.5]
    assert len(set(map(abs, noisy))) > 2
    assert (paired_test(noisy).w_plus, paired_test(noisy).w_minus) == (3 * 2.5 + 5, 2.5)


def test_no_difference_anywhere_is_no_evidence():
    test = paired_test([0.0, 1e-12, -1e-12])
    assert (test.p, test.effect_size, test.zeros) == (1.0, 0.0, 3)


@pytest.mark.parametrize("differences", [[], [[1.0]], [1.0, math.nan]])
def test_what_cannot_be_tested_is_refused(differences):
    with pytest.raises(ValueError, match="at least one finite number"):
        paired_test(differences)


def test_interval_is_that_of_resampling_by_hand():
    """Symmetric differences: the corrections of BCa vanish, and plain quantiles of resampled means remain."""
    differences = np.array([-3, -2, -1, 0, 1, 2, 3, -2.5, 2.5, 0.5, -0.5, 0]) + 10.0
    rng = np.random.default_rng(7)
    means = [rng.choice(differences, len(differences)).mean() for _ in range(20_000)]
    test = paired_test(differences)
    np.testing.assert_allclose([test.low, test.high], np.quantile(means, [0.025, 0.975]), atol=0.05)


def test_interval_leans_with_skewed_differences():
    """Against scipy's own on the same values, with other random numbers."""
    differences = np.random.default_rng(0).exponential(size=20)
    expected = stats.bootstrap((differences,), np.mean, rng=np.random.default_rng(99)).confidence_interval
    test = paired_test(differences)
    np.testing.assert_allclose([test.low, test.high], expected, atol=0.03)
    assert test.high - test.mean_difference > test.mean_difference - test.low


def test_five_pairs_have_no_interval_and_equal_ones_a_point():
    assert math.isnan(paired_test([1, 2, 3, 4, 5]).low)
    assert (paired_test([2.0] * 6).low, paired_test([2.0] * 6).high) == (2.0, 2.0)


def test_the_same_differences_give_the_same_interval():
    assert paired_test(range(1, 9)) == paired_test(range(1, 9))


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_never_falls():
    p_values = [0.04, 0.01, 0.03, 0.005, 0.6]
    expected, so_far = {}, 0.0
    for step, p in enumerate(sorted(p_values)):
        so_far = max(so_far, min(1.0, p * (len(p_values) - step)))
        expected[p] = so_far
    assert holm(p_values) == pytest.approx([expected[p] for p in p_values])
    assert holm([]) == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-6, 0.004, 0.01, 0.02, 0.04, 0.2, 0.5, 1.0]), min_size=1, max_size=7))
def test_holm_is_closed_testing_with_bonferroni(p_values):
    assert holm(p_values) == pytest.approx(closed_bonferroni(p_values))


@pytest.mark.parametrize("n", [1, 4, 6, 9])
def test_smallest_p_is_reached_when_all_signs_agree_and_never_undercut(n):
    assert smallest_p(n) == paired_test(range(1, n + 1)).p == signed_rank_p(range(1, n + 1)).min() == 2.0 ** (1 - n)
