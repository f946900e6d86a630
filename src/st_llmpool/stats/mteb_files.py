"""Find and read mteb's result files, in whichever of its folder layouts they lie."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from ..evaluation.suite import read_suite, shipped_suites
from ..modules.errors import DataError
from ..utils.extras import importing_mteb
from ..utils.reading import read_json, read_json_object, shown
from .results import COLUMNS, complete

with importing_mteb():
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.get_tasks import TASK_LIST
    from mteb.results import TaskResult

_META = "model_meta.json"
_EXPERIMENTS = "experiments"
_BY_ITEM = re.compile(r"_by_(query|text)$")
_REVISION = re.compile(r"[0-9a-f]{7,40}|no_revision_available|external")


@dataclass(frozen=True)
class ModelFiles:
    """The result files of one model in one variant.

    Args:
        name: The model's name.
        variant: Revision and, if any, experiment, which distinguish models of one name.
        files: Its result files.
    """

    name: str
    variant: str
    files: tuple[Path, ...]


def find_models(folder: Path) -> list[ModelFiles]:
    """Find the models in a folder without reading their results.

    Args:
        folder: An mteb cache or a clone of a results repository (``results/<model>/<revision>/<Task>.json``, in the
            cache also below ``remote``), such a ``results`` folder, or the folder of one model or of one revision.
            Name and revision come from ``model_meta.json``, where it is missing from the folders' names.

    Raises:
        DataError: If the folder holds no JSON file, or a ``model_meta.json`` cannot be read.
    """
    roots = [root for root in (folder / "results", folder / "remote" / "results") if root.is_dir()] or [folder]
    found: dict[tuple[str, str], list[Path]] = {}
    for root in roots:
        files = sorted(path for path in root.rglob("*.json") if path.name != _META)
        for place, own in groupby(files, key=lambda path: path.parent):
            found.setdefault(_identity(place, root), []).extend(own)
    if not found:
        raise DataError(f"{folder} holds no result files of mteb: there is no .json file in it.")
    return [ModelFiles(name, variant, tuple(files)) for (name, variant), files in found.items()]


def read_models(models: Sequence[ModelFiles], designs: Sequence[tuple[str, str]]) -> tuple[pd.DataFrame, list[str]]:
    """Read every numeric score of some models, main scores among them, and the scores by query or text.

    Args:
        models: The models.
        designs: Design and option that each is filed under.

    Returns:
        Rows with `results.COLUMNS`, and notes on what was left out. The corpus of mteb's own tasks is their dataset.

    Raises:
        DataError: If a file is not JSON, or looks like a result and mteb cannot read it.
    """
    rows: list[dict[str, Any]] = []
    others: list[Path] = []
    for model, (design, option) in zip(models, designs, strict=True):
        for path in model.files:
            result = _read(path)
            if result is None:
                others.append(path)
                continue
            facts = {"design": design, "option": option, "task": result.task_name, "file": str(path)}
            facts |= {"dataset_revision": _known(result.dataset_revision), "mteb_version": _known(result.mteb_version)}
            rows += [facts | score for score in _scores(result)]
    notes = []
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        notes.append(f"{others[0]}{more}: no result of mteb, left out.")
    table = complete(pd.DataFrame(rows)) if rows else pd.DataFrame(columns=COLUMNS)
    parts = _parts_of_aggregates(set(table["task"]))
    for aggregate, names in parts.items():
        notes.append(
            f"{aggregate} is the mean of {', '.join(names)}: these are left out so that they do not count twice."
        )
    dropped = {name for names in parts.values() for name in names}
    datasets = {task.metadata.name: str(task.metadata.dataset.get("path", "")) for task in TASK_LIST}
    named = zip(table["task"], table["corpus"], strict=True)
    return table.assign(corpus=[corpus or datasets.get(task, "") for task, corpus in named])[
        ~table["task"].isin(dropped)
    ], notes


def known_task_types(tasks: Sequence[str]) -> dict[str, str]:
    """Return the types of those tasks that mteb or a shipped suite has; needs no network.

    Example:
        >>> known_task_types(["STSBenchmark", "LocalSquadRetrieval", "Mine"])
        {'STSBenchmark': 'STS', 'LocalSquadRetrieval': 'Retrieval'}
    """
    types = {task.metadata.name: str(task.metadata.type) for task in TASK_LIST}
    if not types.keys() >= set(tasks):
        types |= {task.name: task.type for suite in shipped_suites() for task in read_suite(suite).tasks}
    return {task: types[task] for task in tasks if task in types}


def _identity(folder: Path, root: Path) -> tuple[str, str]:
    """Return name and variant of the model whose results lie in `folder`."""
    experiment = folder.name if folder.parent.name == _EXPERIMENTS else ""
    revision_folder = folder.parent.parent if experiment else folder
    meta = next((path for path in (folder / _META, revision_folder / _META) if path.is_file()), None)
    if meta is not None:
        content = read_json_object(meta)
        if not {"name", "revision"} <= content.keys():
            raise DataError(f"{meta} must hold name and revision of the model; it has {shown(list(content))}.")
        name, revision = content["name"], content["revision"]
    elif _is_revision(revision_folder, root):
        name, revision = revision_folder.parent.name, revision_folder.name
    else:
        name, revision = revision_folder.name, ""
    return str(name).replace("__", "/"), " ".join(filter(None, [str(revision or "")[:8], experiment]))


def _is_revision(folder: Path, root: Path) -> bool:
    """Return whether a folder without model_meta.json is a revision (before mteb 1.12 it is the model itself)."""
    return len(folder.relative_to(root).parts) > 1 or _REVISION.fullmatch(folder.resolve().name) is not None


def _read(path: Path) -> TaskResult | None:
    """Return the result in a file; None if the file holds something else."""
    content = read_json(path)
    if not isinstance(content, dict) or not {"task_name", "mteb_dataset_name"} & content.keys():
        return None
    try:
        return TaskResult.from_disk(path)
    except Exception as error:  # mteb's own reading fails in many ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"{path} is not a result that mteb can read: {reason}") from error


def _known(value: str | None) -> str:
    """Return a revision or version; empty where mteb says that it is not there."""
    return "" if value is None or "not available" in value else str(value)


def _scores(result: TaskResult) -> Iterator[dict[str, Any]]:
    for split, subsets in result.scores.items():
        for scores in subsets:
            languages = " ".join(sorted(map(str, scores.get("languages") or ())))
            place = {"split": split, "subset": scores["hf_subset"], "item": "", "languages": languages}
            place["corpus"] = str(scores.get("corpus", ""))  # of local tasks
            for metric, value in scores.items():
                if value is None:
                    yield place | {"metric": metric, "score": float("nan")}
                elif isinstance(value, int | float) and not isinstance(value, bool):
                    yield place | {"metric": metric, "score": float(value)}
                elif _BY_ITEM.search(metric) and isinstance(value, dict):
                    name = _BY_ITEM.sub("", metric)
                    yield from (
                        place | {"metric": name, "item": str(item), "score": float(score)}
                        for item, score in value.items()
                    )


def _parts_of_aggregates(tasks: set[str]) -> dict[str, list[str]]:
    """Return tasks that are means of others, where both are there."""
    aggregates = [task for task in TASK_LIST if issubclass(task, AbsTaskAggregate) and task.metadata.name in tasks]
    parts = {
        task.metadata.name: sorted({part.metadata.name for part in task.metadata.tasks} & tasks) for task in aggregates
    }
    return {aggregate: names for aggregate, names in parts.items() if names}
