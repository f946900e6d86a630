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
    Setting,
    decisions,
    equivalence_rate,
    null_rates,
    planted_rate,
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
    assert (pair.first, pair.second, pair.confirmatory, pair.plan.tasks) == ("a", "b", True, 6)
    assert pair.test.p == pair.p_holm == 2 / 64
    assert pair.verdict.startswith("a scores above b in this run on this corpus, by 0.2667 [0.")
    assert pair.winner is None


def test_every_number_of_a_table_is_that_of_scipy_and_of_closed_testing(study):
    """By tasks of one corpus, three seeds: the larger of Wilcoxon's p and that of the t test over both."""
    (kind,) = compare(study, CONTRASTS).types
    cells = study.pivot(index="task", columns=["design", "seed"], values="score")
    for family in kind.families:
        names = [(pair.first, pair.second) for pair in family.pairs]
        differences = {pair: (cells[pair[0]] - cells[pair[1]]).round(6) for pair in names}
        pooled = np.mean([part.mean().var(ddof=1) for part in differences.values()]) / 3
        dof = (len({name for pair in names for name in pair}) - 1) * 2
        expected = []
        for (_, part), pair in zip(differences.items(), family.pairs, strict=True):
            over_tasks = stats.wilcoxon(part.mean(axis=1).round(6), method="exact").pvalue
            tasks = part.mean(axis=1).var(ddof=1) / 12
            seeds = max(pooled, part.mean().var(ddof=1) / 3)
            t = abs(part.to_numpy().mean()) / math.sqrt(tasks + seeds)
            crossed = 2 * (tasks * stats.t.sf(t, 11) + seeds * stats.t.sf(t, dof)) / (tasks + seeds)
            assert pair.mean == pytest.approx(part.to_numpy().mean())
            assert (pair.test.p_units, pair.test.p) == pytest.approx((over_tasks, max(over_tasks, crossed)), rel=1e-4)
            expected.append(max(over_tasks, crossed))
        corrected = closed_bonferroni(expected)
        assert [pair.p_holm for pair in family.pairs] == pytest.approx(list(corrected), rel=1e-4)
    means = study.groupby(["design", "task"])["score"].mean().unstack("design")
    friedman = stats.friedmanchisquare(*(means[design] for design in DESIGNS))
    assert kind.ranks.chi_square == pytest.approx(friedman.statistic)


def test_with_several_corpora_they_are_the_units_whatever_the_number_of_their_tasks():
    """Corpus x has one task, y three: both count the same."""
    table = pd.concat([
        table_of({"a": [0.6], "b": [0.5]}, corpus="x").assign(task="T9"),
        table_of({"a": [0.5, 0.5, 0.5], "b": [0.5, 0.4, 0.6]}, corpus="y"),
    ])  # fmt: skip
    pair = only_pair(table)
    assert (pair.plan.corpora, pair.plan.tasks, list(pair.units)) == (2, 4, pytest.approx([0.1, 0.0]))
    assert pair.mean == pytest.approx(0.05)
    assert compare(table).types[0].means.loc["a", "mean"] == pytest.approx(0.55)


def several(gain=0.03, corpora=8, seeds=3, **more):
    """Design b above a by about `gain` on every corpus."""
    setting = Setting(corpora, 1, seeds, corpus_spread=0.0, task_spread=0.002, seed_noise=0.0005)
    return setting.scores(np.random.default_rng(0), "ab", effect=gain).assign(**more)


def test_only_several_corpora_and_seeds_make_a_design_better():
    assert only_pair(several()).verdict.startswith("b is better than a, by 0.0")
    one_seed = only_pair(several(seeds=1))
    assert one_seed.verdict.startswith("b scores above a in this run, by 0.0")
    one_corpus = only_pair(several(corpus=""))
    assert one_corpus.verdict.startswith("b scores above a on this corpus, by 0.0")
    assert one_seed.winner is one_corpus.winner is None
    assert one_seed.leader == one_corpus.leader == "b"


def test_no_difference_is_equivalence_only_where_it_is_shown():
    shown = only_pair(several(gain=0.0))
    assert (shown.short, shown.leader) == ("equivalent", None)
    assert shown.verdict.startswith("a and b are equivalent, within ±0.01: they differ by ")
    assert only_pair(several(gain=0.0), rope=0.0005).short == "undecided"
    assert only_pair(several(gain=0.004)).short == "equivalent"  # significant, and too small to matter
    assert only_pair(several(gain=0.004), rope=0.0).short == "worse"
    few = only_pair(several(gain=0.0, corpora=2))
    assert few.verdict == "a and b: undecided, 2 corpora cannot give a significant result."


