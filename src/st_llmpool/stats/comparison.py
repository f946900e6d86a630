"""Compare designs by task type: every pair, corrected for multiplicity, with a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd

from ..modules.errors import ConfigurationError, DataError, nearest
from ..utils.words import counted, listed
from .comparability import check_main_metrics, check_scores, constant_scores, source_differences, unknown_sources
from .multilevel import MultilevelFit, fit_multilevel
from .power_analysis import Pilot, Plan
from .results import MAIN_SCORE, MAX_CONTRASTS, MAX_MODELS, Results, complete, counted_corpora, design_names, label
from .statistics import (
    ALPHA,
    BETTER,
    DECIMALS,
    EQUIVALENT,
    ROPE,
    UNDECIDED,
    WORSE,
    Array,
    DifferenceTest,
    ItemTest,
    RankTest,
    decide,
    difference_test,
    holm,
    item_test,
    pooled_seed_error,
    rank_biserial,
    rank_test,
    resampled_interval,
    signed_rank_posterior,
    smallest_p,
)

_CELL = ["corpus", "task", "split", "subset"]
_TASK = _CELL[:2]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two designs, first minus second, over the tasks of one type that both have scores for.

    Args:
        first: A design.
        second: Another.
        confirmatory: Whether the comparison was pre-registered.
        differences: Differences by task (index corpus, task) and seed that both have; by their mean over seeds if they
            have fewer than two seeds in common.
        seed_error: Variance of the mean difference that seeds make, and its degrees of freedom: the larger of that of
            the pair and that of the family. None for a single run.
        test: The tests, see `statistics.difference_test`.
        p_holm: p-value of the difference, corrected for the pairs of the same family.
        p_equivalent: p-value of the equivalence, corrected likewise.
        posterior: Bayesian probabilities that the second is better, both are equivalent, the first is better.
        outcome: `statistics.decide`: BETTER, WORSE, EQUIVALENT or UNDECIDED.
        plan: Power of the family, with the variances of this pair.
        items: The test over items, if both have scores of the same items.
        items_metric: Metric of these scores.
        identical: Whether both have the same score in every cell, including seeds, splits and subsets.
        doubt: Why no verdict may rest on the scores; empty if nothing speaks against one.
    """

    first: str
    second: str
    confirmatory: bool
    differences: pd.DataFrame
    seed_error: tuple[float, float] | None
    test: DifferenceTest
    p_holm: float
    p_equivalent: float
    posterior: tuple[float, float, float]
    outcome: int
    plan: Plan
    items: ItemTest | None = None
    items_metric: str = ""
    identical: bool = False
    doubt: str = ""

    @property
    def mean(self) -> float:
        """The difference: mean over corpora of the mean over their tasks and seeds."""
        return float(self.test.mean)

    @property
    def units(self) -> Array:
        """Differences of the corpora, or of the tasks of one corpus, averaged over seeds."""
        return _units(self.differences).mean(axis=1)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the difference, see `statistics.resampled_interval`."""
        by_task = self.differences.mean(axis=1)
        corpora = [tasks.to_numpy() for _, tasks in by_task.groupby(level="corpus", sort=False)]
        return resampled_interval(corpora, self.seed_error)

    @property
    def effect_size(self) -> float:
        """Matched-pairs rank-biserial correlation of the units, from -1 to 1."""
        return rank_biserial(self.units)

    @property
    def reachable(self) -> bool:
        """Whether the number of units, without those that do not differ, could have made it significant."""
        differing = int((self.units.round(DECIMALS) != 0).sum())
        return self.plan.reachable and smallest_p(differing) <= self.plan.alpha

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is at or below the level, and there is no `doubt`."""
        return self.p_holm <= self.plan.alpha and not self.doubt

    @property
    def scope(self) -> str:
        """What the result is limited to, in words; empty with several corpora and several seeds."""
        limits = ["in this run"] if self.seed_error is None else []
        limits += [] if self.plan.corpora > 1 else ["on this corpus"]
        return "".join(f" {limit}" for limit in limits)

    @property
    def leader(self) -> str | None:
        """The design that scores higher, within `scope`; None if that is not decided."""
        return {BETTER: self.first, WORSE: self.second}.get(self.outcome)

    @property
    def winner(self) -> str | None:
        """The design that is better: pre-registered, over several corpora and seeds. None without such a verdict."""
        return self.leader if self.confirmatory and not self.scope else None

    @property
    def short(self) -> str:
        """The verdict on the first design, in a few words."""
        if self.identical:
            return "identical"
        if self.outcome == UNDECIDED:
            return "undecided"
        if self.outcome == EQUIVALENT:
            return f"equivalent{self.scope}"
        words = ("better", "worse") if self.winner else ("above", "below")
        return f"{words[self.outcome == WORSE]}{self.scope}"

    @property
    def verdict(self) -> str:
        """The verdict in one sentence."""
        both, place = f"{self.first} and {self.second}", self.scope
        if self.identical:
            return f"{both}: identical scores."
        if self.doubt:
            return f"{both}: undecided, {self.doubt}."
        ends = sorted(-end if self.mean < 0 and self.leader else end for end in self.interval)
        size = f"{abs(self.mean) if self.leader else self.mean:.4f}"
        size += "" if math.isnan(ends[0]) else f" [{ends[0]:.4f}, {ends[1]:.4f}]"
        if self.outcome == EQUIVALENT:
            return f"{both} are equivalent{place}, within ±{self.plan.rope:g}: they differ by {size}."
        if self.leader:
            other = self.second if self.leader == self.first else self.first
            if self.winner:
                return f"{self.leader} is better than {other}, by {size}."
            end = "" if self.confirmatory else ": to be confirmed on other data"
            return f"{self.leader} scores above {other}{place}, by {size}{end}."
        if not self.reachable:
            what = counted_corpora(self.plan.corpora) if self.plan.corpora > 1 else counted(self.plan.tasks, "task")
            return f"{both}: undecided, {what} cannot give a significant result."
        return f"{both}: undecided (difference {size}; found in 80 % of studies: {self.plan.detectable:.4f})."


