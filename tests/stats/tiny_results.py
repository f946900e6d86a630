"""Results as mteb writes them, by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


def task_result(task: str, score: float | None, **more: Any) -> dict[str, Any]:
    """What mteb 2 writes for a task with one split and one subset; `more` goes beside the main score."""
    scores = {"main_score": score, "hf_subset": "default", "languages": ["eng-Latn"], **more}
    return {
        "dataset_revision": "1",
        "task_name": task,
        "mteb_version": "2.26.24",
        "scores": {"test": [scores]},
        "evaluation_time": 1.0,
    }


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_model(
    root: Path, name: str, scores: Mapping[str, float], *, revision: str = REVISION, meta: bool = True
) -> Path:
    """Writes ``root/<name>/<revision>/<Task>.json`` and returns the folder of the revision."""
    folder = root / name.replace("/", "__") / revision
    for task, score in scores.items():
        write_json(folder / f"{task}.json", task_result(task, score))
    if meta:
        write_json(folder / "model_meta.json", {"name": name, "revision": revision})
    return folder


def write_csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def main_scores(results):
    rows = results.scores[results.scores["metric"] == "main_score"]
    return {(row.design, row.option, row.task): row.score for row in rows.itertuples()}
