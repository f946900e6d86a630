"""A comparison as tables for the screen and for documents, and as plain values for programs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..utils.files import reraise_as_write_error, slug, write_atomically
from ..utils.words import markdown
from .comparison import Comparison, Family, Pair, TypeComparison
from .plots import draw, require_libraries
from .results import MAIN_SCORE
from .statistics import RANKED_CORPORA

_LEGEND = (
    "Mean score: over the tasks that all have, ± standard deviation between seeds. "
    "Difference: first minus second, mean over corpora of the mean over their tasks, with its 95 % interval from "
    "resampling corpora, then tasks (none below six corpora, or tasks of one corpus). "
    "p: exact two-sided test over units, {unit}; in brackets with the paired differences of seeds, from which the "
    "difference must stand out too. p Holm: corrected for the pairs of the same table; * at or below {alpha:g}. "
    "Equivalent: p of two one-sided tests (within ±{rope:g}) after Holm, and the Bayesian signed-rank probabilities of "
    "second better, equivalent and first better. Equivalent needs both, at {alpha:g} and {level:g}; no difference "
    "seen is not equivalence."
)
ONE_CORPUS = (
    "All tasks of a type are of one corpus, so the results hold for this corpus: of others, where designs may rank "
    "differently, they say nothing."
)
_UNITS = {True: "signed ranks of corpora", False: "sign flips of corpora"}
_ITEM_LEGEND = (
    "Items of these tasks: every task has equal weight; the interval is for other items of the same tasks, its p is "
    "not corrected, and no verdict rests on it."
)
_MODEL_LEGEND = (
    "Multilevel model score ~ design + (1|corpus/task) + (design|corpus) + (1|seed), by restricted maximum likelihood; "
    "no verdict rests on it. It knows no variance of designs between seeds."
)


@dataclass(frozen=True)
class Sheet:
    """A table of text, with sentences below it.

    Args:
        title: Title.
        rows: Column to cell, one mapping per row; a cell that is missing in some rows is shown as "-".
        below: Sentences.
    """

    title: str
    rows: tuple[Mapping[str, str], ...]
    below: tuple[str, ...] = ()

    @classmethod
    def of(cls, title: str, rows: Iterable[Mapping[str, str]], *below: str) -> Sheet:
        """Return a table from any rows."""
        return cls(title, tuple(rows), below)

    @property
    def cells(self) -> pd.DataFrame:
        """The table as a frame."""
        return pd.DataFrame(list(self.rows)).fillna("-")

    def to_markdown(self, heading: str = "## {}") -> str:
        """Return the table with its title and the sentences below it; columns of numbers are right-aligned.

        Args:
            heading: Format of the title.

        Example:
            >>> print(Sheet.of("Scores", [{"Model": "a", "STS": "0.5"}], "One task.").to_markdown())
            ## Scores
            <BLANKLINE>
            | Model | STS |
            | --- | ---: |
            | a | 0.5 |
            <BLANKLINE>
            - One task.
            <BLANKLINE>
        """
        cells = self.cells
        rules = ["---:" if place and all(map(_is_number, cells[name])) else "---" for place, name in enumerate(cells)]
        rows = [map(markdown, cells), rules, *(map(markdown, row) for row in cells.to_numpy())]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        below = [*(f"- {markdown(line, start=True)}" for line in self.below), *([""] if self.below else [])]
        return "\n".join([heading.format(markdown(self.title)), "", *lines, "", *below])


def sheets(comparison: Comparison) -> list[Sheet]:
    """Return the tables of a comparison: mean scores, then the pairs of each task type."""
    found = [_means(comparison)]
    for kind in comparison.types:
        for family in kind.families:
            pairs, *items = sheets_of_family(kind, family)
            about = about_type(kind) if family is kind.families[-1] else ()
            found += [Sheet(pairs.title, pairs.rows, (*pairs.below, *about)), *items]
    return found


def to_rich(comparison: Comparison) -> Group:
    """Return everything for `rich.print`.

    Example:
        >>> rich.print(to_rich(compare(read_results(["results.parquet"]))))  # doctest: +SKIP
    """
    parts: list[Any] = []
    shown = sheets(comparison)
    if all(len(kind.scores) == 1 for kind in comparison.types):
        words = "One task cannot decide between models: evaluate them on more (evaluate --suite or --benchmark)."
        shown = [Sheet(shown[0].title, shown[0].rows, (words,))]
    for sheet in shown:
        table = Table(title=Text(sheet.title, "bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(sheet.cells):
            table.add_column(column, justify="right" if place else "left", no_wrap=place > 0, overflow="fold")
        for row in sheet.cells.to_numpy():
            table.add_row(*map(Text, row))
        parts += [table, *(Padding(Text(line), (0, 0, 0, 2)) for line in sheet.below), ""]
    notes = footnotes(comparison) if len(shown) > 1 else ()
    return Group(*parts, *(Text(line, "dim") for line in notes))


def to_markdown(comparison: Comparison) -> str:
    """Return everything as Markdown."""
    return "\n".join([*(sheet.to_markdown() for sheet in sheets(comparison)), *footnotes(comparison)]) + "\n"


def to_json(comparison: Comparison) -> str:
    """Return every statistic as JSON; what is undefined or infinite is null."""
    types = [
        {
            "base": kind.base,
            "task_type": kind.task_type,
            "corpora": {task: corpus for corpus, task in kind.scores.index},
            "scores": {str(model): column.droplevel("corpus").to_dict() for model, column in kind.scores.items()},
            "means": kind.means.to_dict("index"),
            "families": [
                {
                    "confirmatory": family.confirmatory,
                    **{name: getattr(family.plan, name) for name in ("corpora", "tasks", "seeds", "tests")},
                    "smallest_p_holm": family.plan.smallest_p,
                    "reachable": family.plan.reachable,
                    "pilot": vars(family.plan.pilot),
                    "pairs": [record(pair) for pair in family.pairs],
                }
                for family in kind.families
            ],
            "ranks": kind.ranks and vars(kind.ranks),
        }
        for kind in comparison.types
    ]
    everything = {"metric": comparison.metric, "alpha": comparison.alpha, "rope": comparison.rope, "types": types}
    return json.dumps(_plain(everything | {"notes": list(comparison.notes)}), indent=2, allow_nan=False)


def to_frame(comparison: Comparison) -> pd.DataFrame:
    """Return one row per pair, with every statistic.

    Example:
        >>> from st_llmpool.stats import compare
        >>> rows = [("T", "STS", "a", 0.5), ("T", "STS", "b", 0.6)]
        >>> table = pd.DataFrame(rows, columns=["task", "task_type", "design", "score"])
        >>> to_frame(compare(table))[["first", "second", "tasks", "mean_difference", "verdict"]]
          first second  tasks  mean_difference    verdict
        0     a      b      1             -0.1  undecided
    """
    rows = []
    for kind in comparison.types:
        for pair in kind.pairs:
            content = record(pair)
            items = content.pop("items") or {}
            rows.append({"base": kind.base, "task_type": kind.task_type, **content})
            rows[-1] |= {f"items_{name}": value for name, value in items.items()}
    return pd.DataFrame(rows)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the tables and figures, and return the files.

    `comparison.md` is what the screen shows, `pairs.csv` has every statistic and `scores.csv` the seed-averaged scores.
    Each task type has a heat map of its pairs and, for three models or more, a diagram of mean ranks.

    Raises:
        MissingExtraError: If the libraries that draw are not installed.

    Example:
        >>> write(compare(read_results(["results.parquet"])), Path("out"))  # doctest: +SKIP
    """
    require_libraries()
    with reraise_as_write_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "comparison.md", folder / "pairs.csv", folder / "scores.csv"]
    write_atomically(written[0], to_markdown(comparison))
    write_atomically(written[1], to_frame(comparison).to_csv(index=False))
    scores = [
        kind.scores.reset_index()
        .melt(["corpus", "task"], var_name="model", value_name="score")
        .dropna()
        .assign(base=kind.base, task_type=kind.task_type)
        for kind in comparison.types
    ]
    columns = ["base", "task_type", "corpus", "task", "model", "score"]
    write_atomically(written[2], pd.concat(scores)[columns].to_csv(index=False))
    for kind in comparison.types:
        written += draw(kind, folder, slug(kind.title))
    return written


