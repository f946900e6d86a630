from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from st_llmpool.stats.statistics import (
    BETTER,
    EQUIVALENT,
    UNDECIDED,
    WORSE,
    DifferenceTest,
    decide,
    difference_test,
    holm,
    item_test,
    pooled_seed_error,
    rank_biserial,
    rank_test,
    resampled_interval,
    signed_rank_p,
    signed_rank_posterior,
    smallest_p,
)
from tests.stats.closed_testing import closed_bonferroni
from tests.stats.demsar import AUC, MEAN_RANKS, TIE_CORRECTION


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


def over_tasks(differences):
    """The tests of one run over the tasks of one corpus."""
    return difference_test(np.reshape(differences, (-1, 1)), corpora=1)


def test_six_differences_by_hand():
    """|d| ranks 4, 2, 5, 3, 1, 6, only rank 1 is negative; W <= 1 in 2 of 64 assignments on each side."""
    differences = [0.03, 0.01, 0.04, 0.02, -0.005, 0.05]
    assert over_tasks(differences).p == 4 / 64
    assert over_tasks(differences).mean == pytest.approx(0.145 / 6)
    assert rank_biserial(np.array(differences)) == pytest.approx(19 / 21)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_p_is_that_of_all_sign_assignments_also_with_ties_and_zeros(differences):
    # Where both sums are equal, twice one side would count the middle twice: at most 1.
    _, _, p = enumerated(differences)
    assert over_tasks(differences).p_units == pytest.approx(p if any(differences) else 1.0)


@pytest.mark.parametrize("n", [6, 12, 25, 50])
def test_p_is_that_of_scipy_without_ties(n):
    differences = np.random.default_rng(n).normal(0.3, 1, size=n)
    expected = stats.wilcoxon(differences.round(6), method="exact").pvalue
    assert over_tasks(differences).p_units == pytest.approx(expected, rel=1e-9)


def test_p_and_statistic_of_the_published_example():
    """Demšar gives R+ 93 and R- 12 with the two zeros ranked 1.5 and split; dropping them takes 2 from every rank."""
    differences = (AUC["C4.5+m"] - AUC["C4.5"]).round(6).to_numpy()
    nonzero = differences[differences != 0]
    expected = stats.wilcoxon(nonzero, method=stats.PermutationMethod(n_resamples=2 ** len(nonzero)))
    assert over_tasks(differences).p_units == pytest.approx(expected.pvalue)
    w_plus, w_minus = 93 - 1.5 - 10 * 2, 12 - 1.5 - 2 * 2
    assert rank_biserial(differences) == pytest.approx((w_plus - w_minus) / (w_plus + w_minus))


def test_equal_designs_are_called_different_at_most_as_often_as_the_level_says_whatever_the_signs():
    """Exactly, not by chance: under the null every assignment of signs is as likely as any other."""
    for sizes, corpora in (([1, 2, 3, 4, 5, 6, 7], 1), ([1, 1, 2, 2, 2, 3, 5], 1), ([1, 1, 2, 3, 3, 9, 5], 7)):
        signs = np.array(list(itertools.product([-1, 1], repeat=len(sizes))))
        p_values = difference_test((signs * sizes)[..., None], corpora=corpora).p_units
        for level in (0.01, 0.05, 0.1, 0.5):
            assert (p_values <= level).mean() <= level


def test_differences_that_are_equal_on_paper_tie():
    """0.3 - 0.2, 0.2 - 0.1 and 0.7 - 0.6 are three numbers for a computer."""
    noisy = [0.3 - 0.2, 0.2 - 0.1, 0.7 - 0.6, -(0.4 - 0.3), 0.5]
    assert len(set(map(abs, noisy))) > 2
    assert over_tasks(noisy).p_units == enumerated([1, 1, 1, -1, 5])[2]
    assert rank_biserial(np.array(noisy)) == pytest.approx((3 * 2.5 + 5 - 2.5) / 15)


def test_no_difference_anywhere_is_no_evidence_of_one_but_of_equivalence():
    test = over_tasks([0.0, 1e-12, -1e-12] * 2)
    assert (test.p, test.p_equivalent) == (1.0, 0.0)
    assert over_tasks([0.0] * 5).p_equivalent == 1.0  # five could not have shown a difference


def test_ranks_and_mean_that_disagree_give_no_evidence():
    """Eleven small losses and one large gain."""
    test = over_tasks([-0.001 * n for n in range(1, 12)] + [0.9])
    assert test.p_units < 0.05
    assert test.p == 1.0