@dataclass(frozen=True)
class Family:
    """Pairs that Holm's procedure corrects together.

    Args:
        confirmatory: Whether they were pre-registered, or are the only pair.
        plan: Their power, with the median variances of the pairs.
        pairs: The pairs.
    """

    confirmatory: bool
    plan: Plan
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class TypeComparison:
    """The comparison for one task type and base model.

    Args:
        base: Base model of the designs; empty for models from elsewhere.
        task_type: Type of the tasks.
        title: The task type, with the base if there are several.
        runs: Score by task (index corpus, task) and run (columns model, seed); NaN where there is none.
        families: Confirmatory pairs, then exploratory ones, if there are any.
        ranks: Friedman's test over the corpora (or tasks of one) that all designs have; None for two designs or fewer
            than two such units.
    """

    base: str
    task_type: str
    title: str
    runs: pd.DataFrame
    families: tuple[Family, ...]
    ranks: RankTest | None

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of all families."""
        return [pair for family in self.families for pair in family.pairs]

    @property
    def scores(self) -> pd.DataFrame:
        """Score by task (index corpus, task) and design (columns), averaged over seeds."""
        return self.runs.T.groupby(level="model", sort=False).mean().T

    @property
    def means(self) -> pd.DataFrame:
        """Mean score of each design (index) and its deviation between seeds, over the tasks that all designs have.

        It is the mean over corpora of the mean over tasks; ``spread`` is NaN for a single run.
        """
        shared = self.runs.loc[self.scores.dropna().index]
        by_run = shared.groupby(level="corpus").mean().mean().groupby(level="model", sort=False)
        return pd.DataFrame({"mean": by_run.mean(), "spread": by_run.std(ddof=1), "runs": by_run.count()})

    @property
    def corpora(self) -> int:
        """Number of corpora that all designs have scores of."""
        return int(self.scores.dropna().index.get_level_values("corpus").nunique())

    @property
    def size(self) -> str:
        """Number of corpora and tasks, in words."""
        return f"{counted_corpora(self.corpora)}, {counted(len(self.scores.dropna()), 'task')}"

    def multilevel(self, pair: Pair) -> MultilevelFit | None:
        """Fit the multilevel model to the runs of a pair; None for a single corpus, or if statsmodels fails."""
        if pair.plan.corpora < 2 or pair.identical or not {pair.first, pair.second} <= set(self.means.index):
            return None
        seeds = [seed for seed in self.runs[pair.first] if seed in self.runs[pair.second]] if pair.seed_error else []
        scores = [self.runs[name][seeds].loc[pair.differences.index] if seeds else
                  self.scores[[name]].loc[pair.differences.index] for name in (pair.first, pair.second)]  # fmt: skip
        try:
            return fit_multilevel(*(part.set_axis(range(part.shape[1]), axis=1) for part in scores))
        except (ValueError, ArithmeticError, np.linalg.LinAlgError):
            return None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        types: One for each base and task type.
        metric: The score that was compared.
        alpha: Level of significance.
        rope: Half of the region of practical equivalence.
        notes: What a reader must know, in sentences.
        names: What each design (with its option) is called here, by its factors if they are known.
    """

    types: tuple[TypeComparison, ...]
    metric: str
    alpha: float
    rope: float
    notes: tuple[str, ...]
    names: dict[str, str]

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
    rope: float = ROPE,
    allow_mixed_revisions: bool = False,
) -> Comparison:
    """Test every pair of designs within each task type, over corpora, or over the tasks of one corpus.

    Pairs named in `contrasts` are confirmatory: verdicts rest on them. All others are exploratory and corrected
    separately. Of two designs the only pair is confirmatory. Splits and subsets are averaged; diverged runs are left
    out, and a note names them. Tasks without a corpus count as one corpus.

    Args:
        results: What `read_results` returns, or a table with some of its columns.
        contrasts: At most six pre-registered comparisons, ``("A", "B")`` or ``"A:B"``, read as A minus B; ``A+B`` is
            the mean of both.
        metric: The score to compare. A task without a main score that has only one other is compared by that.
        alpha: Level of significance.
        rope: Half of the region of practical equivalence: differences this small do not matter.
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
        STS: b scores above a in this run on this corpus, by 0.0450 [0.0256, 0.0643].
    """
    notes = [] if isinstance(results, pd.DataFrame) else list(results.notes)
    table, names = _with_models(complete(results if isinstance(results, pd.DataFrame) else results.table))
    notes += _diverged(table)
    table = _with_corpora(table[~table["diverged"]])
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
    chosen, means = _resolve(contrasts, models, names)
    types = []
    for (base, task_type), rows in scores.groupby(["base", "task_type"], sort=False):
        own = items[(items["base"] == base) & (items["task_type"] == task_type)]
        title = f"{task_type} ({base})" if scores["base"].nunique() > 1 else str(task_type)
        found = _compare_type((str(base), str(task_type), title), rows, own, chosen, models, means, alpha, rope)
        notes += _gaps(found, rows, models)
        if found.families:
            types.append(found)
    if not types:
        raise DataError(f"no two of {', '.join(models)} were scored on the same task, split and subset.")
    if (scores["corpus"] == "").any() and scores["task"].nunique() > 1:
        notes.append("Tasks whose corpus is not known count as one corpus; a column 'corpus' names it.")
    return Comparison(tuple(types), metric, alpha, rope, tuple(dict.fromkeys(notes)), names)


