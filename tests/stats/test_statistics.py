from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from st_llmpool.stats.statistics import holm, item_test, paired_test, rank_test, seed_noise, signed_rank_p, smallest_p
from tests.stats.closed_testing import closed_bonferroni
from tests.stats.demsar import AUC, MEAN_RANKS, TIE_CORRECTION
from tests.stats.validation import item_rates

RUNS = {"a": [0.50, 0.53, 0.51], "b": [0.55, 0.52], "c": [0.60, 0.58, 0.61, 0.59]}


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


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-6, 0.004, 0.01, 0.02, 0.04, 0.2, 0.5, 1.0]), min_size=1, max_size=5))
def test_holm_is_closed_testing_with_bonferroni(p_values):
    assert holm(p_values) == pytest.approx(closed_bonferroni(p_values))


@pytest.mark.parametrize("n", [1, 4, 6, 9])
def test_smallest_p_is_reached_when_all_signs_agree_and_never_undercut(n):
    assert smallest_p(n) == paired_test(range(1, n + 1)).p == signed_rank_p(range(1, n + 1)).min() == 2.0 ** (1 - n)


@pytest.fixture
def differences():
    rng = np.random.default_rng(3)
    sizes = {"a": 40, "b": 5, "c": 100, "d": 17}
    return {task: rng.normal(0.03 * place, 0.2, size=n) for place, (task, n) in enumerate(sizes.items())}


def test_tasks_like_these_is_the_clustered_regression_of_statsmodels(differences):
    values = np.concatenate(list(differences.values()))
    tasks = np.repeat(list(differences), [len(d) for d in differences.values()])
    weights = np.concatenate([np.full(len(d), 1 / len(d)) for d in differences.values()])
    groups = np.unique(tasks, return_inverse=True)[1]
    fit = sm.WLS(values, np.ones_like(values), weights=weights).fit(
        cov_type="cluster", cov_kwds={"groups": groups, "df_correction": True}, use_t=True
    )
    # statsmodels also corrects for (N - 1) / (N - parameters), which is 1 for a constant alone.
    test = item_test(differences)
    assert (test.tasks, test.items) == (4, 162)
    assert test.mean_difference == pytest.approx(fit.params[0])
    assert test.p == pytest.approx(fit.pvalues[0])
    assert [test.low, test.high] == pytest.approx(list(fit.conf_int()[0]))


def test_these_tasks_only_for_two_tasks_is_welch_of_two_samples(differences):
    """(m1 + m2) / 2 is half the difference between one sample and the other with its sign turned."""
    first, second = differences["a"], differences["b"]
    welch = stats.ttest_ind(first, -second, equal_var=False)
    test = item_test({"a": first, "b": second})
    assert test.p_here == pytest.approx(welch.pvalue)
    interval = welch.confidence_interval()
    assert [test.low_here, test.high_here] == pytest.approx([interval.low / 2, interval.high / 2])


def test_one_task_says_nothing_about_others(differences):
    test = item_test({"c": differences["c"]})
    assert math.isnan(test.p)
    assert test.p_here == pytest.approx(stats.ttest_1samp(differences["c"], 0).pvalue)


def test_spread_is_split_between_tasks_and_items():
    rng = np.random.default_rng(0)
    test = item_test({str(t): rng.normal(mean, 0.5, size=10) for t, mean in enumerate(rng.normal(0, 0.2, size=500))})
    assert (test.sd_tasks, test.sd_items) == (pytest.approx(0.2, abs=0.03), pytest.approx(0.5, abs=0.02))


def test_equal_scores_do_not_differ_and_constant_ones_do():
    same = item_test({"a": [0.0, 0.0], "b": [0.0, 0.0]})
    assert (same.p, same.p_here, same.low, same.high) == (1.0, 1.0, 0.0, 0.0)
    assert item_test({"a": [0.1, 0.1], "b": [0.1, 0.1]}).p == 0.0


@pytest.mark.parametrize("sd_tasks", [0.0, 0.3])
@pytest.mark.parametrize("tasks", [3, 12])
def test_equal_designs_are_called_different_no_more_often_than_stated(tasks, sd_tasks):
    like, only = item_rates(1000, tasks=tasks, items=20, sd_tasks=sd_tasks, planted=False)
    assert like == pytest.approx(0.05, abs=0.025)
    if sd_tasks:
        assert only > 0.3  # it must not be read as saying anything about other tasks
    else:
        assert only == pytest.approx(0.05, abs=0.025)


def test_planted_effect_is_found_at_the_promised_rate():
    assert item_rates(1000, tasks=8, items=30, sd_tasks=0.1, planted=True)[0] == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("differences", [{}, {"a": [1.0]}, {"a": [1.0, math.nan]}])
def test_items_that_cannot_be_tested_are_refused(differences):
    with pytest.raises(ValueError, match=r"there is no task|at least two differences"):
        item_test(differences)


def test_published_example_is_reproduced():
    """Demšar 2006: χ²_F = 9.28 (without correction for ties), F_F = 3.69."""
    result = rank_test(AUC)
    assert list(result.mean_ranks) == list(MEAN_RANKS)
    assert list(result.mean_ranks.values()) == pytest.approx(list(MEAN_RANKS.values()), abs=5e-4)
    uncorrected = result.chi_square * TIE_CORRECTION
    assert uncorrected == pytest.approx(9.28, abs=0.005)
    assert 13 * uncorrected / (14 * 3 - uncorrected) == pytest.approx(3.69, abs=0.005)


def test_friedman_is_that_of_the_textbook_and_of_scipy():
    scores = pd.DataFrame(
        np.random.default_rng(1).normal([0, 0.3, 0.6, 1.5, 0], 1, size=(12, 5)), columns=list("abcde")
    )
    result = rank_test(scores)
    ranks = [
        sum(sum(row >= value for row in scores.loc[task]) for task in scores.index for value in [scores.loc[task, d]])
        for d in scores
    ]
    by_hand = 12 / (12 * 5 * 6) * sum(total**2 for total in ranks) - 3 * 12 * 6
    assert result.chi_square == pytest.approx(by_hand)
    f = 11 * by_hand / (12 * 4 - by_hand)
    assert (result.f, result.p) == pytest.approx((f, stats.f.sf(f, 4, 44)))


def test_designs_that_always_tie_do_not_differ():
    result = rank_test(pd.DataFrame([[1.0, 1.0, 1.0]] * 4))
    assert (result.chi_square, result.p, set(result.mean_ranks.values())) == (0.0, 1.0, {2.0})


def test_complete_agreement_is_no_division_by_zero():
    assert rank_test(pd.DataFrame([[3.0, 2.0, 1.0]] * 6)).p == 0.0


@pytest.mark.parametrize("scores", [[[1.0, 2.0]] * 5, [[1.0, 2.0, 3.0]], [[1.0, 2.0, math.nan]] * 5])
def test_what_cannot_be_ranked_is_refused(scores):
    with pytest.raises(ValueError, match="needed are 2 and 3 at least"):
        rank_test(pd.DataFrame(scores))


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
