"""A comparison as tables for the screen, for a document, and as plain values for a program."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..utils.files import slug
from ..utils.words import counted, markdown
from .comparison import Comparison, Family, Pair, TypeComparison
from .plots import draw, require_libraries
from .results import MAIN_SCORE
from .statistics import ItemTest, PairedTest

INDEPENDENCE = (
    "The tests treat tasks as independent. Slices of one corpus are not: then p-values are too small, and the results "
    "hold for these data only."
)
_LEGEND = (
    "Difference: first minus second, mean over tasks, with its 95 % bootstrap interval (none below 6 tasks). "
    "W, p: exact two-sided Wilcoxon signed-rank test, tasks without a difference dropped. "
    "Effect: matched-pairs rank-biserial correlation, from -1 to 1. "
    "p Holm: corrected for the tests of the same table; * at or below {alpha}."
)
_ITEM_LEGEND = (
    "Every task has equal weight. Tasks like these: 95 % interval from standard errors clustered by task. These tasks "
    "only: interval for other items of the same tasks, its p not corrected; no verdict rests on it."
)


@dataclass(frozen=True)
class Sheet:
    """One table as text, with the sentences below it.

    Args:
        title: Title.
        columns: Headings.
        rows: Cells.
        below: Sentences.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    below: tuple[str, ...] = ()

    def to_markdown(self, heading: str = "## {}") -> str:
        """Returns the table with its title and the sentences below it; columns of numbers are aligned at the right.

        Args:
            heading: Form of the title.

        Example:
            >>> print(Sheet("Scores", ("Model", "STS"), (("a", "0.5"),), ("One task.",)).to_markdown())
            ## Scores
            <BLANKLINE>
            | Model | STS |
            | --- | ---: |
            | a | 0.5 |
            <BLANKLINE>
            - One task.
            <BLANKLINE>
        """
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        rules = ("---:" if place and all(map(_is_number, cells)) else "---" for place, cells in enumerate(columns))
        rows = [tuple(map(markdown, self.columns)), tuple(rules), *(tuple(map(markdown, row)) for row in self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        below = [*(f"- {markdown(line, start=True)}" for line in self.below), *([""] if self.below else [])]
        return "\n".join([heading.format(markdown(self.title)), "", *lines, "", *below])


def sheets(comparison: Comparison) -> list[Sheet]:
    """Returns the tables of a comparison: mean scores first, then the pairs of each task type."""
    return [_means(comparison), *(sheet for kind in comparison.types for sheet in sheets_of_type(kind))]


def sheets_of_type(kind: TypeComparison) -> list[Sheet]:
    """Returns the tables of one task type: the pre-registered comparisons, then all others."""
    found = []
    for family in kind.families:
        pairs, *items = sheets_of_family(kind, family)
        about = about_type(kind) if family is kind.families[-1] else ()
        found += [replace(pairs, below=(*pairs.below, *about)), *items]
    return found


def sheets_of_family(kind: TypeComparison, family: Family) -> list[Sheet]:
    """Returns the tests of some pairs over tasks, then over items where there are scores of these."""
    items = [_items(kind, family)] if any(pair.items for pair in family.pairs) else []
    return [_pairs(kind, family), *items]


def to_rich(comparison: Comparison) -> Group:
    """Returns everything for `rich.print`.

    Example:
        >>> rich.print(to_rich(compare(read_results(["results.parquet"]))))  # doctest: +SKIP
    """
    parts: list[Any] = []
    for sheet in sheets(comparison):
        table = Table(title=Text(sheet.title, "bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column(sheet.columns[0], overflow="fold")
        for column in sheet.columns[1:]:
            table.add_column(column, justify="right", no_wrap=True)
        for row in sheet.rows:
            table.add_row(*map(Text, row))
        parts += [table, *(Padding(Text(line), (0, 0, 0, 2)) for line in sheet.below), ""]
    parts += [Text(line, "dim") for line in footnotes(comparison)]
    return Group(*parts)


def to_markdown(comparison: Comparison) -> str:
    """Returns everything as Markdown."""
    return "\n".join([*(sheet.to_markdown() for sheet in sheets(comparison)), *footnotes(comparison)]) + "\n"


def to_json(comparison: Comparison) -> str:
    """Returns every statistic as JSON; what is not defined or infinite is null."""
    types = []
    for kind in comparison.types:
        content: dict[str, Any] = {"base": kind.base, "task_type": kind.task_type}
        content["scores"] = {str(model): column.to_dict() for model, column in kind.scores.items()}
        content["families"] = [
            {
                "confirmatory": family.confirmatory,
                "tasks": family.plan.tasks,
                "tests": family.plan.tests,
                "smallest_p_holm": family.plan.smallest_p,
                "reachable": family.plan.reachable,
                "detectable_effect": family.plan.effect,
                "pairs": [record(pair) for pair in family.pairs],
            }
            for family in kind.families
        ]
        ranks, seeds = kind.ranks, kind.seeds
        content["ranks"] = ranks and vars(ranks) | {
            "p_nemenyi": ranks.p_nemenyi.to_dict(),
            "reachable": ranks.reachable,
        }
        content["seeds"] = seeds and dict(vars(seeds))
        types.append(content)
    everything = {"metric": comparison.metric, "alpha": comparison.alpha, "types": types}
    return json.dumps(_plain(everything | {"notes": [*comparison.notes, INDEPENDENCE]}), indent=2, allow_nan=False)


def to_frame(comparison: Comparison) -> pd.DataFrame:
    """Returns one row for each pair with every statistic of it.

    Example:
        >>> from st_llmpool.stats import compare
        >>> scores = {"a": 0.5, "b": 0.6}
        >>> rows = [("T", "STS", name, score) for name, score in scores.items()]
        >>> table = pd.DataFrame(rows, columns=["task", "task_type", "design", "score"]).assign(
        ...     base="", option="", seed="0", split="test", subset="default", metric="main_score")
        >>> to_frame(compare(table))[["first", "second", "n", "mean_difference", "reachable"]]
          first second  n  mean_difference  reachable
        0     a      b  1             -0.1      False
    """
    return pd.DataFrame(
        [
            {"base": kind.base, "task_type": kind.task_type, **_flat(record(pair))}
            for kind in comparison.types
            for pair in kind.pairs
        ]
    )


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes the tables and the pictures, and returns the files.

    `comparison.md` is what the screen shows, `pairs.csv` every statistic, `scores.csv` the scores that were compared,
    seed-averaged, and for each task type there is a heatmap of its pairs and, of three models or more, a
    critical-difference diagram.

    Raises:
        ModuleNotFoundError: If the libraries that draw are not installed.

    Example:
        >>> write(compare(read_results(["results.parquet"])), Path("out"))  # doctest: +SKIP
    """
    require_libraries()
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "comparison.md", folder / "pairs.csv", folder / "scores.csv"]
    written[0].write_text(to_markdown(comparison), encoding="utf-8")
    to_frame(comparison).to_csv(written[1], index=False)
    scores = [
        kind.scores.reset_index()
        .melt("task", var_name="model", value_name="score")
        .dropna()
        .assign(base=kind.base, task_type=kind.task_type)
        for kind in comparison.types
    ]
    pd.concat(scores)[["base", "task_type", "task", "model", "score"]].to_csv(written[2], index=False)
    for kind in comparison.types:
        written += draw(kind, folder, slug(kind.title))
    return written


def record(pair: Pair) -> dict[str, Any]:
    """Returns every statistic of a pair."""
    test = pair.test
    return {
        "first": pair.first,
        "second": pair.second,
        "confirmatory": pair.confirmatory,
        "n": test.n,
        "zeros": test.zeros,
        "mean_difference": test.mean_difference,
        "interval_low": test.low,
        "interval_high": test.high,
        "statistic": test.statistic,
        "w_plus": test.w_plus,
        "w_minus": test.w_minus,
        "p": test.p,
        "p_holm": pair.p_holm,
        "effect_size": test.effect_size,
        "reachable": pair.reachable,
        "significant": pair.significant,
        "detectable_difference": pair.detectable,
        "seed_difference": pair.seed_difference,
        "within_seed_noise": pair.within_seed_noise,
        "items": None
        if pair.items is None
        else {"metric": pair.items_metric, **vars(pair.items), "p_holm": pair.items_p_holm},
        "verdict": pair.verdict,
    }


def _means(comparison: Comparison) -> Sheet:
    """Mean scores of all models; each type over the tasks that all models there were scored on."""
    models = list(dict.fromkeys(str(model) for kind in comparison.types for model in kind.scores))
    complete = {kind.title: kind.scores.dropna() for kind in comparison.types}
    rows = tuple(
        (
            model,
            *(f"{table[model].mean():.4f}" if len(table) and model in table else "-" for table in complete.values()),
        )
        for model in models
    )
    columns = (f"{title}, {counted(len(table), 'task')}" for title, table in complete.items())
    what = "Mean score" if comparison.metric == MAIN_SCORE else f"Mean {comparison.metric}"
    return Sheet(f"{what} over the tasks that all have", ("Model", *columns), rows)


def _pairs(kind: TypeComparison, family: Family) -> Sheet:
    columns: list[tuple[str, Callable[[Pair], str]]] = [
        ("First\n- second", _names),
        ("Tasks", lambda pair: str(pair.test.n)),
        ("Difference\n95 % interval", lambda pair: _difference(pair.test)),
        ("W", lambda pair: f"{pair.test.statistic:g}"),
        ("p", lambda pair: p_text(pair.test.p)),
        ("p Holm", lambda pair: p_text(pair.p_holm) + ("*" if pair.significant else "")),
        ("Effect", lambda pair: f"{pair.test.effect_size:+.2f}"),
    ]
    named = "pre-registered" if family.confirmatory and len(kind.scores.columns) > 2 else "the only pair"
    what = named if family.confirmatory else "exploratory"
    if not family.plan.reachable:
        what += " (cannot reach significance: no marks)"
    verdicts = [pair.verdict for pair in family.pairs if family.confirmatory or pair.significant]
    if not family.plan.reachable:
        verdicts = ["No verdict: more tasks are needed."]
    elif not verdicts:
        verdicts = ["No exploratory pair is significant."]
    return Sheet(
        f"{kind.title}: {what}",
        tuple(name for name, _ in columns),
        tuple(tuple(cell(pair) for _, cell in columns) for pair in family.pairs),
        (f"Power: {family.plan}", *verdicts),
    )


def _items(kind: TypeComparison, family: Family) -> Sheet:
    columns: list[tuple[str, Callable[[Pair, ItemTest], str]]] = [
        ("First\n- second", lambda pair, test: _names(pair)),
        ("Items", lambda pair, test: f"{test.items:,}"),
        ("Difference", lambda pair, test: f"{test.mean_difference:+.4f}"),
        (
            "Tasks like these\np Holm",
            lambda pair, test: f"{_interval(test.low, test.high)}\n{p_text(pair.items_p_holm)}",
        ),
        (
            "These tasks only\np",
            lambda pair, test: f"{_interval(test.low_here, test.high_here)}\n{p_text(test.p_here)}",
        ),
    ]
    tested = [(pair, pair.items) for pair in family.pairs if pair.items is not None]
    metrics = ", ".join(dict.fromkeys(pair.items_metric for pair, _ in tested))
    what = "" if family.confirmatory else ", exploratory"
    return Sheet(
        f"{kind.title}: over items ({metrics}){what}",
        tuple(name for name, _ in columns),
        tuple(tuple(cell(pair, test) for _, cell in columns) for pair, test in tested),
        (_ITEM_LEGEND,),
    )


def about_type(kind: TypeComparison) -> tuple[str, ...]:
    """Returns what ranks and seeds say, in sentences."""
    lines = []
    if kind.ranks is not None:
        ranks = kind.ranks
        order = ", ".join(f"{model} ({rank:.2f})" for model, rank in ranks.mean_ranks.items())
        lines.append(
            f"Friedman over {len(ranks.mean_ranks)} models and {counted(ranks.tasks, 'task')}: "
            f"chi² {ranks.chi_square:.2f}, F {ranks.f:.2f}, p {p_text(ranks.p)}. Mean ranks: {order}; "
            f"critical difference {ranks.critical_difference:.2f}"
            + ("." if ranks.reachable else ", which these tasks cannot reach.")
        )
    if kind.seeds is not None:
        seeds = kind.seeds
        lines.append(
            f"Seeds: standard deviation {seeds.sd_seeds:.4f} between runs of one design, {seeds.sd_designs:.4f} "
            f"between designs ({counted(sum(seeds.runs.values()), 'run')})."
        )
    return tuple(lines)


def footnotes(comparison: Comparison) -> Iterator[str]:
    """Yields how the tables of a comparison are to be read, and what a reader must know."""
    yield _LEGEND.format(alpha=comparison.alpha)
    yield INDEPENDENCE
    if not any(pair.confirmatory for kind in comparison.types for pair in kind.pairs):
        yield "No comparison was pre-registered, so every pair is exploratory. Name up to six: --contrast A:B."
    yield from comparison.notes


def _is_number(cell: str) -> bool:
    """Returns whether a cell holds a number, perhaps with an interval, a mark or a unit."""
    return re.match(r"[-+<\[]*\d|-?$", cell) is not None and re.search(r"[^\W\d_]{3,}", cell) is None


def _names(pair: Pair) -> str:
    return f"{pair.first}\n- {pair.second}"


def _difference(test: PairedTest) -> str:
    return f"{test.mean_difference:+.4f}\n{_interval(test.low, test.high)}"


def _interval(low: float, high: float) -> str:
    return "-" if math.isnan(low) else f"[{low:+.3f}, {high:+.3f}]"


def p_text(value: float) -> str:
    """Returns a p-value as tables show it."""
    if math.isnan(value):
        return "-"
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    items = content.pop("items") or {}
    return content | {f"items_{name}": value for name, value in items.items()}


def _plain(value: Any) -> Any:
    """Returns a value that JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