def _with_models(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Add a column `model`, the name of design, option and step; also return these names by label."""
    key = ["design", "option", "step"]
    factors = ["attention", "readout", "pooling"]
    unique = table[[*key, *factors]].drop_duplicates(key)
    steps = [f" @ step {step}" if step else "" for step in unique["step"]]
    labels = [label(*names) + step for names, step in zip(unique[key[:2]].to_numpy(), steps, strict=True)]
    twice = next((name for place, name in enumerate(labels) if name in labels[:place]), None)
    if twice is not None:
        raise DataError(f"two designs are both called {twice!r} in tables; rename one or its option.")
    names = [name + step for name, step in zip(design_names(unique), steps, strict=True)]
    return table.merge(unique[key].assign(model=names), on=key), dict(zip(labels, names, strict=True))


def _diverged(table: pd.DataFrame) -> list[str]:
    runs = table[table["diverged"]].drop_duplicates(["base", "model", "seed"])
    named = listed((f"{model}, seed {seed}" for model, seed in zip(runs["model"], runs["seed"], strict=True)), most=20)
    return [f"Diverged (validation ended below its start) and left out: {named}."] if len(runs) else []


def _with_corpora(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with one corpus for each task, where some rows do not name it."""
    known = table[table["corpus"] != ""].groupby("task")["corpus"].unique()
    for task, names in known.items():
        if len(names) > 1:
            raise DataError(f"task {task} has several corpora, {listed(names)}; it must have one.")
    corpora = {task: names[0] for task, names in known.items()}
    return table.assign(corpus=[corpora.get(task, "") for task in table["task"]])


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


def _resolve(
    contrasts: Sequence[str | tuple[str, str]], models: Sequence[str], labels: dict[str, str]
) -> tuple[list[tuple[str, str]], dict[str, list[str]]]:
    """Return contrasts as pairs of models or means of models, and the models of each mean.

    A name may be given without its organisation, or be a design's label; ``A+B`` is a mean, and gets a label.
    """
    if len(contrasts) > MAX_CONTRASTS:
        raise ConfigurationError(
            f"{len(contrasts)} contrasts are named; at most {MAX_CONTRASTS} can be confirmatory, the others are "
            f"tested as exploratory without being named."
        )
    short = {model.rpartition("/")[2]: model for model in models}
    names = (short if len(short) == len(models) else {}) | {model: model for model in models}
    names |= {given: model for given, model in labels.items() if model in models}
    means: dict[str, list[str]] = {}
    sides = [contrast.split(":") if isinstance(contrast, str) else contrast for contrast in contrasts]
    for side in dict.fromkeys(name for contrast in sides for name in contrast):
        parts = side.split("+")
        if side not in names and len(parts) > 1 and names.keys() >= set(parts):
            members = [names[part] for part in parts]
            names[side] = labels[side] = _name_of_mean(members)
            means[names[side]] = members
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
                known = f"there are {', '.join(labels)}.{nearest(name, names)}"
                raise ConfigurationError(f"contrast {':'.join(contrast)} names {name!r}; {known}")
        pair = names[contrast[0]], names[contrast[1]]
        if pair[0] == pair[1] or pair in pairs or pair[::-1] in pairs:
            raise ConfigurationError(f"contrast {':'.join(contrast)} names one model twice, or is repeated.")
        pairs.append(pair)
    return pairs, means


def _name_of_mean(models: Sequence[str]) -> str:
    """Return the factors that designs have in common, such as ``causal · plain (mean of 2)``, else all names."""
    words = [model.split(" · ") for model in models]
    common = [word for word in words[0] if all(word in other for other in words)]
    return f"{' · '.join(common)} (mean of {len(models)})" if len(common) > 1 else " + ".join(models)


def _compare_type(
    names: tuple[str, str, str],
    scores: pd.DataFrame,
    items: pd.DataFrame,
    contrasts: Sequence[tuple[str, str]],
    models: Sequence[str],
    means: Mapping[str, Sequence[str]],
    alpha: float,
    rope: float,
) -> TypeComparison:
    runs = scores.groupby([*_CELL, "model", "seed"])["score"].mean().unstack(["model", "seed"])
    present = [model for model in models if model in runs]
    runs = runs[present]
    if not runs.index.droplevel(_CELL[2:]).has_duplicates:
        runs = runs.droplevel(_CELL[2:])
    frames = {model: runs[model] for model in present}
    doubts = {
        model: f"{model} has one and the same score, {score:g}, on all of its tasks"
        for model, score in constant_scores(runs.T.groupby("model").mean().T.groupby("task").mean()).items()
    }
    for name, members in means.items():
        if frames.keys() >= set(members):
            seeds = [seed for seed in frames[members[0]] if all(seed in frames[member] for member in members)]
            frames[name] = sum(frames[member][seeds] for member in members) / len(members)
    named = [pair for pair in contrasts if set(pair) <= frames.keys()]
    others = [pair for pair in combinations(present, 2) if pair not in named and pair[::-1] not in named]
    if not contrasts and len(models) == 2:
        named, others = others, []
    families = []
    for confirmatory, pairs in ((True, named), (False, others)):
        found = {pair: _differences(*(frames[model] for model in pair)) for pair in pairs}
        found = {pair: part for pair, part in found.items() if len(part[0])}
        if found:
            doubtful = {pair: "; ".join(doubts[name] for name in pair if name in doubts) for pair in found}
            families.append(_family(found, frames, items, doubtful, means, confirmatory, alpha, rope))
    by_task = runs if runs.index.nlevels == len(_TASK) else runs.groupby(level=_TASK).mean()
    kind = TypeComparison(*names, by_task, tuple(families), None)
    shared = kind.scores.dropna()
    units = shared if shared.index.get_level_values("corpus").nunique() < 2 else shared.groupby(level="corpus").mean()
    return replace(kind, ranks=rank_test(units) if len(present) > 2 and len(units) > 1 else None)


def _by_task(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of each task over its splits and subsets that have all scores."""
    whole = cells.dropna()
    return whole if whole.index.nlevels == len(_TASK) else whole.groupby(level=_TASK).mean()


def _differences(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, tuple[float, float] | None]:
    """Return the differences by task and common seed, and what seeds add to the variance of their mean."""
    seeds = [seed for seed in first if seed in second]
    paired = _by_task(first[seeds] - second[seeds])
    if len(seeds) > 1 and len(paired):
        means = _units(paired).mean(axis=0)
        return paired, (float(means.var(ddof=1) / len(means)), len(means) - 1)
    averages = _by_task((first.mean(axis=1) - second.mean(axis=1)).to_frame(""))
    parts = []
    for own in (_by_task(first), _by_task(second)):  # designs without common seeds: Welch
        means = _units(own).mean(axis=0) if len(own) else np.array([])
        if len(means) > 1:
            parts.append((float(means.var(ddof=1) / len(means)), len(means) - 1))
    if len(parts) < 2:
        return averages, None
    total, spread = sum(part for part, _ in parts), sum(part**2 / dof for part, dof in parts)
    return averages, (total, total**2 / spread if spread else 1.0)


def _units(differences: pd.DataFrame) -> Array:
    """Return the values (U, S) of the corpora, or of the tasks of a single corpus."""
    corpora = differences.index.get_level_values("corpus")
    if corpora.is_unique or corpora.nunique() == 1:
        return differences.to_numpy()
    return differences.groupby(level="corpus", sort=False).mean().to_numpy()


def _family(
    found: Mapping[tuple[str, str], tuple[pd.DataFrame, tuple[float, float] | None]],
    frames: Mapping[str, pd.DataFrame],
    items: pd.DataFrame,
    doubts: Mapping[tuple[str, str], str],
    means: Mapping[str, Sequence[str]],
    confirmatory: bool,
    alpha: float,
    rope: float,
) -> Family:
    """Test the pairs of a family and decide on all of them together."""
    designs = len({member for pair in found for name in pair for member in means.get(name, [name])})
    pooled = pooled_seed_error([(part.shape[1], error[0]) for part, error in found.values() if error], designs)
    tests, plans, posteriors, errors = [], [], [], []
    for differences, own in found.values():
        units, seeds = _units(differences), differences.shape[1]
        corpora = differences.index.get_level_values("corpus").nunique()
        error = (max(own[0], pooled[0] / seeds), pooled[1]) if own and seeds > 1 else own
        tests.append(difference_test(units, corpora=corpora, rope=rope, seed_error=error))
        pilot = Pilot.of(units)
        if error and seeds == 1:
            pilot = replace(pilot, seeds=round(math.sqrt(error[0]), 4))
        plans.append(Plan(corpora, len(differences), len(found), seeds, designs, alpha, rope, pilot))
        posteriors.append(signed_rank_posterior(units.mean(axis=1), rope))
        errors.append(error)
    together = DifferenceTest(*(np.array(field) for field in zip(*tests, strict=True)))
    outcomes = decide(together, alpha=alpha, in_rope=[within for _, within, _ in posteriors])
    columns = (errors, tests, holm(together.p), holm(together.p_equivalent), posteriors, outcomes, plans)
    pairs = []
    for (pair, (differences, _)), seed_error, test, p, p_equivalent, posterior, outcome, plan in zip(
        found.items(), *columns, strict=True
    ):
        identical = _identical(frames[pair[0]], frames[pair[1]])
        of_items = _over_items(items, *pair)
        pairs.append(
            Pair(
                first=pair[0],
                second=pair[1],
                confirmatory=confirmatory,
                differences=differences,
                seed_error=seed_error,
                test=test,
                p_holm=float(p),
                p_equivalent=float(p_equivalent),
                posterior=posterior,
                outcome=UNDECIDED if doubts[pair] or identical else int(outcome),
                plan=plan,
                items=of_items and of_items[0],
                items_metric=of_items[1] if of_items else "",
                identical=identical,
                doubt=doubts[pair],
            )
        )
    largest = max(plans, key=lambda plan: (plan.units, plan.seeds))
    spreads = np.median([[p.pilot.units, p.pilot.seeds, p.pilot.rest] for p in plans], axis=0).round(4)
    return Family(confirmatory, replace(largest, pilot=Pilot(*map(float, spreads))), tuple(pairs))


def _identical(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    """Return whether two models have equal scores in the same cells, as one model under two names has."""
    return (
        first.shape == second.shape
        and first.columns.equals(second.columns)
        and bool(np.allclose(first, second, rtol=0, atol=10.0**-DECIMALS / 2, equal_nan=True))
    )


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
    table = found.scores.droplevel("corpus")
    absent = [model for model in models if model not in table]
    notes = [f"no score of {', '.join(absent)}"] if absent else []
    for model in table:
        lacking = list(table.index[table[model].isna()])
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
    single = found.runs.columns.get_level_values("model").value_counts().max() == 1
    unknown = ["One run per model: seed noise is unknown, and no p-value covers it."] if single else []
    return [*(f"{found.title}: {note}." for note in notes), *(f"{found.title}: {line}" for line in verdicts), *unknown]