def test_diverged_runs_are_named_and_never_pooled():
    table = several()
    diverged = table[(table["design"] == "b") & (table["seed"] == "2")].assign(score=0.0, diverged=True)
    table = pd.concat([table[(table["design"] == "a") | (table["seed"] != "2")], diverged])
    comparison = compare(table)
    assert "Diverged (validation ended below its start) and left out: b, seed 2." in comparison.notes
    assert comparison.types[0].means.loc["b", "runs"] == 2
    assert comparison.types[0].pairs[0].mean == pytest.approx(-0.03, abs=0.003)


def test_task_of_two_corpora_is_refused_and_of_unknown_ones_said():
    table = table_of({"a": [0.1, 0.2], "b": [0.2, 0.3]})
    assert any(note.startswith("Tasks whose corpus is not known count as one") for note in compare(table).notes)
    mixed = pd.concat([table.assign(corpus="x"), table.assign(corpus="y", seed="1")])
    with pytest.raises(DataError, match="task T0 has several corpora, x, y"):
        compare(mixed)


def test_designs_are_called_by_their_factors_and_contrasts_may_use_their_labels():
    factors = {"attention": "causal", "readout": "eos", "pooling": "plain"}
    other = {"attention": "bidirectional", "readout": "mean", "pooling": "plain"}
    table = several()
    table = pd.concat([
        table[table["design"] == "a"].assign(design="1", **factors),
        table[table["design"] == "b"].assign(design="2", **other),
    ])  # fmt: skip
    pair = only_pair(table, contrasts=["2:1"])
    assert (pair.first, pair.second) == ("bidirectional · mean · plain", "causal · EOS · plain")


def test_contrast_of_means_of_designs_is_the_main_effect():
    """Of a 2 × 2 the attention is worth 0.02; the interaction is its half difference."""
    rng = np.random.default_rng(0)
    table = Setting(8, 1, 3, corpus_spread=0.0, task_spread=0.001).scores(rng, ["cE", "cM", "bE", "bM"])
    gains = {"cE": 0.0, "cM": 0.03, "bE": 0.02, "bM": 0.05}
    table["score"] += table["design"].map(gains)
    comparison = compare(table, ["bE+bM:cE+cM", "bM+cE:bE+cM"])
    attention, interaction = [pair for pair in comparison.types[0].pairs if pair.confirmatory]
    cells = table.groupby(["design", "seed"])["score"].mean().unstack("design")
    expected = (cells["bE"] + cells["bM"] - cells["cE"] - cells["cM"]).mean() / 2
    assert attention.mean == pytest.approx(expected, abs=1e-6)
    assert attention.winner == "bE + bM"
    assert interaction.leader is None
    assert comparison.names["bE+bM"] == "bE + bM"
    assert "bE + bM" in to_markdown(comparison)
    with pytest.raises(ConfigurationError, match=r"names 'bE\+x'"):
        compare(table, ["bE+x:cE"])


def test_designs_without_common_seeds_are_compared_as_welch_does():
    table = several()
    table.loc[table["design"] == "b", "seed"] = table["seed"].map({"0": "5", "1": "6", "2": "7"})
    pair = only_pair(table)
    runs = table.groupby(["design", "seed"])["score"].mean()
    welch = stats.ttest_ind(runs["a"], runs["b"], equal_var=False)
    variance, dof = pair.seed_error
    assert dof == pytest.approx(welch.df)
    assert math.sqrt(variance) == pytest.approx((runs["a"].mean() - runs["b"].mean()) / welch.statistic)
    assert pair.differences.shape[1] == 1
    assert pair.winner == "b"


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
    assert "cannot reach 0.05 whatever the scores are" in to_markdown(comparison)


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
    assert (pairs["a", "c"].plan.tasks, pairs["a", "c"].reachable) == (4, False)


def test_zeros_do_not_count_as_tasks_that_could_differ():
    pair = only_pair(table_of({"a": [0.5] * 4 + [0.1, 0.2], "b": [0.4] * 4 + [0.1, 0.2]}))
    assert (pair.plan.reachable, pair.reachable, pair.test.p_units) == (True, False, 0.125)


def test_luck_of_seeds_is_no_difference():
    """b gains 0.001 on average and on every task, but by 0.01 in the one seed and not in the other."""
    low, high = [0.1 * t for t in range(1, 9)], [0.1 * t + 0.02 for t in range(1, 9)]
    table = pd.concat(
        [
            table_of({"a": low, "b": [score + 0.01 for score in low]}, seed="0"),
            table_of({"a": high, "b": [score - 0.008 for score in high]}, seed="1"),
        ]
    )
    pair = only_pair(table, rope=0.0)
    assert pair.test.p_units == 2 / 256
    assert pair.test.p > 0.5
    assert pair.short == "undecided"


def test_power_is_that_of_the_rule_and_is_said_with_an_undecided_pair():
    pair = only_pair(several(gain=0.002, corpora=8), rope=0.0005)
    assert pair.short == "undecided"
    assert f"found in 80 % of studies: {pair.plan.detectable:.4f}" in pair.verdict


