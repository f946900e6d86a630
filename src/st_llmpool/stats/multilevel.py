"""A multilevel model of the scores of two designs, reported beside the tests over corpora."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pandas as pd
import statsmodels.formula.api as smf


@dataclass(frozen=True)
class MultilevelFit:
    """The effect of the design in ``score ~ design + (1|corpus/task) + (design|corpus) + (1|seed)``.

    Args:
        difference: First design minus second.
        error: Its standard error.
        p: Two-sided p-value (normal).
        converged: Whether the fit converged.
    """

    difference: float
    error: float
    p: float
    converged: bool


def fit_multilevel(first: pd.DataFrame, second: pd.DataFrame) -> MultilevelFit:
    """Fit the model by restricted maximum likelihood; (design|corpus) is a variance of its own, without correlation.

    Args:
        first: Scores of the first design, tasks (index corpus, task) by seeds, without gaps.
        second: Scores of the second.

    Example:
        >>> index = pd.MultiIndex.from_product([list("abcdefg"), ["t"]], names=["corpus", "task"])
        >>> second = pd.DataFrame([[0.5 + 0.01 * n, 0.51 + 0.01 * n] for n in range(7)], index)
        >>> first = second.add([0.02, 0.03, 0.01, 0.02, 0.04, 0.02, 0.0], axis=0)
        >>> fit = fit_multilevel(first, second)
        >>> round(fit.difference, 3), fit.converged
        (0.02, True)
    """
    parts = [scores.stack().rename("score").reset_index().assign(design=n) for n, scores in ((1, first), (0, second))]
    rows = pd.concat(parts, ignore_index=True)
    rows = rows.rename(columns={rows.columns[2]: "seed"}).assign(everything=1)
    formulas = {"corpus": "0 + C(corpus)", "corpus_design": "0 + C(corpus):C(design)"}
    if len(first) > first.index.get_level_values("corpus").nunique():
        rows["task"] = rows["corpus"].astype(str) + "\n" + rows["task"].astype(str)
        formulas["task"] = "0 + C(task)"
    if first.shape[1] > 1:
        formulas["seed"] = "0 + C(seed)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # variances at zero are expected; convergence is reported
        model = smf.mixedlm("score ~ design", rows, groups="everything", re_formula="0", vc_formula=formulas)
        fit = model.fit(reml=True, method=["lbfgs", "powell"])
    difference, error, p = (float(part["design"]) for part in (fit.params, fit.bse, fit.pvalues))
    return MultilevelFit(difference, error, p, bool(fit.converged))
