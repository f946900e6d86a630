"""What a finished run leaves: a small folder with its scores and facts, enough to go on and to report in any clone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..modules.errors import ConfigurationError, DataError
from ..training.settings import differences
from ..utils.files import atomic_folder
from .results import COLUMNS, ITEM_COLUMNS, Results
from .settings import PlannedRun

_FACTS = "run.json"
_SCORES = "results.parquet"
COST = "cost.json"
LAYERS = "layers.json"


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Args:
        id: Name of its folder.
        key: `PlannedRun.key`.
        base: Name of the base.
        design: Name of the design.
        option: Its option.
        seed: The seed.
        recipe: The recipe's values, in which ``{data}`` stands for the data folder.
        evaluation: What the scores depend on beside the model.
        training: What is in ``training.json`` of the run.
        evaluation_seconds: How long the evaluation took.
        stages: Of each stage before the recipe's own training: its name, steps, seconds, losses, masked accuracy.
        data: Training file to the hash of its content.
        machine: Processor or GPU, threads.
        cost: `Cost.to_dict`, which is measured when all runs are done; None before.
        layers: `LayerReport.to_dict`, likewise.
    """

    id: str
    key: str
    base: str
    design: str
    option: str
    seed: int
    recipe: dict[str, Any]
    evaluation: dict[str, Any]
    training: dict[str, Any]
    evaluation_seconds: float
    stages: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] | None = None
    layers: dict[str, Any] | None = None

    @property
    def rising(self) -> bool | None:
        """Whether the validation was still rising at the end: its last value is above all before it by over 1 %.

        None where there were fewer than three evaluations. Such a run is under-trained: another design may only be
        slower, not worse.
        """
        curve = self.validation
        if len(curve) < 3:
            return None
        before = max(value for _, value in curve[:-1])
        return curve[-1][1] > before + 0.01 * abs(before)

    @property
    def validation(self) -> list[tuple[int, float]]:
        """Step and value of the validation metric, the first held-out nDCG@10 (else the first metric)."""
        entries = self.training.get("evaluations", [])
        names = [name for _, metrics in entries for name in metrics]
        name = next((name for name in names if name.endswith("ndcg@10")), names[0] if names else None)
        return [(int(step), float(metrics[name])) for step, metrics in entries if name in metrics]


def write_record(record: RunRecord, results: Results, folder: Path) -> None:
    """Writes a run's folder beside and renames it, so that a folder that is there is whole.

    Args:
        record: The facts.
        results: The scores, of this run only; base, design, option and seed are the record's.
        folder: ``runs`` of the study.
    """
    names = {name: str(getattr(record, name)) for name in ("base", "design", "option", "seed")}
    rows = pd.concat([results.scores.assign(item=""), results.items], ignore_index=True).assign(**names)
    # Scores are means of float32 arithmetic: what follows the seventh digit is noise that does not compress.
    rows = rows[ITEM_COLUMNS].assign(score=rows["score"].astype("float32"))
    with atomic_folder(folder / record.id) as place:
        rows.to_parquet(place / _SCORES, index=False, compression="zstd")
        (place / _FACTS).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> RunRecord | None:
    """Reads the facts of a run; None if it is not finished.

    Raises:
        DataError: If the folder holds something else.
    """
    file = folder / _FACTS
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        for name in (COST, LAYERS):
            if (folder / name).is_file():
                facts[Path(name).stem] = json.loads((folder / name).read_text(encoding="utf-8"))
        return RunRecord(**facts)
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder} is not the record of a run ({error}): delete it to run it again.") from error


def take_over(runs: Iterable[PlannedRun], other: Path, folder: Path) -> list[str]:
    """Copies those runs of another study that are the same runs, so that no one makes them twice.

    Args:
        runs: The runs that the study asks for.
        other: ``runs`` of the other study.
        folder: ``runs`` of the study.

    Returns:
        The ids of the runs that were copied.
    """
    taken = []
    for run in runs:
        record = read_record(other / run.id)
        if record is not None and record.key == run.key and not (folder / run.id).exists():
            with atomic_folder(folder / run.id) as place:
                shutil.copytree(other / run.id, place, dirs_exist_ok=True)
            taken.append(run.id)
    return taken


def finished(runs: Iterable[PlannedRun], folder: Path) -> list[RunRecord]:
    """Returns the records of those planned runs that are finished.

    Args:
        runs: The runs that the study asks for.
        folder: ``runs`` of the study.

    Raises:
        ConfigurationError: If a run was made with other settings than the study has now; the message names them.
    """
    records = []
    for run in runs:
        record = read_record(folder / run.id)
        if record is None:
            continue
        if record.key != run.key:
            before = {"recipe": record.recipe, "evaluation": record.evaluation}
            changes = differences(before, {"recipe": run.recipe, "evaluation": run.evaluation})
            raise ConfigurationError(
                f"run {run.id} was made with other settings: {', '.join(changes) or 'an earlier version'} changed. "
                f"Delete {folder / run.id} to run it again, give the changed design an option of its own, or choose "
                f"another output folder."
            )
        records.append(record)
    return records


def read_scores(records: Sequence[RunRecord], folder: Path) -> Results:
    """Reads the scores of finished runs into one table.

    Args:
        records: The runs.
        folder: ``runs`` of the study.
    """
    tables = [pd.read_parquet(folder / record.id / _SCORES) for record in records]
    rows = pd.concat(tables, ignore_index=True).astype({"score": float})
    is_item = rows["item"] != ""
    return Results(rows.loc[~is_item, COLUMNS].reset_index(drop=True), rows.loc[is_item].reset_index(drop=True))