def record(pair: Pair) -> dict[str, Any]:
    """Return every statistic of a pair."""
    test = pair.test
    return {
        "first": pair.first,
        "second": pair.second,
        "confirmatory": pair.confirmatory,
        "corpora": pair.plan.corpora,
        "tasks": pair.plan.tasks,
        "seeds": pair.plan.seeds,
        "mean_difference": pair.mean,
        "interval_low": pair.interval[0],
        "interval_high": pair.interval[1],
        "p_units": float(test.p_units),
        "p": float(test.p),
        "p_holm": pair.p_holm,
        "p_equivalent": float(test.p_equivalent),
        "p_equivalent_holm": pair.p_equivalent,
        **dict(zip(("second_better", "equivalent", "first_better"), pair.posterior, strict=True)),
        "effect_size": pair.effect_size,
        "standard_error": float(test.error),
        "reachable": pair.reachable,
        "significant": pair.significant,
        "identical": pair.identical,
        "items": pair.items and {"metric": pair.items_metric, **vars(pair.items)},
        "verdict": pair.short,
    }


def _means(comparison: Comparison) -> Sheet:
    """Return mean scores of all models; each type over the tasks that all of its models have."""
    means = {f"{kind.title}\n{kind.size}".replace(", ", ",\n"): kind.means for kind in comparison.types}
    models = dict.fromkeys(str(model) for kind in comparison.types for model in kind.means.index)
    rows = ({"Model": model} | {name: mean_text(mean, model) for name, mean in means.items()} for model in models)
    what = "Mean score" if comparison.metric == MAIN_SCORE else f"Mean {comparison.metric}"
    return Sheet.of(what, rows)


