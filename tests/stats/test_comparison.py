from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.stats import Results, compare
from st_llmpool.stats.tables import sheets, to_markdown
from tests.stats.closed_testing import closed_bonferroni
from tests.stats.validation import (
    CONTRASTS,
    DESIGNS,
    null_family_rates,
    null_rate,
    null_verdict_rates_with_seed_noise,
    planted_rate,
    planted_verdict_rate,
    simulated_scores,
)


def table_of(scores: dict[str, list[float | None]], **columns: str) -> pd.DataFrame:
    """A results table from design to scores by task; None where there is none."""
    rows = [
        {"design": design, "task": f"T{place}", "score": score}
        for design, values in scores.items()
        for place, score in enumerate(values)
        if score is not None
    ]
    defaults = {"base": "", "option": "", "seed": "0", "task_type": "STS", "split": "test", "subset": "default"}
    return pd.DataFrame(rows).assign(**defaults | {"metric": "main_score"} | columns)


def only_pair(table: pd.DataFrame | Results, **arguments):
    (kind,) = compare(table, **arguments).types
    (pair,) = kind.pairs
    return pair


def test_two_models_suffice_and_their_pair_is_confirmatory():
    pair = only_pair(table_of({"a": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "b": [0.0, 0.1, 0.1, 0.1, 0.1, 0.1]}))
    assert (pair.first, pair.second, pair.confirmatory, pair.test.n) == ("a", "b", True, 6)
    assert pair.test.p == pair.p_holm == 2 / 64
    assert pair.verdict == "a is better than b, by 0.27 on average."


def test_every_number_of_a_table_is_that_of_scipy_and_of_closed_testing(study):
    (kind,) = compare(study, CONTRASTS).types
    means = study.groupby(["design", "task"])["score"].mean().unstack("design")
    for family in kind.families:
        expected = {}
        for pair in family.pairs:
            difference = (means[pair.first] - means[pair.second]).round(6)
            expected[pair] = stats.wilcoxon(difference, method="exact")
            assert pair.test.mean_difference == pytest.approx(difference.mean(), abs=1e-6)
            ranks = stats.rankdata(abs(difference))
            assert pair.test.effect_size == pytest.approx((np.sign(difference) * ranks).sum() / ranks.sum())
        assert [pair.test.p for pair in family.pairs] == pytest.approx([e.pvalue for e in expected.values()])
        assert [pair.test.statistic for pair in family.pairs] == [e.statistic for e in expected.values()]
        corrected = closed_bonferroni([e.pvalue for e in expected.values()])
        assert [pair.p_holm for pair in family.pairs] == pytest.approx(list(corrected))
    friedman = stats.friedmanchisquare(*(means[design] for design in DESIGNS))
    assert kind.ranks.chi_square == pytest.approx(friedman.statistic)
    runs = study.groupby(["design", "seed"])["score"].mean()
    anova = stats.f_oneway(*(runs[design] for design in DESIGNS))
    assert kind.seeds.p == pytest.approx(anova.pvalue)


def test_named_contrasts_and_all_other_pairs_are_two_families(study):
    (kind,) = compare(study, CONTRASTS).types
    named, others = kind.families
    assert [f"{pair.first}:{pair.second}" for pair in named.pairs] == list(CONTRASTS)
    assert (named.confirmatory, others.confirmatory, named.plan.tests, others.plan.tests) == (True, False, 6, 9)
    every = {frozenset((pair.first, pair.second)) for pair in kind.pairs}
    assert every == {frozenset(pair) for pair in itertools.combinations(DESIGNS, 2)}


def test_without_contrasts_every_pair_is_exploratory(study):
    comparison = compare(study)
    assert [family.confirmatory for family in comparison.types[0].families] == [False]
    assert comparison.verdicts == []


def test_table_that_cannot_reach_significance_carries_no_marks():
    """Five tasks, all won: the smallest p is 0.0625."""
    table = table_of({"a": [0.5, 0.6, 0.7, 0.8, 0.9], "b": [0.1, 0.1, 0.1, 0.1, 0.2], "c": [0.2, 0.3, 0.4, 0.1, 0.0]})
    comparison = compare(table, ["a:b"])
    assert not any(pair.significant or pair.reachable for pair in comparison.types[0].pairs)
    assert comparison.verdicts == ["STS: a and b: undecided, 5 tasks cannot give a significant result."]
    assert "*" not in "".join(cell for sheet in sheets(comparison) for row in sheet.rows for cell in row.values())
    assert "cannot reach significance: no marks" in to_markdown(comparison)