def test_unknown_seed_noise_is_said():
    comparison = compare(table_of({"a": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "b": [0.2, 0.3, 0.5, 0.6, 0.9, 0.9]}))
    assert any(note.startswith("One run per model") for note in comparison.notes)
    assert "in this run" in comparison.types[0].pairs[0].verdict


def test_seeds_splits_and_subsets_are_averaged_before_the_test():
    scores = {"a": [0.1, 0.2], "b": [0.3, 0.3]}
    twice = pd.concat([table_of(scores, seed="0"), table_of({"a": [0.3, 0.4], "b": [0.3, 0.5]}, seed="1")])
    assert only_pair(twice).mean == pytest.approx(((0.2 - 0.3) + (0.3 - 0.4)) / 2)
    split = pd.concat([table_of(scores), table_of({"a": [0.5, 0.5], "b": [0.6, 0.6]}, split="dev")])
    assert only_pair(split).plan.tasks == 2
    assert only_pair(split).mean == pytest.approx(((-0.2 - 0.1) / 2 + (-0.1 - 0.1) / 2) / 2)


def test_pairs_use_what_both_have_and_say_so():
    table = pd.concat([
        table_of({"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3, None]}),
        table_of({"a": [0.9]}, subset="de"),
    ])  # fmt: skip
    comparison = compare(table)
    (pair,) = comparison.types[0].pairs
    assert (pair.plan.tasks, pair.mean) == (2, pytest.approx(-0.1))
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


def test_items_of_both_are_tested_for_these_tasks():
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
    differences = (values["a"] - values["b"]).groupby("task")
    error = math.sqrt((differences.var() / 30).sum()) / 3
    assert (pair.items.tasks, pair.items.items, pair.items_metric) == (3, 90, "ndcg_at_10")
    assert pair.items.mean_difference == pytest.approx(differences.mean().mean())
    assert pair.items.p == pytest.approx(2 * stats.norm.sf(abs(pair.items.mean_difference) / error), rel=0.5, abs=1e-4)


def test_metric_is_chosen_or_the_only_one():
    table = pd.concat([table_of({"a": [0.1], "b": [0.2]}, metric=metric) for metric in ("ndcg_at_10", "recall")])
    with pytest.raises(ConfigurationError, match=r"no score 'main_score', it has ndcg_at_10, recall.*--metric"):
        compare(table)
    assert only_pair(table, metric="recall").plan.tasks == 1
    assert only_pair(table[table["metric"] == "recall"]).plan.tasks == 1
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


@pytest.mark.parametrize(
    "setting", [Setting(12, 1), Setting(7, 2, seed_noise=0.005), Setting(12, 1, seed_noise=0.01), Setting(30, 1, 3)]
)
def test_equal_designs_whose_corpora_and_seeds_differ_get_no_winner_more_often_than_stated(setting):
    """Any of six contrasts, and any of nine exploratory pairs; in whole by `python -m tests.stats.validation`."""
    named, others = null_rates(400, setting)
    assert named <= at_most(0.05, 400)
    assert others <= at_most(0.05, 400)


def test_tasks_of_one_corpus_would_name_a_winner_in_a_third_of_studies_and_the_verdict_says_on_this_corpus():
    assert null_rates(200, Setting())[0] > 0.2
    (kind,) = compare(Setting().scores(np.random.default_rng(0), DESIGNS, effect=0.05), CONTRASTS).types
    assert any(pair.leader for pair in kind.pairs)
    assert not any(pair.winner for pair in kind.pairs)


@pytest.mark.parametrize(("setting", "tests"), [(Setting(12, 1), 6), (Setting(8, 2), 1), (Setting(20, 1, 5), 3)])
def test_planted_effect_is_found_at_the_rate_that_the_plan_promises(setting, tests):
    assert planted_rate(400, setting, tests=tests) == pytest.approx(0.8, abs=0.06)


def test_simulated_decisions_are_those_of_compare():
    for setting in (Setting(12, 1), Setting(8, 2), Setting(1, 12, corpus_spread=0.0)):
        many = decisions(setting, 1, DESIGNS, CONTRASTS, effect=0.03, seed=5)[0]
        (kind,) = compare(setting.scores(np.random.default_rng(5), DESIGNS, effect=0.03), CONTRASTS).types
        found = [pair.outcome for pair in kind.pairs if pair.confirmatory]
        assert [0 if outcome == 2 else outcome for outcome in found] == [0 if code == 2 else code for code in many]
        assert any(found)


def test_designs_at_the_edge_of_the_region_are_not_called_equivalent():
    setting = Setting(12, 1, task_spread=0.002)
    assert equivalence_rate(40, setting, effect=0.01) <= at_most(0.05, 40)
    assert equivalence_rate(40, setting, effect=0.0) > 0.3
