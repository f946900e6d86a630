"""Check whether scores may be compared: their range, their sources, and constant scorers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pandas as pd

from ..modules.errors import ConfigurationError, DataError
from ..utils.words import listed
from .results import MAIN_SCORE
from .statistics import DECIMALS

_CORRELATION = re.compile(r"spearman|pearson|kendall|correlation|matthews|mcc|kappa|p-?mrr|nauc", re.IGNORECASE)
_CORRELATION_TYPES = re.compile(r"STS|Summarization|Instruction|Regression")  # types whose main score is one
_SHOWN = 5
_LEAST_CONSTANT = 3  # tasks from which equal scores are suspicious
_SOURCES = {"dataset_revision": "dataset revision", "mteb_version": "mteb version", "languages": "languages"}


def check_scores(scores: pd.DataFrame) -> None:
    """Check that every score is a number between 0 and 1, or -1 and 1 for correlations.

    Args:
        scores: Rows of one metric with ``model``, ``task``, ``task_type``, ``metric``, ``file`` and ``score``.

    Raises:
        DataError: If a score is NaN or out of range; the message names file, task and value.
    """
    correlation = scores["metric"].str.contains(_CORRELATION) | (
        (scores["metric"] == MAIN_SCORE) & scores["task_type"].str.contains(_CORRELATION_TYPES)
    )
    lowest = correlation.map({True: -1.0, False: 0.0})
    slack = 10.0**-DECIMALS
    wrong = scores[~scores["score"].between(lowest - slack, 1 + slack)]
    if wrong.empty:
        return
    first = wrong.iloc[0]
    where = f"{first['file']}: " if first["file"] else ""
    others = f" ({len(wrong) - 1} other scores are wrong too)" if len(wrong) > 1 else ""
    raise DataError(
        f"{where}{first['metric']} of {first['model']} on {first['task']} is {first['score']:g}, expected a number "
        f"from {lowest[wrong.index[0]]:g} to 1{others}. Divide percentages by 100; evaluate the task again if the "
        f"score is not a number, or leave it out."
    )


def check_main_metrics(scores: pd.DataFrame) -> None:
    """Check that the main score of a task is the same metric for all models, as far as their files say.

    Args:
        scores: Rows of all metrics with ``model``, ``task``, ``split``, ``subset``, ``seed``, ``metric``, ``score``.

    Raises:
        ConfigurationError: If the main scores of a task equal different metrics.
    """
    cell = ["model", "task", "split", "subset", "seed"]
    main = scores[scores["metric"] == MAIN_SCORE].drop_duplicates(cell).set_index(cell)["score"]
    others = scores[scores["metric"] != MAIN_SCORE]
    others = others.assign(main=main.reindex(pd.MultiIndex.from_frame(others[cell])).to_numpy()).dropna(subset="main")
    same = (others["score"] - others["main"]).abs() < 10.0**-DECIMALS
    agrees = same.groupby([others["task"], others["model"], others["metric"]]).all()
    for task, of_task in agrees.groupby(level="task"):
        found = {
            str(model): set(part[part].index.get_level_values("metric")) for model, part in of_task.groupby("model")
        }
        found = {model: metrics for model, metrics in found.items() if metrics}
        if len(found) > 1 and not set.intersection(*found.values()):
            shown = "; ".join(f"{model}: {min(metrics)}" for model, metrics in list(found.items())[:_SHOWN])
            raise ConfigurationError(
                f"the main scores of {task} are of different metrics ({shown}); compare one of them: metric, or "
                f"--metric NAME."
            )


def source_differences(scores: pd.DataFrame, items: pd.DataFrame) -> list[str]:
    """Return a sentence for each kind of difference between the evaluations of tasks that several models have.

    Args:
        scores: Rows with ``model``, ``task`` dataset revision, mteb version and languages (empty: unknown).
        items: Scores of single queries or texts with ``model``, ``task``, ``split``, ``subset``, ``metric``, ``item``.
    """
    common = scores[scores.groupby("task")["model"].transform("nunique") > 1]
    found = []
    for column, words in _SOURCES.items():
        known = common[common[column] != ""]
        values = known.drop_duplicates(["task", "subset", column]).groupby(["task", "subset"])[column].agg(list)
        tasks = list(dict.fromkeys(values[values.str.len() > 1].index.get_level_values("task")))
        if tasks:
            rows = known[known["task"] == tasks[0]].drop_duplicates(["model", column])
            example = ", ".join(f"{model} {value}" for model, value in zip(rows["model"], rows[column], strict=True))
            found.append(f"{words} of {listed(tasks, most=_SHOWN)} ({tasks[0]}: {example})")
    return [*found, *_item_differences(items)]


def unknown_sources(scores: pd.DataFrame) -> Iterator[str]:
    """Yield which models do not say on which data they were scored, where others do."""
    for column in ("dataset_revision", "mteb_version"):
        known = scores.groupby("model", sort=False)[column].agg(lambda values: (values != "").any())
        if known.any() and not known.all():
            yield f"The {_SOURCES[column]} is not known of {listed(known[~known].index, most=_SHOWN)}."


def constant_scores(cells: pd.DataFrame) -> dict[str, float]:
    """Return the models that have one and the same score on all of their tasks, three or more.

    Args:
        cells: Score by task (rows) and model (columns); NaN where there is none.

    Example:
        >>> constant_scores(pd.DataFrame({"a": [0.5, 0.5, 0.5], "b": [0.5, 0.6, 0.7]}))
        {'a': 0.5}
    """
    rounded = cells.round(DECIMALS)
    constant = (rounded.nunique() == 1) & (rounded.notna().sum() >= _LEAST_CONSTANT)
    return {str(model): float(rounded[model].dropna().iloc[0]) for model in rounded.columns[constant]}


def _item_differences(items: pd.DataFrame) -> Iterator[str]:
    """Yield which tasks were evaluated on different queries or texts."""
    cell = ["task", "split", "subset", "metric"]
    sets = items.groupby([*cell, "model"])["item"].agg(frozenset)
    kinds = sets.groupby(level=cell).nunique()
    tasks = list(dict.fromkeys(kinds[kinds > 1].index.get_level_values("task")))
    if tasks:
        first = sets.xs(tasks[0], level="task")
        example = ", ".join(f"{model} {len(found)}" for model, found in first.groupby("model").first().items())
        yield f"evaluated queries or texts of {listed(tasks, most=_SHOWN)} ({tasks[0]}: {example})"
