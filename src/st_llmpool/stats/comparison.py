"""Compare designs by task type: every pair, corrected for multiplicity, with a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from ..modules.errors import ConfigurationError, DataError, nearest
from ..utils.words import counted, listed
from .comparability import check_main_metrics, check_scores, constant_scores, source_differences, unknown_sources
from .power_analysis import ALPHA, POWER, Plan
from .results import MAIN_SCORE, MAX_CONTRASTS, MAX_MODELS, Results, complete, label
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
    """Two designs, first minus second, over the tasks of one type that both have scores for.

    Args:
        first: A design.
        second: Another.
        confirmatory: Whether the comparison was pre-registered.
        test: The test over tasks.
        p_holm: Its p-value, corrected for the pairs of the same family.
        reachable: Whether any scores could have made it significant.
        detectable: The mean difference that gets a verdict in at least 80 % of studies with this spread between tasks
            and seeds; infinite if not `reachable`.
        seed_difference: The difference that seeds alone make, see `SeedNoise.least_difference`; NaN if unknown.
        items: The test over items, if both have scores of the same items.
        items_metric: Metric of these scores.
        items_p_holm: p-value of `items` for tasks like these, corrected as `p_holm`; NaN without.
        alpha: Level of significance.
        identical: Whether both have the same score in every cell, including seeds, splits and subsets.
        doubt: Why no verdict may rest on the scores; empty if nothing speaks against one.
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
        """Whether the corrected p-value is at or below the level, and there is no `doubt`."""
        return self.p_holm <= self.alpha and not self.doubt

    @property
    def within_seed_noise(self) -> bool:
        """Whether seeds of one design differ as much; False if seed noise is unknown."""
        return abs(self.test.mean_difference) < self.seed_difference

    @property
    def contradictory(self) -> bool:
        """Whether ranks and mean difference have different signs."""
        return (self.test.mean_difference > 0) != (self.test.effect_size > 0)

    @property
    def winner(self) -> str | None:
        """The design that the verdict calls better; None without a verdict."""
        if not self.significant or self.contradictory or self.within_seed_noise:
            return None
        return self.first if self.test.mean_difference > 0 else self.second

    @property
    def loser(self) -> str | None:
        """The other design, if there is a winner."""
        return {None: None, self.first: self.second, self.second: self.first}[self.winner]

    @property
    def outcome(self) -> str:
        """What the test over tasks says of the first design, in a few words."""
        if self.identical:
            return "identical scores"
        if self.doubt:
            return f"no verdict, {self.doubt}"
        if not self.reachable:
            return f"undecided, {counted(self.test.n, 'task')} cannot give a significant result"
        if not self.significant:
            return f"no significant difference (detectable: {self.detectable:.2g})"
        if self.contradictory:
            return "no verdict, ranks and mean difference disagree in sign"
        if self.within_seed_noise:
            return f"no verdict, seeds alone differ by {self.seed_difference:.2g}"
        better, worse = ("better", "worse") if self.confirmatory else ("above", "below")
        return better if self.winner == self.first else worse

    @property
    def verdict(self) -> str:
        """What the test over tasks says, in one sentence."""
        if self.winner is None:
            return f"{self.first} and {self.second}: {self.outcome}."
        by = f"by {abs(self.test.mean_difference):.2g} on average"
        if self.confirmatory:
            return f"{self.winner} is better than {self.loser}, {by}."
        return f"{self.winner} scores above {self.loser}, {by}: to be confirmed on other data."