def test_as_many_tests_as_make_significance_unreachable_are_labelled():
    """Eight tasks: 1/128 each, so fifteen exploratory pairs of six designs cannot be told apart."""
    table = simulated_scores(np.random.default_rng(0), DESIGNS, tasks=8, effect=0.2)
    (family,) = compare(table).types[0].families
    assert family.plan.smallest_p == 15 / 128
    assert not any(pair.significant for pair in family.pairs)


def test_pair_with_too_few_tasks_of_its_own_cannot_be_significant():
    """Although its table can: c was scored on four of the tasks."""
    missing = [None] * 6
    table = table_of(
        {
            "a": list(np.linspace(0.8, 0.9, 10)),
            "b": list(np.linspace(0.1, 0.5, 10)),
            "c": [0.1, 0.2, 0.3, 0.4, *missing],
        }
    )
    pairs = {(pair.first, pair.second): pair for pair in compare(table).types[0].pairs}
    assert pairs["a", "b"].reachable
    assert (pairs["a", "c"].test.n, pairs["a", "c"].reachable) == (4, False)


def test_difference_below_seed_noise_gives_no_verdict():
    """b gains 0.001 everywhere, but its two seeds are 0.02 apart."""
    low, high = [0.1 * t for t in range(1, 9)], [0.1 * t + 0.02 for t in range(1, 9)]
    gain = 0.001
    table = pd.concat(
        [
            table_of({"a": low, "b": [score + gain for score in low]}, seed="0"),
            table_of({"a": high, "b": [score + gain for score in high]}, seed="1"),
        ]
    )
    pair = only_pair(table)
    assert (pair.significant, pair.within_seed_noise) == (True, True)
    assert pair.test.mean_difference == pytest.approx(-gain)
    assert pair.verdict.startswith("a and b: no verdict, seeds alone differ by 0.0")


def test_unknown_seed_noise_is_said():
    comparison = compare(table_of({"a": [0.1] * 6, "b": [0.2] * 6}))
    assert any(note.startswith("One run per model") for note in comparison.notes)
    assert not comparison.types[0].pairs[0].within_seed_noise


def test_seeds_splits_and_subsets_are_averaged_before_the_test():
    scores = {"a": [0.1, 0.2], "b": [0.3, 0.3]}
    twice = pd.concat([table_of(scores, seed="0"), table_of({"a": [0.3, 0.4], "b": [0.3, 0.5]}, seed="1")])
    assert only_pair(twice).test.mean_difference == pytest.approx(((0.2 - 0.3) + (0.3 - 0.4)) / 2)
    split = pd.concat([table_of(scores), table_of({"a": [0.5, 0.5], "b": [0.6, 0.6]}, split="dev")])
    assert only_pair(split).test.n == 2
    assert only_pair(split).test.mean_difference == pytest.approx(((-0.2 - 0.1) / 2 + (-0.1 - 0.1) / 2) / 2)


