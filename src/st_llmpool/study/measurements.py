"""Measurements of the models of finished runs: cost, and layers before and after training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..analysis.cost import measure_cost
from ..analysis.layers import Probes, analyze_layers, sample_probes
from ..evaluation.tasks import SPLIT, LocalTask
from ..hub.loading import load_model
from ..training import untrained_model
from ..training.recipe import DEFAULT_LENGTH, Recipe
from ..utils.files import write_atomically
from .records import COST, LAYERS

_PAIRS, _SEARCHES = 300, 150  # of the suite, as probes of single layers


def measure_run(
    model_dir: Path | None, recipe: Recipe, folder: Path, tasks: Sequence[LocalTask], *, layers: bool
) -> None:
    """Measure cost and layers of a run's model and write them next to its record; existing files are kept.

    Args:
        model_dir: The trained model; None is the recipe's before training.
        recipe: What it was trained with.
        folder: The run's folder in ``runs``.
        tasks: The suite, whose similarity and search tasks probe single layers.
        layers: Also analyse the layers.
    """
    wanted = [name for name in (COST, *([LAYERS] if layers else [])) if not (folder / name).is_file()]
    if not wanted:
        return
    if model_dir is None:
        model = untrained_model(recipe)
    else:
        model = load_model(model_dir, trust_remote_code=recipe.model.trust_remote_code)
    if LAYERS in wanted:
        report = analyze_layers(untrained_model(recipe), model, probes=suite_probes(tasks))
        _write(folder / LAYERS, report.to_dict())
    if COST in wanted:
        model.max_seq_length = None  # texts longer than in training are measured too
        step = (16, recipe.model.max_seq_length or DEFAULT_LENGTH) if recipe.model.tune == "full" else None
        _write(folder / COST, measure_cost(model, training_batch=step).to_dict())


def suite_probes(tasks: Sequence[LocalTask]) -> Probes:
    """Return pairs and searches from a suite's tasks; the built-in ones if it has none."""
    pairs: list[tuple[str, str, float]] = []
    searches: dict[str, str] = {}  # an answer to its query, so that no document answers two
    for task in tasks:
        task.load_data()
        number = sum(other.metadata.type == task.metadata.type for other in tasks)
        data: Any = task.dataset
        if task.metadata.type == "STS":
            rows = data[SPLIT].select(range(min(len(data[SPLIT]), _PAIRS // number)))
            pairs += zip(rows["sentence1"], rows["sentence2"], rows["score"], strict=True)
        elif task.metadata.type == "Retrieval":
            searches |= _searches(data["default"][SPLIT], _SEARCHES // number)
        task.unload_data()
    if len(pairs) < 2 or not searches:
        return sample_probes()
    return Probes(tuple(pairs), tuple(searches.values()), tuple(searches))


def _searches(data: Any, most: int) -> dict[str, str]:
    text_of = {key: dict(zip(data[key]["id"], data[key]["text"], strict=True)) for key in ("queries", "corpus")}
    found: dict[str, str] = {}
    for query, grades in data["relevant_docs"].items():
        answer = text_of["corpus"][max(grades, key=grades.get)]
        if len(found) < most and answer not in found:
            found[answer] = text_of["queries"][query]
    return found


def _write(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(_rounded(values)) + "\n")


def _rounded(value: Any) -> Any:
    """Return values rounded to six digits, to keep the files small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
