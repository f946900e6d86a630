"""Compares designs on the results of a study, or of anybody: per task type, every pair, corrected and put in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from ..modules.errors import ConfigurationError, DataError, nearest
from ..utils.words import counted, listed
from .comparability import check_main_metrics, check_scores, constant_scores, source_differences, unknown_sources
from .power_analysis import ALPHA, POWER, Plan
from .results import MAIN_SCORE, MAX_CONTRASTS, MAX_MODELS, SOURCE_COLUMNS, Results, label
from .statistics import (
    DECIMALS,
    ItemTest,
    PairedTest,
    RankTest,
    SeedNoise,
    holm,
    item_test,
    paired_test,
    rank_test,
    seed_noise,
    smallest_p,
)

_CELL = ["task", "split", "subset"]


@dataclass(frozen=True)
class Pair:
    """Two designs, first minus second, over the tasks of one type that both were scored on.

    Args:
        first: A design.
        second: Another.
        confirmatory: Whether the comparison was pre-registered.
        test: The test over tasks.
        p_holm: Its p-value, corrected for the pairs of the same table.
        reachable: Whether any scores could have made it significant.
        detectable: The mean difference that gets a verdict in at least 80 % of studies with this spread between tasks
            and between seeds; infinite if not `reachable`.
        seed_difference: The difference that seeds alone make, see `SeedNoise.least_difference`; NaN where no design
            has two runs.
        items: The test over items, where both have scores of the same items.
        items_metric: What the scores of the items are.
        items_p_holm: Its p-value for tasks like these, corrected as `p_holm`; NaN without.
        alpha: Level of significance.
        identical: Whether both have the same score in every cell, seeds, splits and subsets included.
        doubt: Why the scores give no verdict whatever the tests say; empty if nothing speaks against one.
    """

    first: str
    second: str
    confirmatory: bool
    test: PairedTest
    p_holm: float
    reachable: bool
    detectable: float
    seed_difference: float
    items: ItemTest | None
    items_metric: str
    items_p_holm: float
    alpha: float = ALPHA
    identical: bool = False
    doubt: str = ""

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is at or below the level, `reachable` and free of `doubt`."""
        return self.p_holm <= self.alpha and not self.doubt

    @property
    def within_seed_noise(self) -> bool:
        """Whether runs of one design differ as much; False where the noise of seeds is not known."""
        return abs(self.test.mean_difference) < self.seed_difference

    @property
    def contradictory(self) -> bool:
        """Whether most tasks go one way and the mean difference the other."""
        return (self.test.mean_difference > 0) != (self.test.effect_size > 0)

    @property
    def winner(self) -> str | None:
        """The design that the verdict calls better, or above; None if it calls neither."""
        if not self.significant or self.contradictory or self.within_seed_noise or self.doubt:
            return None
        return self.first if self.test.mean_difference > 0 else self.second

    @property
    def loser(self) -> str | None:
        """The other one of the two, if there is a winner."""
        return {None: None, self.first: self.second, self.second: self.first}[self.winner]

    @property
    def verdict(self) -> str:
        """What the test over tasks says, in one sentence."""
        difference = abs(self.test.mean_difference)
        better, worse = (self.first, self.second) if self.test.mean_difference > 0 else (self.second, self.first)
        tasks = counted(self.test.n, "task")
        if self.identical:
            return f"{self.first} and {self.second} are identical: the same score in every cell of {tasks}."
        if self.doubt:
            return f"No verdict on {self.first} and {self.second}: {self.doubt}."
        if not self.reachable:
            return f"Undecided between {self.first} and {self.second}: {tasks} cannot give a significant result."
        if not self.significant:
            return (
                f"No significant difference between {self.first} and {self.second}; the minimal detectable difference "
                f"over {tasks} is {self.detectable:.2g} ({100 * POWER:.0f} % power)."
            )
        if self.contradictory:
            return f"No verdict: ranks and mean difference of {self.first} and {self.second} disagree in sign."
        if self.within_seed_noise:
            return (
                f"No verdict: {better} scores above {worse} in these runs, but by less ({difference:.2g}) than seeds "
                f"alone make ({self.seed_difference:.2g})."
            )
        if not self.confirmatory:
            return f"{better} scores above {worse}, by {difference:.2g} on average: to be confirmed on other data."
        return f"{better} is better than {worse}, by {difference:.2g} on average."