def test_pairs_use_what_both_have_and_say_so():
    table = pd.concat([
        table_of({"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3, None]}),
        table_of({"a": [0.9]}, subset="de"),
    ])  # fmt: skip
    comparison = compare(table)
    (pair,) = comparison.types[0].pairs
    assert (pair.test.n, pair.test.mean_difference) == (2, pytest.approx(-0.1))
    assert any("b has no score on T2" in note for note in comparison.notes)
    assert any("splits and subsets that both have: T0" in note for note in comparison.notes)


def test_model_without_any_score_of_a_type_is_named():
    six = {"a": [0.1] * 6, "b": [0.2] * 6, "c": [0.3] * 6}
    table = pd.concat([table_of(six), table_of({name: six[name] for name in "ab"}, task_type="Retrieval")])
    comparison = compare(table, ["a:c"])
    assert "Retrieval: no score of c." in comparison.notes
    assert [len(kind.pairs) for kind in comparison.types] == [3, 1]


def test_task_types_and_bases_are_compared_on_their_own():
    scores = {"a": [0.1] * 6, "b": [0.2] * 6}
    tables = [table_of(scores, base=base, task_type=kind) for base in ("x", "y") for kind in ("STS", "Retrieval")]
    assert [kind.title for kind in compare(pd.concat(tables)).types] == [
        "STS (x)",
        "Retrieval (x)",
        "STS (y)",
        "Retrieval (y)",
    ]
    assert compare(tables[0]).types[0].title == "STS"


def test_options_of_a_design_are_models_of_their_own():
    table = pd.concat([table_of({"5": [0.1] * 6}), table_of({"5": [0.2] * 6}, option="last 4")])
    pair = only_pair(table, contrasts=["5 (last 4):5"])
    assert (pair.first, pair.second) == ("5 (last 4)", "5")


def test_items_of_both_are_tested_clustered_by_task():
    rng = np.random.default_rng(0)
    table = table_of({"a": [0.5, 0.5, 0.6], "b": [0.4, 0.4, 0.5]})
    rows = [
        {**row, "item": f"q{item}", "score": rng.normal(row["score"], 0.1), "metric": "ndcg_at_10"}
        for row in table.to_dict("records")
        for item in range(30)
    ]
    items = pd.DataFrame(rows)
    lonely = items[(items["design"] == "a") & (items["task"] == "T0")].assign(item="only a has it", score=9.0)
    pair = only_pair(Results(pd.concat([table, items, lonely])), allow_mixed_revisions=True)
    values = items.pivot(index=["task", "item"], columns="design", values="score")
    means = (values["a"] - values["b"]).groupby("task").mean()
    assert (pair.items.tasks, pair.items.items, pair.items_metric) == (3, 90, "ndcg_at_10")
    assert pair.items.p == pair.items_p_holm == pytest.approx(stats.ttest_1samp(means, 0).pvalue)


def test_metric_is_chosen_or_the_only_one():
    table = pd.concat([table_of({"a": [0.1], "b": [0.2]}, metric=metric) for metric in ("ndcg_at_10", "recall")])
    with pytest.raises(ConfigurationError, match=r"no score 'main_score', it has ndcg_at_10, recall.*--metric"):
        compare(table)
    assert only_pair(table, metric="recall").test.n == 1
    assert only_pair(table[table["metric"] == "recall"]).test.n == 1
    with pytest.raises(ConfigurationError, match=r"no score 'map', it has recall.*--metric"):
        only_pair(table[table["metric"] == "recall"], metric="map")


@pytest.mark.parametrize(
    ("contrasts", "message"),
    [
        (["a:x"], r"names 'x'; there are org/a, org/b, c"),
        (["org/a:orgb"], r"Did you mean 'org/b'"),
        (["a"], "two names with a colon"),
        (["a:a"], "contrast a:a names one model twice"),
        (["a:b", "b:a"], "contrast b:a .*is repeated"),
        (["a:b"] * 7, "at most 6 can be confirmatory"),
    ],
)
def test_wrong_contrasts_are_refused(contrasts, message):
    table = table_of({"org/a": [0.1], "org/b": [0.2], "c": [0.3]})
    with pytest.raises(ConfigurationError, match=message):
        compare(table, contrasts)


def test_contrast_may_leave_out_the_organisation_and_names_may_hold_colons():
    table = table_of({"org/a": [0.1] * 6, "b:1": [0.2] * 6, "c": [0.3] * 6})
    assert compare(table, ["a:b:1"]).types[0].pairs[0].second == "b:1"


@pytest.mark.parametrize("models", [1, 31])
def test_too_few_or_too_many_models_are_refused(models):
    with pytest.raises(ConfigurationError, match=rf"results of {models} model\(s\).*--model NAME"):
        compare(table_of({str(model): [0.1] for model in range(models)}))


def test_models_without_a_common_task_are_refused():
    with pytest.raises(DataError, match="no two of a, b were scored on the same task"):
        compare(table_of({"a": [0.1, None], "b": [None, 0.2]}))


def at_most(rate: float, repeats: int) -> float:
    """Three standard errors above a rate."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / repeats)


@pytest.mark.parametrize("decimals", [6, 2])
def test_same_design_under_two_names_is_called_different_no_more_often_than_stated(decimals):
    """With two decimals there are ties and zeros. For the test alone this is shown exactly, by enumeration."""
    assert null_rate(100, tasks=8, decimals=decimals) <= at_most(0.05, 100)


def test_no_contrast_of_equal_designs_stands_out_more_often_than_stated():
    """The rate for any of six contrasts, and for any of nine exploratory pairs."""
    confirmatory, exploratory = null_family_rates(30, tasks=9)
    assert confirmatory <= at_most(0.05, 30)
    assert exploratory <= at_most(0.05, 30)


def test_luck_with_seeds_is_not_sold_as_a_better_design():
    """With such seeds a third of the studies of equal designs are significant over tasks. The rule is not a joint test:
    its rate is near 0.05 and no bound is promised."""
    significant, verdict = null_verdict_rates_with_seed_noise(60, tasks=12)
    assert significant > 0.2
    assert verdict <= at_most(0.05, 60)


@pytest.mark.parametrize(("tasks", "tests"), [(8, 1), (10, 2)])
def test_planted_effect_is_found_at_the_rate_that_the_plan_promises(tasks, tests):
    assert planted_rate(60, tasks=tasks, tests=tests) >= 1 - at_most(0.2, 60)


def test_what_a_pair_promises_to_find_gets_a_verdict_at_that_rate_also_where_seeds_vary():
    """The rule that gives verdicts asks for more than the test over tasks, so its power is that of both."""
    assert planted_verdict_rate(60, tasks=12) >= 1 - at_most(0.2, 60)
