"""The sweep of a study: every base and design is tuned alike before it is compared.

Each combination of the values in ``sweep`` is trained once, at the first seed, and validated; the suite is not used.
The combination with the best last value of the validation metric serves all seeds; of equal ones, that with smaller
values. A run that ends below its start has diverged and is never chosen. Values that cannot act on a design are not
tried: the pooling's rate where the pooling has no weights, the backbone's where only the pooling trains, and what the
design's own ``change`` sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..modules.errors import ConfigurationError
from ..utils.settings import with_overrides
from .records import RunRecord, finished
from .settings import PlannedRun, Study

_RATE, _POOLING_RATE = "training.learning_rate", "training.pooling_learning_rate"


@dataclass(frozen=True)
class Tuning:
    """The sweep of one base and design.

    Args:
        base: Name of the base.
        label: Name of the design.
        values: Run of the sweep to the values that it tries.
        records: Its finished runs.
    """

    base: str
    label: str
    values: dict[str, dict[str, float]]
    records: tuple[RunRecord, ...]

    def is_of(self, run: PlannedRun) -> bool:
        """Return whether a run is of this base and design and waits for what is chosen."""
        return run.kind == "trained" and (run.base, run.label) == (self.base, self.label)

    @property
    def is_finished(self) -> bool:
        """Whether all its runs are finished."""
        return len(self.records) == len(self.values)

    @property
    def chosen(self) -> str | None:
        """The run whose values all seeds use; None before the end, and if all runs diverged."""
        fit = [record for record in self.records if not record.diverged]
        if not self.is_finished or not fit:
            return None
        return max(fit, key=lambda record: record.validation[-1][1]).id  # the first of equal ones

    def to_dict(self) -> dict[str, Any]:
        """Return what was tried and found, for ``results.parquet``."""
        runs = {
            record.id: {
                "values": self.values[record.id],
                "validation": record.validation,
                "diverged": record.diverged,
                "chosen": record.id == self.chosen,
            }
            for record in self.records
        }
        return {"base": self.base, "design": self.label, "runs": runs}


def sweep_runs(study: Study) -> list[PlannedRun]:
    """Return the runs of the sweep, in the order in which equal ones are preferred.

    Raises:
        ConfigurationError: If a swept design is not validated.
    """
    return [run for _, tried in _sweeps(study) for run, _ in tried]


def tunings(study: Study, output_dir: Path) -> list[Tuning]:
    """Return what the sweep has found so far, for each base and design that is swept.

    Args:
        study: The study.
        output_dir: Its folder.
    """
    records = {record.id: record for record in finished(sweep_runs(study), output_dir)}
    return [
        Tuning(
            first.base,
            first.label,
            {run.id: values for run, values in tried},
            tuple(records[run.id] for run, _ in tried if run.id in records),
        )
        for first, tried in _sweeps(study)
    ]


def ready_runs(study: Study, output_dir: Path) -> list[PlannedRun]:
    """Return the runs of all seeds with what the sweep chose, as far as it did.

    Args:
        study: The study.
        output_dir: Its folder.
    """
    found = {(tuning.base, tuning.label): tuning for tuning in tunings(study, output_dir)}
    runs = []
    for run in study.runs():
        tuning = found.get((run.base, run.label))
        if tuning is None:
            runs.append(_with(run, next(_combinations(study, run), {})))
        elif tuning.chosen is not None:
            same = tuning.chosen if run.seed == study.seeds[0] else ""
            runs.append(replace(_with(run, tuning.values[tuning.chosen]), trained_as=same))
    return runs


def _sweeps(study: Study) -> Iterator[tuple[PlannedRun, list[tuple[PlannedRun, dict[str, float]]]]]:
    """Yield the first run of each base and design that is swept, and the sweep's runs with their values."""
    for run in study.runs()[: len(study.bases) * len(study.designs)]:
        tried = list(_combinations(study, run))
        if len(tried) < 2:
            continue
        evaluation, steps = run.recipe.get("evaluation", {}), run.recipe.get("training", {}).get("max_steps")
        if not (evaluation.get("data") or evaluation.get("suite")) or (steps or 0) < evaluation.get("eval_steps", 100):
            raise ConfigurationError(
                f"sweep chooses the values of {run.label} by their last validation, and there is none: set "
                f"recipe.evaluation.data, and recipe.evaluation.eval_steps to at most training.max_steps."
            )
        yield run, [(replace(_with(run, values), id=_name(run, values), kind="sweep"), values) for values in tried]


def _combinations(study: Study, run: PlannedRun) -> Iterator[dict[str, float]]:
    """Yield the combinations of those values that act on a design, smaller ones first; nothing if none does."""
    change = next(design.change for design in study.designs if design.label == run.label)
    swept = {name: sorted(values) for name, values in study.sweep.items() if run.trains and _acts(name, run, change)}
    if swept:
        yield from (dict(zip(swept, values, strict=True)) for values in product(*swept.values()))


def _acts(name: str, run: PlannedRun, change: dict[str, Any]) -> bool:
    section, _, key = name.partition(".")
    if key in change.get(section, {}):
        return False
    return {_RATE: run.trains_backbone, _POOLING_RATE: run.trains_pooling}.get(name, True)


def _with(run: PlannedRun, values: dict[str, float]) -> PlannedRun:
    return replace(run, recipe=with_overrides(run.recipe, [f"{name}={value!r}" for name, value in values.items()]))


def _name(run: PlannedRun, values: dict[str, float]) -> str:
    """Return a short name, such as ``builtin_5_seed0_lr0.001``."""
    short = ["".join(word[0] for word in name.rpartition(".")[2].split("_")) for name in values]
    return "_".join([run.id, *(f"{key}{value:g}" for key, value in zip(short, values.values(), strict=True))])