def mean_text(means: pd.DataFrame, model: str) -> str:
    """Return the mean of a model with its spread between seeds; "-" if there is none."""
    if model not in means.index:
        return "-"
    mean, spread = means.loc[model, ["mean", "spread"]]
    return number(mean) + ("" if math.isnan(spread) else f"\n± {spread:.4f}")


def sheets_of_family(kind: TypeComparison, family: Family) -> list[Sheet]:
    """Return the tests of a family, then the multilevel model and the tests over items if there are any."""
    rows = [
        {
            "First\n- second": f"{pair.first}\n- {pair.second}",
            "Difference\n95 % interval": f"{pair.mean:+.4f}\n{_interval(*pair.interval)}",
            "p\n(with seeds)": p_text(pair.test.p_units) + (f"\n({p_text(pair.test.p)})" if pair.seed_error else ""),
            "p Holm": p_text(pair.p_holm) + ("*" if pair.significant else ""),
            "Equivalent\n< = >": f"{p_text(pair.p_equivalent)}\n{' '.join(f'{part:.2f}' for part in pair.posterior)}",
            "Verdict": pair.short,
        }
        for pair in family.pairs
    ]
    what = "exploratory"
    if family.confirmatory:
        what = "pre-registered" if len(kind.means) > 2 else "the only pair"
    shown = [pair.verdict for pair in family.pairs if family.confirmatory or (pair.leader and len(family.pairs) < 16)]
    plan = family.plan
    power = str(plan) if family.confirmatory or not plan.reachable else f"smallest corrected p {plan.smallest_p:.3g}."
    found = [Sheet.of(f"{kind.title}: {what}, {kind.size}", rows, f"Power: {power}", *shown)]
    if family.confirmatory:
        fits = [(pair, fit) for pair in family.pairs if (fit := kind.multilevel(pair))]
        rows = [
            {
                "First\n- second": f"{pair.first}\n- {pair.second}",
                "Difference": f"{fit.difference:+.4f}",
                "Standard error": number(fit.error),
                "p": number(fit.p) if fit.converged else "did not converge",
            }
            for pair, fit in fits
        ]
        found += [Sheet.of(f"{kind.title}: multilevel model", rows, _MODEL_LEGEND)] if rows else []
    tested = [(pair, pair.items) for pair in family.pairs if pair.items is not None]
    if tested:
        rows = [
            {
                "First\n- second": f"{pair.first}\n- {pair.second}",
                "Items": f"{test.items:,}",
                "Difference\n95 % interval": f"{test.mean_difference:+.4f}\n{_interval(test.low, test.high)}",
                "p": p_text(test.p),
            }
            for pair, test in tested
        ]
        metrics = ", ".join(dict.fromkeys(pair.items_metric for pair, _ in tested))
        what = "" if family.confirmatory else ", exploratory"
        found.append(Sheet.of(f"{kind.title}: items of these tasks ({metrics}){what}", rows, _ITEM_LEGEND))
    return found


def about_type(kind: TypeComparison) -> tuple[str, ...]:
    """Return what the ranks say, in a sentence."""
    if kind.ranks is None:
        return ()
    ranks = kind.ranks
    order = ", ".join(f"{model} ({rank:.2f})" for model, rank in ranks.mean_ranks.items())
    return (
        f"Friedman over {len(ranks.mean_ranks)} models on {kind.size}: chi² {ranks.chi_square:.2f}, F {ranks.f:.2f}, "
        f"p {p_text(ranks.p)}. Mean ranks: {order}.",
    )


def footnotes(comparison: Comparison) -> Iterator[str]:
    """Yield how to read the tables, and the notes."""
    plans = [family.plan for kind in comparison.types for family in kind.families]
    units = {_UNITS[plan.corpora >= RANKED_CORPORA] if plan.corpora > 1 else "signed ranks of tasks" for plan in plans}
    alpha, rope = comparison.alpha, comparison.rope
    yield _LEGEND.format(unit=" or ".join(sorted(units)), alpha=alpha, rope=rope, level=1 - alpha)
    if any(plan.corpora == 1 for plan in plans):
        yield ONE_CORPUS
    if not any(family.confirmatory for kind in comparison.types for family in kind.families):
        yield "No comparison was pre-registered, so every pair is exploratory. Name up to six: --contrast A:B."
    yield from comparison.notes


def number(value: float | None, form: str = ".4f") -> str:
    """Return a number as tables show it; "-" if there is none.

    Example:
        >>> number(0.5), number(None), number(float("nan"))
        ('0.5000', '-', '-')
    """
    return "-" if value is None or math.isnan(value) else format(value, form)


def p_text(value: Any) -> str:
    """Return a p-value as tables show it."""
    return "<0.0001" if float(value) < 0.0001 else number(float(value))


def _is_number(cell: str) -> bool:
    """Return whether a cell holds a number, perhaps with an interval, a mark or a unit."""
    return re.match(r"[-+<\[]*\d|-?$", cell) is not None and re.search(r"[^\W\d_]{3,}", cell) is None


def _interval(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"[{low:+.4f}, {high:+.4f}]"


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