@pytest.mark.parametrize("corpora", [6, 9, 11])
def test_sign_flips_of_corpora_are_those_of_scipy(corpora):
    values = np.random.default_rng(corpora).normal(0.01, 0.01, size=(corpora, 1))
    expected = stats.permutation_test((values[:, 0].round(6),), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert difference_test(values, corpora=corpora).p_units == pytest.approx(expected.pvalue)


def test_from_twelve_corpora_on_their_ranks_are_tested():
    values = np.random.default_rng(0).normal(0.01, 0.01, size=(12, 3))
    expected = stats.wilcoxon(values.round(6).mean(axis=1).round(6), method="exact").pvalue
    assert difference_test(values, corpora=12).p_units == pytest.approx(expected)


def test_many_studies_at_once_are_what_each_is_alone():
    values = np.random.default_rng(1).normal(0.005, 0.01, size=(20, 7, 3)).round(2)
    for corpora in (1, 7):
        together = difference_test(values, corpora=corpora)
        for place, own in enumerate(values):
            alone = difference_test(own, corpora=corpora)
            assert [field[place] for field in together] == pytest.approx(np.array([*map(float, alone)]))


def test_error_of_units_and_seeds_is_that_of_welch_and_p_a_mean_of_both_tails():
    """The mean over units and the mean over seeds have variances s² / n of their own, as two samples of Welch have."""
    values = np.random.default_rng(2).normal([0.0, 0.02, 0.01], 0.01, size=(8, 3)).round(6)
    test = difference_test(values, corpora=8)
    units, seeds = values.mean(axis=1), values.mean(axis=0)
    welch = stats.ttest_ind(units, -seeds, equal_var=False)  # its difference is the sum of both means, twice ours
    assert test.error == pytest.approx(2 * values.mean() / welch.statistic, rel=1e-4)
    parts = [(units.var(ddof=1) / 8, 7), (seeds.var(ddof=1) / 3, 2)]
    tails = [part * stats.t.sf(abs(values.mean()) / test.error, dof) for part, dof in parts]
    assert test.p == pytest.approx(2 * sum(tails) / test.error**2, rel=1e-4)
    assert test.p > 2 * stats.t.sf(abs(values.mean()) / test.error, welch.df)  # more careful than Welch's


def test_larger_of_the_own_and_the_pooled_seed_variance_counts():
    values = np.random.default_rng(2).normal([0.0, 0.02, 0.01], 0.01, size=(8, 3))
    own = values.mean(axis=0).var(ddof=1) / 3
    tasks = values.mean(axis=1).var(ddof=1) / 8
    for pooled in (own / 2, own * 3):
        test = difference_test(values, corpora=8, seed_error=(pooled, 10))
        assert test.error**2 == pytest.approx(tasks + max(own, pooled), rel=1e-3)
    variance, dof = pooled_seed_error([(3, 2e-6), (3, 4e-6)], designs=4)
    assert (variance, dof) == (pytest.approx(9e-6), 6)


def test_equivalence_is_the_two_one_sided_tests_of_statsmodels():
    values = np.random.default_rng(3).normal(0.002, 0.005, size=(10, 1)).round(6)
    expected = DescrStatsW(values[:, 0]).ttost_mean(-0.01, 0.01)[0]
    assert difference_test(values, corpora=10).p_equivalent == pytest.approx(expected)


def test_posterior_is_that_of_drawing_and_counting_one_by_one():
    """Benavoli et al. 2017: weights of the units and a prior one at zero; mass of the means of two units by region."""
    values, rope = [0.004, 0.02, 0.013, -0.004, 0.016, 0.009], 0.01
    points = [0.0, *values]
    rng = np.random.default_rng(9)
    wins = np.zeros(3)
    for _ in range(1500):
        gammas = [rng.gamma(0.5), *(rng.gamma(1.0) for _ in values)]
        mass = np.zeros(3)
        for (w, a), (v, b) in itertools.product(zip(gammas, points, strict=True), repeat=2):
            mass[1 + ((a + b) / 2 > rope) - ((a + b) / 2 < -rope)] += w * v
        wins[mass.argmax()] += 1
    assert signed_rank_posterior(values, rope) == pytest.approx(wins / 1500, abs=0.04)


def draw(rng, corpora):
    """Mean of resampled corpora, each the mean of resampled tasks, one draw at a time."""
    chosen = [corpora[place] for place in rng.integers(len(corpora), size=len(corpora))]
    return np.mean([rng.choice(tasks, len(tasks)).mean() for tasks in chosen])


def test_interval_is_that_of_resampling_corpora_and_tasks_by_hand_stretched_for_few_corpora():
    rng = np.random.default_rng(7)
    corpora = [rng.normal(0.01 * n, 0.01, size=1 + n % 4) for n in range(8)]
    middle = np.mean([tasks.mean() for tasks in corpora])
    deviations = np.array([draw(rng, corpora) for _ in range(4000)]) - middle
    stretch = math.sqrt(8 / 7) * stats.t.ppf(0.975, 7) / stats.norm.ppf(0.975)
    expected = middle + stretch * np.quantile(deviations, [0.025, 0.975])
    np.testing.assert_allclose(resampled_interval(corpora), expected, atol=0.002)


@pytest.mark.parametrize("seeds", [False, True])
def test_interval_covers_the_true_mean_as_often_as_it_says(seeds):
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(300):
        values = rng.normal(0, 1, size=8)
        luck = rng.normal(0, 0.5, size=3) if seeds else np.zeros(3)
        error = (luck.var(ddof=1) / 3, 2) if seeds else None
        low, high = resampled_interval([np.array([v + luck.mean()]) for v in values], error)
        inside.append(low <= 0 <= high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)


def test_five_units_have_no_interval_and_equal_ones_a_point():
    assert math.isnan(resampled_interval([np.arange(5.0)])[0])
    assert resampled_interval([np.full(6, 2.0)]) == (2.0, 2.0)


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_never_falls():
    p_values = [0.04, 0.01, 0.03, 0.005, 0.6]
    expected, so_far = {}, 0.0
    for step, p in enumerate(sorted(p_values)):
        so_far = max(so_far, min(1.0, p * (len(p_values) - step)))
        expected[p] = so_far
    assert holm(p_values) == pytest.approx([expected[p] for p in p_values])
    assert holm([p_values, p_values[::-1]])[1] == pytest.approx([expected[p] for p in p_values[::-1]])
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-6, 0.004, 0.01, 0.02, 0.04, 0.2, 0.5, 1.0]), min_size=1, max_size=5))
def test_holm_is_closed_testing_with_bonferroni(p_values):
    assert holm(p_values) == pytest.approx(closed_bonferroni(p_values))