@dataclass(frozen=True)
class Family:
    """Pairs that Holm's procedure corrects together.

    Args:
        confirmatory: Whether they were pre-registered, or are the only pair.
        plan: Their power.
        pairs: The pairs.
    """

    confirmatory: bool
    plan: Plan
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class TypeComparison:
    """The comparison for one task type and base model.

    Args:
        base: Base model of the designs; empty for models from elsewhere.
        task_type: Type of the tasks.
        title: The task type, with the base if there are several.
        scores: Score by task (rows) and design (columns), averaged over seeds; NaN where there is none.
        runs: Design to the scores of its runs, each the mean over the tasks that all runs have; empty without such.
        families: Confirmatory pairs, then exploratory ones, if there are any.
        ranks: Friedman's test over the tasks that all designs have; None for two designs or fewer than two such tasks.
        seeds: Seed noise; None if no design has two runs.
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
    """Test every pair of designs within each task type, over tasks; seeds, splits and subsets are averaged first.

    Pairs named in `contrasts` are confirmatory: verdicts rest on them. All others are exploratory and corrected
    separately. Of two designs the only pair is confirmatory.

    Args:
        results: What `read_results` returns, or a table with some of its columns.
        contrasts: At most six pre-registered comparisons, ``("A", "B")`` or ``"A:B"``, read as A minus B.
        metric: The score to compare. A task without a main score that has only one other is compared by that.
        alpha: Level of significance.
        allow_mixed_revisions: Accept scores of one task on different dataset revisions, mteb versions, languages or
            queries; a note names them.

    Raises:
        ConfigurationError: If a contrast or the metric is unknown, main scores are of different metrics, or there are
            fewer than two designs or too many.
        DataError: If no two designs have a task in common, a score is NaN or out of range, or a task was evaluated
            differently and `allow_mixed_revisions` is not set.

    Example:
        >>> rows = [("Task%d" % t, "STS", m, 0.4 + 0.01 * t * (1 + (m == "b"))) for t in range(1, 9) for m in "ab"]
        >>> table = pd.DataFrame(rows, columns=["task", "task_type", "design", "score"])
        >>> print(*compare(table, ["b:a"]).verdicts)
        STS: b is better than a, by 0.045 on average.
    """
    notes = [] if isinstance(results, pd.DataFrame) else list(results.notes)
    table = _with_models(complete(results if isinstance(results, pd.DataFrame) else results.table))
    everything, items = table[table["item"] == ""], table[table["item"] != ""].dropna(subset="score")
    scores = _of_metric(everything, metric)
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


def _with_models(table: pd.DataFrame) -> pd.DataFrame:
    """Add a column `model`, the label of design, option and step."""
    names = ["design", "option", "step"]
    unique = table[names].drop_duplicates()
    labels = [label(design, option) + (f" @ step {step}" if step else "") for design, option, step in unique.to_numpy()]
    twice = next((name for place, name in enumerate(labels) if name in labels[:place]), None)
    if twice is not None:
        raise DataError(f"two designs are both called {twice!r} in tables; rename one or its option.")
    return table.merge(unique.assign(model=labels), on=names)


def _mixed(differences: Sequence[str], allowed: bool) -> list[str]:
    """Return notes on tasks that were evaluated differently, or refuse them."""
    if differences and not allowed:
        raise DataError(
            f"the models were evaluated differently: {'; '.join(differences)} differ. Evaluate again, compare fewer "
            f"models (--model), or accept it: allow_mixed_revisions, --allow-mixed-revisions."
        )
    return [f"Evaluated differently, accepted as requested: {difference}." for difference in differences]


def _of_metric(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows of the wanted metric; of a task that lacks a main score, those of its only metric."""
    wanted = scores["metric"] == metric
    lacking = ~wanted.groupby(scores["task"]).transform("any")
    for task, metrics in scores[lacking].groupby("task")["metric"].unique().items():
        if len(metrics) > 1 or metric != MAIN_SCORE:
            raise ConfigurationError(
                f"task {task} has no score {metric!r}, it has {', '.join(map(str, metrics[:10]))}."
                f"{nearest(metric, metrics)} Name the one to compare (metric, or --metric NAME)."
            )
    return scores[wanted | lacking]