@dataclass(frozen=True)
class Family:
    """The pairs that one table shows; Holm corrects for their number.

    Args:
        confirmatory: Whether they were pre-registered, or there is only one.
        plan: Power of the table.
        pairs: The pairs.
    """

    confirmatory: bool
    plan: Plan
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class TypeComparison:
    """All that is found for one task type (and one base model).

    Args:
        base: Base model of the designs; empty for foreign results.
        task_type: Type of the tasks.
        title: The task type, with the base where there are several.
        scores: Score by task (rows) and design (columns), seed-averaged; NaN where there is none.
        runs: Design to the scores of its runs, each the mean over the tasks that all runs were scored on; empty if
            there are none.
        families: The confirmatory pairs, then the exploratory ones, without empty ones.
        ranks: Ranks over the tasks that all designs were scored on; None with two designs or fewer than two such tasks.
        seeds: Noise of seeds; None where no design has two runs.
    """

    base: str
    task_type: str
    title: str
    scores: pd.DataFrame
    runs: dict[str, list[float]]
    families: tuple[Family, ...]
    ranks: RankTest | None
    seeds: SeedNoise | None

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of all families."""
        return [pair for family in self.families for pair in family.pairs]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        types: One for each base and task type.
        metric: The score that was compared.
        alpha: Level of significance.
        notes: What a reader must know, in sentences.
    """

    types: tuple[TypeComparison, ...]
    metric: str
    alpha: float
    notes: tuple[str, ...]

    @property
    def verdicts(self) -> list[str]:
        """One sentence for each confirmatory pair, with its task type."""
        return [f"{found.title}: {pair.verdict}" for found in self.types for pair in found.pairs if pair.confirmatory]


def compare(
    results: Results | pd.DataFrame,
    contrasts: Sequence[str | tuple[str, str]] = (),
    *,
    metric: str = MAIN_SCORE,
    alpha: float = ALPHA,
    allow_mixed_revisions: bool = False,
) -> Comparison:
    """Tests every pair of designs within each task type, over tasks; seeds, splits and subsets are averaged first.

    Pairs named in `contrasts` are confirmatory: verdicts rest on them. All others are exploratory and corrected on
    their own. Of two designs the only pair is confirmatory.

    Args:
        results: What `read_results` returns, or its `scores`.
        contrasts: At most six pre-registered comparisons: ``("A", "B")`` or ``"A:B"``, read
            as A minus B.
        metric: The score to compare. A task that lacks it and has only one is compared by that one.
        alpha: Level of significance.
        allow_mixed_revisions: Compare scores of different dataset revisions, mteb versions, languages or queries of
            one task all the same; a note names them.

    Raises:
        ConfigurationError: If a contrast or the metric is unknown, main scores are of different metrics, or there are
            fewer than two designs or too many.
        DataError: If no two designs have a task in common, a score is NaN or out of range, or a task was evaluated
            differently and `allow_mixed_revisions` is not set.

    Example:
        >>> rows = [("Task%d" % t, "STS", m, 0.4 + 0.01 * t * (1 + (m == "b"))) for t in range(1, 9) for m in "ab"]
        >>> table = pd.DataFrame(rows, columns=["task", "task_type", "design", "score"]).assign(
        ...     base="", option="", seed="0", split="test", subset="default", metric="main_score")
        >>> print(*compare(table, ["b:a"]).verdicts)
        STS: b is better than a, by 0.045 on average.
    """
    if isinstance(results, pd.DataFrame):
        results = Results(results, results.iloc[:0].assign(item=""))
    notes = list(results.notes)
    everything = _labelled(results.scores)
    scores, items = _of_metric(everything, metric), _labelled(results.items).dropna(subset="score")
    check_scores(scores)
    if metric == MAIN_SCORE:
        check_main_metrics(everything)
    notes += unknown_sources(scores)
    notes += _mixed(source_differences(scores, items), allow_mixed_revisions)
    models = list(dict.fromkeys(scores["model"]))
    if not 2 <= len(models) <= MAX_MODELS:
        shown = ", ".join(models[:10]) + (", ..." if len(models) > 10 else "")
        raise ConfigurationError(
            f"there are results of {len(models)} model(s), {shown}; a comparison is of 2 to {MAX_MODELS}. Name those "
            f"to compare (models, or --model NAME)."
        )
    chosen = _resolve(contrasts, models)
    types = []
    for (base, task_type), rows in scores.groupby(["base", "task_type"], sort=False):
        own = items[(items["base"] == base) & (items["task_type"] == task_type)]
        title = f"{task_type} ({base})" if scores["base"].nunique() > 1 else str(task_type)
        found = _compare_type((str(base), str(task_type), title), rows, own, chosen, models, alpha)
        notes += _gaps(found, rows, models)
        if found.families:
            types.append(found)
    if not types:
        raise DataError(f"no two of {', '.join(models)} were scored on the same task, split and subset.")
    return Comparison(tuple(types), metric, alpha, tuple(dict.fromkeys(notes)))


