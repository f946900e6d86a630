from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from st_llmpool.stats.ranks import rank_test
from tests.stats.demsar import AUC, MEAN_RANKS, TIE_CORRECTION


def test_published_example_is_reproduced():
    """Demšar 2006: χ²_F = 9.28 (without correction for ties), F_F = 3.69, CD = 1.25 at 0.05 and 1.12 at 0.10."""
    result = rank_test(AUC)
    assert list(result.mean_ranks) == list(MEAN_RANKS)
    assert list(result.mean_ranks.values()) == pytest.approx(list(MEAN_RANKS.values()), abs=5e-4)
    uncorrected = result.chi_square * TIE_CORRECTION
    assert uncorrected == pytest.approx(9.28, abs=0.005)
    assert 13 * uncorrected / (14 * 3 - uncorrected) == pytest.approx(3.69, abs=0.005)
    assert result.critical_difference == pytest.approx(1.25, abs=0.005)
    assert rank_test(AUC, alpha=0.10).critical_difference == pytest.approx(1.12, abs=0.005)


def test_published_conclusion_is_reproduced():
    """At 0.05 no two differ; at 0.10 C4.5 is worse than both variants with m, and with cf than none."""
    p = rank_test(AUC).p_nemenyi
    assert (p.to_numpy() > 0.05).all()
    below = {(a, b) for a in p for b in p if p.loc[a, b] < 0.10}
    assert below == {("C4.5", "C4.5+m"), ("C4.5+m", "C4.5"), ("C4.5", "C4.5+m+cf"), ("C4.5+m+cf", "C4.5")}


@pytest.mark.parametrize(
    ("designs", "q"), [(3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (8, 3.031), (9, 3.102), (10, 3.164)]
)
def test_critical_difference_uses_the_published_quantiles(designs, q):
    scores = pd.DataFrame(np.random.default_rng(0).normal(size=(11, designs)))
    expected = q * math.sqrt(designs * (designs + 1) / (6 * 11))
    assert rank_test(scores).critical_difference == pytest.approx(expected, rel=5e-4)


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
    assert result.p_chi_square == pytest.approx(stats.chi2.sf(by_hand, 4))
    f = 11 * by_hand / (12 * 4 - by_hand)
    assert (result.f, result.p) == pytest.approx((f, stats.f.sf(f, 4, 44)))


def test_pairs_of_nemenyi_are_significant_exactly_beyond_the_critical_difference():
    scores = pd.DataFrame(np.random.default_rng(2).normal([0, 0.5, 1, 1.5], 1, size=(10, 4)), columns=list("abcd"))
    result = rank_test(scores)
    apart = [
        (abs(result.mean_ranks[a] - result.mean_ranks[b]), result.p_nemenyi.loc[a, b]) for a in "abcd" for b in "abcd"
    ]
    assert any(distance > result.critical_difference for distance, _ in apart)
    assert all((distance >= result.critical_difference) == (p <= 0.05) for distance, p in apart)


def test_nemenyi_is_that_of_scikit_posthocs():
    posthocs = pytest.importorskip("scikit_posthocs", reason="the extra 'plots' is not installed")
    expected = posthocs.posthoc_nemenyi_friedman(AUC)
    found = rank_test(AUC).p_nemenyi.loc[expected.index, expected.columns]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_few_tasks_are_known_not_to_reach_the_critical_difference():
    scores = pd.DataFrame([[3.0, 2.0, 1.0]] * 3)
    assert not rank_test(scores.iloc[:2]).reachable
    assert rank_test(scores.iloc[:2]).p_nemenyi.to_numpy().min() > 0.05  # although the order is the same everywhere
    assert rank_test(scores).reachable


def test_designs_that_always_tie_do_not_differ():
    result = rank_test(pd.DataFrame([[1.0, 1.0, 1.0]] * 4))
    assert (result.chi_square, result.p, set(result.mean_ranks.values())) == (0.0, 1.0, {2.0})


def test_complete_agreement_is_no_division_by_zero():
    assert rank_test(pd.DataFrame([[3.0, 2.0, 1.0]] * 6)).p == 0.0


@pytest.mark.parametrize("scores", [[[1.0, 2.0]] * 5, [[1.0, 2.0, 3.0]], [[1.0, 2.0, math.nan]] * 5])
def test_what_cannot_be_ranked_is_refused(scores):
    with pytest.raises(ValueError, match="needed are 2 and 3 at least"):
        rank_test(pd.DataFrame(scores))
