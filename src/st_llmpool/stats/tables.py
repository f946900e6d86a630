"""A comparison as tables for the screen and for documents, and as plain values for programs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..utils.files import reraise_as_write_error, slug, write_atomically
from ..utils.words import counted, markdown
from .comparison import Comparison, Family, Pair, TypeComparison
from .plots import draw, require_libraries
from .results import MAIN_SCORE

INDEPENDENCE = (
    "The tests treat tasks as independent. Slices of one corpus are not: p-values are then too small, and the results "
    "hold for these data only."
)
_LEGEND = (
    "Difference: first minus second, mean over tasks, with its 95 % bootstrap interval (none below 6 tasks). "
    "W, p: exact two-sided Wilcoxon signed-rank test, tasks without a difference dropped. "
    "Effect: matched-pairs rank-biserial correlation, from -1 to 1. "
    "p Holm: corrected for the tests of the same table; * at or below {alpha}."
)
_INTERVAL = "95 % interval, p"
_ITEM_LEGEND = (
    "Every task has equal weight. Tasks like these: 95 % interval from standard errors clustered by task. These tasks "
    "only: interval for other items of the same tasks, its p not corrected; no verdict rests on it."
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
            "scores": {str(model): column.to_dict() for model, column in kind.scores.items()},
            "families": [
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
            ],
            "ranks": kind.ranks and vars(kind.ranks),
            "seeds": kind.seeds and vars(kind.seeds),
        }
        for kind in comparison.types
    ]
    everything = {"metric": comparison.metric, "alpha": comparison.alpha, "types": types}
    return json.dumps(_plain(everything | {"notes": [*comparison.notes, INDEPENDENCE]}), indent=2, allow_nan=False)


def to_frame(comparison: Comparison) -> pd.DataFrame:
    """Return one row per pair, with every statistic.

    Example:
        >>> from st_llmpool.stats import compare
        >>> rows = [("T", "STS", "a", 0.5), ("T", "STS", "b", 0.6)]
        >>> table = pd.DataFrame(rows, columns=["task", "task_type", "design", "score"])
        >>> to_frame(compare(table))[["first", "second", "n", "mean_difference", "reachable"]]
          first second  n  mean_difference  reachable
        0     a      b  1             -0.1      False
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
        kind.scores.rename_axis("task")
        .reset_index()
        .melt("task", var_name="model", value_name="score")
        .dropna()
        .assign(base=kind.base, task_type=kind.task_type)
        for kind in comparison.types
    ]
    columns = ["base", "task_type", "task", "model", "score"]
    write_atomically(written[2], pd.concat(scores)[columns].to_csv(index=False))
    for kind in comparison.types:
        written += draw(kind, folder, slug(kind.title))
    return written


def record(pair: Pair) -> dict[str, Any]:
    """Return every statistic of a pair."""
    test, items = pair.test, pair.items
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
        "items": items and {"metric": pair.items_metric, **vars(items), "p_holm": pair.items_p_holm},
        "verdict": pair.verdict,
    }


def _means(comparison: Comparison) -> Sheet:
    """Return mean scores of all models; each type over the tasks that all of its models have."""
    complete = {kind.title: kind.scores.dropna() for kind in comparison.types}
    means = {f"{title}\n{counted(len(table), 'task')}": table.mean() for title, table in complete.items()}
    models = dict.fromkeys(str(model) for kind in comparison.types for model in kind.scores)
    rows = ({"Model": model} | {name: number(mean.get(model)) for name, mean in means.items()} for model in models)
    what = "Mean score" if comparison.metric == MAIN_SCORE else f"Mean {comparison.metric}"
    return Sheet.of(f"{what} over the tasks that all have", rows)


def sheets_of_family(kind: TypeComparison, family: Family) -> list[Sheet]:
    """Return the tests of a family over tasks, then over items if there are scores of items."""
    rows = [
        {
            "First\n- second": f"{pair.first}\n- {pair.second}",
            "Tasks": str(test.n),
            "Difference\n95 % interval": f"{test.mean_difference:+.4f}\n{_interval(test.low, test.high)}",
            "W": f"{test.statistic:g}",
            "p": p_text(test.p),
            "p Holm": p_text(pair.p_holm) + ("*" if pair.significant else ""),
            "Effect": f"{test.effect_size:+.2f}",
        }
        for pair, test in ((pair, pair.test) for pair in family.pairs)
    ]
    what = "exploratory"
    if family.confirmatory:
        what = "pre-registered" if len(kind.scores.columns) > 2 else "the only pair"
    if family.plan.reachable:
        verdicts = [pair.verdict for pair in family.pairs if family.confirmatory or pair.significant]
        verdicts = verdicts or ["No exploratory pair is significant."]
    else:
        what += " (cannot reach significance: no marks)"
        verdicts = ["No verdict: more tasks are needed."]
    found = [Sheet.of(f"{kind.title}: {what}", rows, f"Power: {family.plan}", *verdicts)]
    tested = [(pair, pair.items) for pair in family.pairs if pair.items is not None]
    if tested:
        rows = [
            {
                "First\n- second": f"{pair.first}\n- {pair.second}",
                "Items": f"{test.items:,}",
                "Difference": f"{test.mean_difference:+.4f}",
                f"Tasks like these\n{_INTERVAL} Holm": f"{_interval(test.low, test.high)}\n{p_text(pair.items_p_holm)}",
                f"These tasks only\n{_INTERVAL}": f"{_interval(test.low_here, test.high_here)}\n{p_text(test.p_here)}",
            }
            for pair, test in tested
        ]
        metrics = ", ".join(dict.fromkeys(pair.items_metric for pair, _ in tested))
        what = "" if family.confirmatory else ", exploratory"
        found.append(Sheet.of(f"{kind.title}: over items ({metrics}){what}", rows, _ITEM_LEGEND))
    return found


def about_type(kind: TypeComparison) -> tuple[str, ...]:
    """Return what ranks and seeds say, in sentences."""
    lines = []
    if ranks := kind.ranks:
        order = ", ".join(f"{model} ({rank:.2f})" for model, rank in ranks.mean_ranks.items())
        lines.append(
            f"Friedman over {len(ranks.mean_ranks)} models and {counted(ranks.tasks, 'task')}: "
            f"chi² {ranks.chi_square:.2f}, F {ranks.f:.2f}, p {p_text(ranks.p)}. Mean ranks: {order}."
        )
    if seeds := kind.seeds:
        lines.append(
            f"Seeds: standard deviation {seeds.sd_seeds:.4f} between runs of one design, {seeds.sd_designs:.4f} "
            f"between designs ({counted(sum(seeds.runs.values()), 'run')})."
        )
    return tuple(lines)


def footnotes(comparison: Comparison) -> Iterator[str]:
    """Yield how to read the tables, and the notes."""
    yield _LEGEND.format(alpha=comparison.alpha)
    yield INDEPENDENCE
    if not any(pair.confirmatory for kind in comparison.types for pair in kind.pairs):
        yield "No comparison was pre-registered, so every pair is exploratory. Name up to six: --contrast A:B."
    yield from comparison.notes


def number(value: float | None, form: str = ".4f") -> str:
    """Return a number as tables show it; "-" if there is none.

    Example:
        >>> number(0.5), number(None), number(float("nan"))
        ('0.5000', '-', '-')
    """
    return "-" if value is None or math.isnan(value) else format(value, form)


def p_text(value: float) -> str:
    """Return a p-value as tables show it."""
    return "<0.0001" if value < 0.0001 else number(value)


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
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