def _labelled(table: pd.DataFrame) -> pd.DataFrame:
    table = table.assign(**{column: "" for column in SOURCE_COLUMNS if column not in table}).fillna(
        dict.fromkeys(SOURCE_COLUMNS, "")
    )
    names = table[["design", "option"]].drop_duplicates()
    labels = pd.Series([label(*pair) for pair in names.itertuples(index=False)], index=pd.MultiIndex.from_frame(names))
    if labels.duplicated().any():
        twice = labels[labels.duplicated()].iloc[0]
        raise DataError(f"two designs are both called {twice!r} in tables; rename one or its option.")
    return table.assign(
        model=labels.reindex(pd.MultiIndex.from_frame(table[names.columns])).array, seed=table["seed"].astype(str)
    )


def _mixed(differences: Sequence[str], allowed: bool) -> list[str]:
    """Returns a note on tasks that were evaluated differently, or refuses them."""
    if differences and not allowed:
        raise DataError(
            f"the models were evaluated differently: {'; '.join(differences)} differ. Evaluate again, compare fewer "
            f"models (--model), or accept it: allow_mixed_revisions, --allow-mixed-revisions."
        )
    return [f"Evaluated differently, accepted as requested: {difference}." for difference in differences]


def _of_metric(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Returns the rows of one metric for each task: the wanted one or, of tasks that have only one, that one."""
    wanted = scores["metric"] == metric
    lacking = scores[~wanted.groupby(scores["task"]).transform("any")]
    for task, metrics in lacking.groupby("task")["metric"].unique().items():
        if len(metrics) > 1:
            raise ConfigurationError(
                f"task {task} has no score {metric!r}, it has {', '.join(map(str, metrics[:10]))}."
                f"{nearest(metric, metrics)} Name the one to compare (metric, or --metric NAME)."
            )
    return pd.concat([scores[wanted], lacking]).sort_index()


def _resolve(contrasts: Sequence[str | tuple[str, str]], models: Sequence[str]) -> list[tuple[str, str]]:
    """Returns contrasts as pairs of models; a name may be given without its organisation."""
    if len(contrasts) > MAX_CONTRASTS:
        raise ConfigurationError(
            f"{len(contrasts)} contrasts are named; at most {MAX_CONTRASTS} can be confirmatory, the others are "
            f"tested as exploratory without being named."
        )
    short = {model.rpartition("/")[2]: model for model in models}
    names = short | {model: model for model in models} if len(short) == len(models) else {m: m for m in models}
    pairs = []
    for contrast in contrasts:
        if isinstance(contrast, str):
            cuts = [place for place, sign in enumerate(contrast) if sign == ":"]
            splits = [(contrast[:cut], contrast[cut + 1 :]) for cut in cuts]
            if not splits:
                raise ConfigurationError(f"contrast {contrast!r} must be two names with a colon between, A:B.")
            contrast = next((pair for pair in splits if names.keys() >= set(pair)), splits[0])
        for name in contrast:
            if name not in names:
                known = f"there are {', '.join(models)}.{nearest(name, names)}"
                raise ConfigurationError(f"contrast {':'.join(contrast)} names {name!r}; {known}")
        pair = names[contrast[0]], names[contrast[1]]
        if pair[0] == pair[1] or pair in pairs or pair[::-1] in pairs:
            raise ConfigurationError(f"contrast {':'.join(contrast)} names one model twice, or is repeated.")
        pairs.append(pair)
    return pairs


def _compare_type(
    names: tuple[str, str, str],
    scores: pd.DataFrame,
    items: pd.DataFrame,
    contrasts: Sequence[tuple[str, str]],
    models: Sequence[str],
    alpha: float,
) -> TypeComparison:
    runs = scores.groupby([*_CELL, "model", "seed"])["score"].mean().unstack(["model", "seed"])
    present = [model for model in models if model in runs]
    cells = pd.DataFrame({model: runs[model].mean(axis=1) for model in present})
    doubts = {
        model: f"{model} has one and the same score, {score:g}, on all of its tasks"
        for model, score in constant_scores(cells.groupby("task").mean()).items()
    }
    common = _by_task(runs)
    of_runs = {model: [float(score) for score in common[model].mean()] for model in present if len(common)}
    noise = seed_noise(of_runs) if of_runs else None
    named = [pair for pair in contrasts if set(pair) <= set(present)]
    others = [pair for pair in combinations(present, 2) if pair not in named and pair[::-1] not in named]
    if not contrasts and len(models) == 2:
        named, others = others, []
    families = []
    for confirmatory, pairs in ((True, named), (False, others)):
        tests = {pair: _by_task(cells[pair[0]] - cells[pair[1]]) for pair in pairs}
        tests = {pair: differences for pair, differences in tests.items() if len(differences)}
        if tests:
            family = _family(confirmatory, tests, items, noise, alpha)
            pairs_found = tuple(
                replace(
                    pair,
                    identical=_identical(runs[pair.first], runs[pair.second]),
                    doubt="; ".join(doubts[name] for name in (pair.first, pair.second) if name in doubts),
                )
                for pair in family.pairs
            )
            families.append(replace(family, pairs=pairs_found))
    complete = _by_task(cells)
    ranks = rank_test(complete, alpha=alpha) if len(present) > 2 and len(complete) > 1 else None
    return TypeComparison(*names, cells.groupby("task").mean(), of_runs, tuple(families), ranks, noise)


def _identical(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Returns whether two models have the same scores in the same cells, as one model under two names has."""
    return (
        first.shape == second.shape
        and first.columns.equals(second.columns)
        and bool(np.allclose(first, second, rtol=0, atol=10.0**-DECIMALS / 2, equal_nan=True))
    )


def _by_task(cells: pd.Series | pd.DataFrame) -> pd.Series | pd.DataFrame:
    """Returns the mean of each task over the splits and subsets that have all scores."""
    return cells.dropna().groupby("task").mean()


def _family(
    confirmatory: bool,
    tests: Mapping[tuple[str, str], pd.Series],
    items: pd.DataFrame,
    noise: SeedNoise | None,
    alpha: float,
) -> Family:
    plan = Plan(max(len(differences) for differences in tests.values()), len(tests), alpha)
    results = {pair: paired_test(differences) for pair, differences in tests.items()}
    corrected = holm([test.p for test in results.values()])
    item_tests = {pair: _over_items(items, *pair) for pair in tests}
    item_p = {pair: found[0].p for pair, found in item_tests.items() if found is not None}
    testable = [pair for pair, p in item_p.items() if not math.isnan(p)]
    item_p_holm = dict(zip(testable, holm([item_p[pair] for pair in testable]), strict=True))
    pairs = []
    for (pair, test), p_holm in zip(results.items(), corrected, strict=True):
        reachable = plan.reachable and smallest_p(test.n) <= alpha
        spread = float(tests[pair].std(ddof=1))
        over_items = item_tests[pair]
        pairs.append(
            Pair(
                *pair,
                confirmatory=confirmatory,
                test=test,
                p_holm=p_holm,
                reachable=reachable,
                detectable=_detectable(pair, test.n, len(tests), float(spread), noise, alpha)
                if reachable
                else math.inf,
                seed_difference=noise.least_difference(*pair) if noise else math.nan,
                items=over_items[0] if over_items else None,
                items_metric=over_items[1] if over_items else "",
                items_p_holm=item_p_holm.get(pair, math.nan),
                alpha=alpha,
            )
        )
    return Family(confirmatory, plan, tuple(pairs))


def _detectable(
    pair: tuple[str, str], tasks: int, tests: int, spread: float, noise: SeedNoise | None, alpha: float
) -> float:
    """Returns the mean difference that the rule of verdicts finds at 80 % power.

    The rule asks for a significant test over tasks and for a difference beyond the noise of seeds. Either asks for a
    mean difference above a bound, and what varies around the true one are tasks and seeds. The bounds are estimates
    that vary too, so the margin is that of 90 %.
    """
    over_tasks = Plan(tasks, tests, alpha).effect * spread
    if noise is None:
        return over_tasks
    error = spread / math.sqrt(tasks)
    bound = max(over_tasks - float(stats.norm.ppf(POWER)) * error, noise.least_difference(*pair))
    return bound + float(stats.norm.ppf((1 + POWER) / 2)) * math.hypot(error, noise.standard_error(*pair))


def _over_items(items: pd.DataFrame, first: str, second: str) -> tuple[ItemTest, str] | None:
    """Returns the test over the items that both have, and their metric; None if there are none."""
    both = items[items["model"].isin((first, second))]
    if both["model"].nunique() < 2:
        return None
    metric = both["metric"].value_counts().index[0]
    both = both[both["metric"] == metric]
    cells = both.groupby([*_CELL, "item", "model"])["score"].mean().unstack("model").dropna()
    if not {first, second} <= set(cells.columns):
        return None
    differences = (cells[first] - cells[second]).groupby("task")
    groups = {str(task): values.to_numpy() for task, values in differences if len(values) > 1}
    return (item_test(groups), str(metric)) if groups else None


def _gaps(found: TypeComparison, scores: pd.DataFrame, models: Sequence[str]) -> list[str]:
    """Returns sentences on what some designs lack."""
    absent = [model for model in models if model not in found.scores]
    notes = [f"{found.title}: no score of {', '.join(absent)}."] if absent else []
    for model in found.scores:
        lacking = list(found.scores.index[found.scores[model].isna()])
        if lacking:
            shown = listed(lacking, most=5)
            notes.append(f"{found.title}: {model} has no score on {shown}; its pairs leave them out.")
        seeds = scores[scores["model"] == model].groupby("seed")["task"].nunique()
        if seeds.nunique() > 1:
            counts = ", ".join(f"seed {seed} {count}" for seed, count in seeds.items())
            notes.append(f"{found.title}: the seeds of {model} were scored on different numbers of tasks ({counts}).")
    places = scores.drop_duplicates([*_CELL, "model"]).groupby([*_CELL])["model"].nunique()
    partly = places[places < places.groupby("task").transform("max")]
    if len(partly):
        tasks = partly.index.get_level_values("task").unique()
        notes.append(f"{found.title}: compared on the splits and subsets that both have: {', '.join(tasks[:5])}.")
    notes += [f"{found.title}: {pair.verdict}" for pair in found.pairs if pair.identical or pair.doubt]
    if found.seeds is None:
        notes.append("One run per model: seed noise is unknown, and no p-value covers it.")
    if not found.families:
        notes.append(f"{found.title}: no two models have a task in common; left out.")
    return notes