@pytest.mark.parametrize("n", [1, 4, 6, 9])
def test_smallest_p_is_reached_when_all_signs_agree_and_never_undercut(n):
    assert smallest_p(n) == over_tasks(range(1, n + 1)).p == signed_rank_p(range(1, n + 1)).min() == 2.0 ** (1 - n)
    assert smallest_p(n) == over_tasks([1.0] * n + [0.0] * 3).p_units  # ties do not change it, zeros do not help
    assert smallest_p(n) == difference_test(np.ones((n, 1)), corpora=max(n, 2)).p_units


def three_fields(mean, p, p_equivalent):
    nothing = np.zeros(len(mean))
    return DifferenceTest(np.array(mean), nothing, np.array(p), np.array(p_equivalent), nothing)


def test_verdicts_are_three_and_equivalence_comes_before_a_difference_that_does_not_matter():
    found = decide(
        three_fields([0.03, -0.03, 0.002, 0.0, 0.001], [0.001, 0.001, 0.001, 0.9, 0.9], [1, 1, 0.001, 0.001, 0.9])
    )
    assert list(found) == [BETTER, WORSE, EQUIVALENT, EQUIVALENT, UNDECIDED]


def test_verdicts_are_corrected_for_their_number_and_equivalence_needs_the_posterior_too():
    assert list(decide(three_fields([0.1, 0.1], [0.04, 0.9], [1, 1]))) == [UNDECIDED, UNDECIDED]
    assert list(decide(three_fields([0.1], [0.04], [1]))) == [BETTER]
    assert list(decide(three_fields([0.0], [0.9], [0.01]), in_rope=[0.9])) == [UNDECIDED]


@pytest.fixture
def differences():
    rng = np.random.default_rng(3)
    sizes = {"a": 40, "b": 5, "c": 100, "d": 17}
    return {task: rng.normal(0.03 * place, 0.2, size=n) for place, (task, n) in enumerate(sizes.items())}


def test_these_tasks_only_for_two_tasks_is_welch_of_two_samples(differences):
    """(m1 + m2) / 2 is half the difference between one sample and the other with its sign turned."""
    first, second = differences["a"], differences["b"]
    welch = stats.ttest_ind(first, -second, equal_var=False)
    test = item_test({"a": first, "b": second})
    assert test.p == pytest.approx(welch.pvalue)
    interval = welch.confidence_interval()
    assert [test.low, test.high] == pytest.approx([interval.low / 2, interval.high / 2])


def test_one_task_is_the_t_test_of_its_items(differences):
    assert item_test({"c": differences["c"]}).p == pytest.approx(stats.ttest_1samp(differences["c"], 0).pvalue)


def test_equal_items_do_not_differ_and_constant_ones_do():
    same = item_test({"a": [0.0, 0.0], "b": [0.0, 0.0]})
    assert (same.p, same.low, same.high) == (1.0, 0.0, 0.0)
    assert item_test({"a": [0.1, 0.1], "b": [0.1, 0.1]}).p == 0.0


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
