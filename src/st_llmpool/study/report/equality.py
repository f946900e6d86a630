"""Proof that all designs were trained alike: every setting in which they differ, and the hashes of their data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...stats.tables import Sheet
from ...utils.settings import differences
from ..records import RunRecord
from ..settings import PlannedRun, Study
from .document import Block, Table, Text

_OF_A_DESIGN = ("model.design", "model.attention", "model.pooling", "model.pooling_kwargs", "model.layer")
_ABSENT = "(not set)"


def equality(study: Study, records: Sequence[RunRecord]) -> list[Block]:
    """Returns what differs between the runs beside the seed, loudly where it is more than the design."""
    first, *others = (run for run in study.runs() if run.seed == study.seeds[0] and run.base == next(iter(study.bases)))
    changes = [(run, name) for run in others for name in differences(first.recipe, run.recipe)]
    rows = [(run.label, name, _text(_at(first.recipe, name)), _text(_at(run.recipe, name))) for run, name in changes]
    sheet = Sheet(
        "Settings that differ from those of the first design",
        ("Design", "Setting", first.label, "Here"),
        tuple(rows),
    )
    blocks: list[Block] = [
        Text(
            "All designs share one recipe and the same seeds, so they see the same data in the same order. What "
            "follows is everything in which their recipes differ."
        ),
        Table(sheet),
    ]
    unequal = _beyond_the_design(changes)
    if unequal:
        blocks.append(Text(f"Not only the design differs: {unequal}. Compare these designs with care.", warning=True))
    return [*blocks, *(Text(line, warning=True) for line in _unequal_runs(records)), *_data(records)]


def _beyond_the_design(changes: Sequence[tuple[PlannedRun, str]]) -> str:
    names: dict[str, list[str]] = {}
    for run, name in changes:
        if not name.startswith(_OF_A_DESIGN):
            names.setdefault(name, []).append(run.label)
    return "; ".join(f"{name} of {', '.join(labels)}" for name, labels in names.items())


def _unequal_runs(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yields what recipes do not say: data that changed under them, other libraries, other machines."""
    contents: dict[str, dict[str, list[str]]] = {}
    for record in records:
        for file, digest in record.data.items():
            contents.setdefault(file, {}).setdefault(digest, []).append(record.id)
    for file, runs in contents.items():
        if len(runs) > 1:
            fewest = min(runs.values(), key=len)
            yield (
                f"{file} was not the same file in all runs: it differs in {', '.join(fewest[:6])}"
                f"{' and others' if len(fewest) > 6 else ''}. Their scores must not be compared with the others."
            )
    facts = {
        "versions of libraries": [record.training.get("versions", {}) for record in records],
        "steps": [record.training.get("steps") for record in records],
        "rows of training data": [record.training.get("rows") for record in records],
        "precision": [record.training.get("precision") for record in records],
    }
    for what, values in facts.items():
        if any(value != values[0] for value in values):
            yield f"Runs differ in {what}; see the table of runs."


def _data(records: Sequence[RunRecord]) -> Iterator[Block]:
    rows = dict.fromkeys((file, digest) for record in records for file, digest in record.data.items())
    if rows:
        runs = [sum(record.data.get(file) == digest for record in records) for file, digest in rows]
        cells = tuple((file, digest, str(count)) for (file, digest), count in zip(rows, runs, strict=True))
        yield Table(Sheet("Training files by the hash of their content", ("File", "Hash", "Runs"), cells))


def _at(recipe: Any, name: str) -> Any:
    for part in name.split("."):
        recipe = recipe.get(part) if isinstance(recipe, dict) else None
    return recipe


def _text(value: Any) -> str:
    return _ABSENT if value is None else str(value)
