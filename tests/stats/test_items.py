from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from st_llmpool.stats.items import item_test
from tests.stats.validation import item_rates


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
def test_what_cannot_be_tested_is_refused(differences):
    with pytest.raises(ValueError, match=r"there is no task|at least two differences"):
        item_test(differences)
