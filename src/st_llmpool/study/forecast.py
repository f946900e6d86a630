"""Forecast of a study before anything runs: its cost, and the power of its tests."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import AutoModel

from ..data.training_data import DatasetSettings, read_rows
from ..designs import resolve_base
from ..evaluation.suite import read_suite
from ..saved_embedder import read_architecture
from ..stats.power_analysis import Pilot, Plan
from ..training.recipe import DEFAULT_LENGTH, TrainingSettings
from ..utils.parameters import count_weights
from ..utils.words import counted
from .records import RunRecord
from .settings import PlannedRun, Study, factors
from .sweep import sweep_runs

_UTILISATION = 0.4  # fraction of the matrix rate that training of a transformer typically reaches


@dataclass(frozen=True)
class Forecast:
    """Forecast of a study.

    Args:
        runs: All runs, references and the sweep among them.
        finished: How many of them are finished.
        flops: Run to floating-point operations of its training, an upper bound: texts may be shorter than the limit.
        seconds: Time for all missing runs in sequence, estimated from finished runs, else from operations (training
            only).
        from_finished: Whether `seconds` is estimated from finished runs.
        confirmatory: Task type to the power of the pre-registered comparisons.
        exploratory: Task type to the power of all other pairs.
    """

    runs: tuple[PlannedRun, ...]
    finished: int
    flops: dict[str, float]
    seconds: float
    from_finished: bool
    confirmatory: dict[str, Plan]
    exploratory: dict[str, Plan]

    def to_rich(self) -> Group:
        """Return tables for `rich.print`."""
        plan = Table(title="Runs", title_justify="left")
        for heading in ("run", "attention · readout · pooling", "option", "FLOPs"):
            plan.add_column(heading, justify="right" if heading == "FLOPs" else "left", overflow="fold")
        for run in self.runs:
            design = " · ".join(factors(run.recipe["model"]).values()) if run.recipe else "-"
            plan.add_row(run.id, design, run.option, f"{self.flops[run.id]:.1e}" if run.trains else "-")
        power = Table(title="Power of each table", title_justify="left")
        for heading in ("task type", "pairs", "power"):
            power.add_column(heading)
        for name, plans in (("pre-registered", self.confirmatory), ("exploratory", self.exploratory)):
            for kind, best in plans.items():
                power.add_row(kind, name, str(best))
        how = "estimated from the finished runs" if self.from_finished else "training only, estimated from FLOPs"
        missing = len(self.runs) - self.finished
        plan.caption = "FLOPs of the training, an upper bound: texts may be shorter than the limit."
        time_left = f"{missing} of {counted(len(self.runs), 'run')} to do, {self.seconds / 60:,.0f} minutes in sequence"
        return Group(plan, power, Text(f"{time_left} ({how})."))


def forecast(
    study: Study, records: Sequence[RunRecord], *, data_dir: Path | None = None, pilot: Pilot | None = None
) -> Forecast:
    """Forecast a study; runs nothing but matrix products for a tenth of a second.

    Args:
        study: The study.
        records: Its finished runs, of every kind.
        data_dir: Folder that replaces ``{data}``; needed if a recipe counts epochs.
        pilot: How much differences of designs vary, from an earlier study; by default a guess.
    """
    runs = [*study.reference_runs(), *sweep_runs(study), *study.runs()]
    parameters = {name: _parameters(study.base_folders.get(name, base)) for name, base in study.bases.items()}
    costly = [run for run in runs if run.trains and (run.trains_backbone or not study.frozen)]  # others read a cache
    flops = dict.fromkeys((run.id for run in runs), 0.0)
    flops |= {run.id: _training_flops(run, parameters[run.base], data_dir) for run in costly}
    missing = [run for run in runs if run.id not in {record.id for record in records}]
    if records:
        seconds = sum(_seconds(run, records) for run in missing)
    else:
        seconds = sum(flops[run.id] for run in missing) / (_UTILISATION * _matrix_rate())
    corpora: dict[str, list[str]] = {}
    for task in read_suite(study.suite).tasks:
        corpora.setdefault(task.type, []).append(task.corpus or task.folder or task.source or "")
    named = len(study.contrasts or ())
    others = comb(len(study.designs), 2) - named

    def plans(tests: int) -> dict[str, Plan]:
        settings: dict[str, Any] = {
            "seeds": len(study.seeds),
            "designs": len(study.designs),
            "rope": study.rope,
            "pilot": pilot or Pilot(),
        }
        return {kind: Plan(len(set(own)), len(own), tests, **settings) for kind, own in corpora.items() if tests}

    return Forecast(
        runs=tuple(runs),
        finished=len(runs) - len(missing),
        flops=flops,
        seconds=seconds,
        from_finished=bool(records),
        confirmatory=plans(named),
        exploratory=plans(others),
    )


def _seconds(run: PlannedRun, records: Sequence[RunRecord]) -> float:
    """Return the mean training time, if it trains, and the mean evaluation time, if it is evaluated, of others."""
    trained = [record.training["wall_seconds"] for record in records if record.training.get("wall_seconds")]
    evaluated = [record.evaluation_seconds for record in records if record.kind not in ("sweep", "bm25")]
    spent = [*[trained] * run.trains, *[evaluated] * (run.kind not in ("sweep", "bm25"))]
    return sum(sum(times) / len(times) for times in spent if times)


def _parameters(base: str) -> int:
    """Count the weights of a base that take part in matrix products, from its config."""
    config = read_architecture(resolve_base(base))
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    looked_up = model.get_input_embeddings().weight.numel()
    return count_weights(model.parameters()) - looked_up


def _training_flops(run: PlannedRun, parameters: int, data_dir: Path | None) -> float:
    """Return 6 N per token, or 4 N if the backbone's weights have no gradient (Kaplan et al. 2020, 2001.08361)."""
    recipe = run.to_recipe(data_dir or Path(), Path(run.id))
    steps = recipe.training.max_steps
    if steps is None:
        steps = _steps_of(recipe.training, run.to_recipe(data_dir, Path(run.id)).data)
    texts = 2 + (recipe.loss.num_negatives or 0)
    tokens = steps * recipe.training.batch_size * texts * (recipe.model.max_seq_length or DEFAULT_LENGTH)
    return float(tokens) * parameters * (6 if recipe.model.tune == "full" else 4)


def _steps_of(training: TrainingSettings, data: Sequence[DatasetSettings]) -> int:
    """Return the steps of a training that counts epochs; each set drops its last partial batch."""
    rows = [min(_count_rows(item.source, item.subset, item.split), item.limit or sys.maxsize) for item in data]
    return int(training.num_train_epochs * sum(count // training.batch_size for count in rows))


@cache
def _count_rows(source: str, subset: str | None, split: str) -> int:
    return len(read_rows(DatasetSettings(source, subset=subset, split=split)))


def _matrix_rate() -> float:
    """Measure this machine's float32 matrix products, in operations per second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 1024
    matrix = torch.rand(size, size, device=device)
    torch.mm(matrix, matrix).sum().item()
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        torch.mm(matrix, matrix).sum().item()
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started)
