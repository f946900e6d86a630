from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from st_llmpool.stats import compare
from st_llmpool.stats.multilevel import fit_multilevel
from tests.stats.validation import Setting


@pytest.mark.parametrize("tasks", [1, 3])
def test_error_in_a_balanced_study_is_that_of_the_paired_corpora(tasks):
    """With equal numbers everywhere, the estimate for the design has the error of the t test on corpus differences."""
    rng = np.random.default_rng(0)
    names = [[f"c{n}" for n in range(10)], [f"t{n}" for n in range(tasks)]]
    index = pd.MultiIndex.from_product(names, names=["corpus", "task"])
    shape = (10, tasks, 3)
    common = rng.normal(0.5, 0.1, (10, 1, 1)) + rng.normal(0, 0.03, (10, tasks, 1)) + rng.normal(0, 0.01, (1, 1, 3))
    first, second = (common + rng.normal(0, 0.01, (10, 1, 1)) + rng.normal(0, 0.003, shape) for _ in range(2))
    fit = fit_multilevel(*(pd.DataFrame(part.reshape(-1, 3), index) for part in (first, second)))
    differences = (first - second).mean(axis=(1, 2))
    assert fit.converged
    assert fit.difference == pytest.approx(differences.mean())
    assert fit.error == pytest.approx(differences.std(ddof=1) / np.sqrt(10), rel=0.01)


def test_comparison_fits_it_for_several_corpora_only():
    several, one = Setting(6, 2), Setting(1, 12)
    for setting, fitted in ((several, True), (one, False)):
        (kind,) = compare(setting.scores(np.random.default_rng(0), "ab")).types
        fit = kind.multilevel(kind.pairs[0])
        assert (fit is not None) is fitted
        assert not fitted or fit.difference == pytest.approx(kind.pairs[0].mean, abs=1e-6)