def _resolve(contrasts: Sequence[str | tuple[str, str]], models: Sequence[str]) -> list[tuple[str, str]]:
    """Return contrasts as pairs of models; a name may be given without its organisation."""
    if len(contrasts) > MAX_CONTRASTS:
        raise ConfigurationError(
            f"{len(contrasts)} contrasts are named; at most {MAX_CONTRASTS} can be confirmatory, the others are "
            f"tested as exploratory without being named."
        )
    short = {model.rpartition("/")[2]: model for model in models}
    names = (short if len(short) == len(models) else {}) | {model: model for model in models}
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
        differences = {pair: _by_task(cells[pair[0]] - cells[pair[1]]) for pair in pairs}
        differences = {pair: found for pair, found in differences.items() if len(found)}
        if not differences:
            continue
        plan = Plan(max(map(len, differences.values())), len(differences), alpha)
        tests = [paired_test(found) for found in differences.values()]
        over_items = [_over_items(items, *pair) for pair in differences]
        columns = (tests, holm([test.p for test in tests]), over_items, _holm_of_items(over_items))
        family = []
        for (pair, found), test, p_holm, of_items, items_p in zip(differences.items(), *columns, strict=True):
            reachable = plan.reachable and smallest_p(test.n) <= alpha
            spread = float(found.std(ddof=1))
            family.append(
                Pair(
                    *pair,
                    confirmatory=confirmatory,
                    test=test,
                    p_holm=p_holm,
                    reachable=reachable,
                    detectable=_detectable(pair, replace(plan, tasks=test.n), spread, noise) if reachable else math.inf,
                    seed_difference=noise.least_difference(*pair) if noise else math.nan,
                    items=of_items and of_items[0],
                    items_metric=of_items[1] if of_items else "",
                    items_p_holm=items_p,
                    alpha=alpha,
                    identical=_identical(runs[pair[0]], runs[pair[1]]),
                    doubt="; ".join(doubts[name] for name in pair if name in doubts),
                )
            )
        families.append(Family(confirmatory, plan, tuple(family)))
    ranked = _by_task(cells)
    ranks = rank_test(ranked) if len(present) > 2 and len(ranked) > 1 else None
    return TypeComparison(*names, cells.groupby("task").mean(), of_runs, tuple(families), ranks, noise)


def _identical(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Return whether two models have equal scores in the same cells, as one model under two names has."""
    return (
        first.shape == second.shape
        and first.columns.equals(second.columns)
        and bool(np.allclose(first, second, rtol=0, atol=10.0**-DECIMALS / 2, equal_nan=True))
    )


def _by_task(cells: pd.Series | pd.DataFrame) -> pd.Series | pd.DataFrame:
    """Return the mean of each task over the splits and subsets that have all scores."""
    return cells.dropna().groupby("task").mean()


def _holm_of_items(tests: Sequence[tuple[ItemTest, str] | None]) -> list[float]:
    """Return the corrected p-values of the tests over items; NaN where there is none."""
    p_values = pd.Series([math.nan if test is None else test[0].p for test in tests])
    p_values[p_values.notna()] = holm(list(p_values.dropna()))
    return list(p_values)


def _detectable(pair: tuple[str, str], plan: Plan, spread: float, noise: SeedNoise | None) -> float:
    """Return the mean difference that the rule of verdicts finds at 80 % power.

    The rule asks for a significant test over tasks and a difference beyond seed noise: a mean difference above two
    bounds, around which tasks and seeds vary. The bounds are estimates that vary too, hence the margin of 90 %.
    """
    over_tasks = plan.effect * spread
    if noise is None:
        return over_tasks
    error = spread / math.sqrt(plan.tasks)
    bound = max(over_tasks - float(stats.norm.ppf(POWER)) * error, noise.least_difference(*pair))
    return bound + float(stats.norm.ppf((1 + POWER) / 2)) * math.hypot(error, noise.standard_error(*pair))


def _over_items(items: pd.DataFrame, first: str, second: str) -> tuple[ItemTest, str] | None:
    """Return the test over the items that both have, and their metric; None if there are none."""
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
    """Return sentences on what some designs lack."""
    absent = [model for model in models if model not in found.scores]
    notes = [f"no score of {', '.join(absent)}"] if absent else []
    for model in found.scores:
        lacking = list(found.scores.index[found.scores[model].isna()])
        if lacking:
            notes.append(f"{model} has no score on {listed(lacking, most=5)}; its pairs leave them out")
        seeds = scores[scores["model"] == model].groupby("seed")["task"].nunique()
        if seeds.nunique() > 1:
            counts = ", ".join(f"seed {seed} {count}" for seed, count in seeds.items())
            notes.append(f"the seeds of {model} were scored on different numbers of tasks ({counts})")
    places = scores.groupby(_CELL)["model"].nunique()
    partly = places[places < places.groupby("task").transform("max")]
    if len(partly):
        tasks = listed(partly.index.get_level_values("task"), most=5)
        notes.append(f"compared on the splits and subsets that both have: {tasks}")
    if not found.families:
        notes.append("no two models have a task in common; left out")
    verdicts = [pair.verdict for pair in found.pairs if pair.identical or pair.doubt]
    unknown = ["One run per model: seed noise is unknown, and no p-value covers it."] if found.seeds is None else []
    return [*(f"{found.title}: {note}." for note in notes), *(f"{found.title}: {line}" for line in verdicts), *unknown]
