"""Carry out one run of a study: train, evaluate, and write the run's record; a reference is only evaluated.

Each run is a separate process, `python -m st_llmpool.study.worker`, so that it has its own random state and memory, a
crash does not affect other runs, and the operating system frees the run's lock however the process ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..evaluation import bm25_baseline, evaluate, load_suite
from ..evaluation.suite import SEARCH_TYPES, read_suite
from ..modules.errors import ConfigurationError
from ..stats.readers import read_results
from ..stats.results import COLUMNS, Results, complete
from ..summary_cache.cached_backbone import check_poolings
from ..training import Recipe, train, untrained_model
from ..training.trainer import TrainingError
from ..utils.files import file_digest, share_files, write_atomically
from ..utils.parameters import count_weights
from ..utils.reading import read_json_object
from .records import RunRecord, finished, write_record
from .settings import PlannedRun, Study
from .sweep import ready_runs, sweep_runs

logger = logging.getLogger(__name__)

#: Exit code if another process runs this run.
LOCKED = 75

PROGRESS = "progress.json"
_OF_THE_PLAN = ("id", "key", "base", "design", "option", "seed", "recipe", "evaluation", "kind")


class ProgressFile(TrainerCallback):
    """Write step and loss to a file for the study's progress table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loss: float | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the loss."""
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the step."""
        if state.is_world_process_zero:
            write_progress(self.folder, "training", step=state.global_step, steps=state.max_steps, loss=self._loss)


def write_progress(folder: Path, stage: str, **facts: Any) -> None:
    """Write the progress of a run."""
    write_atomically(folder / PROGRESS, json.dumps({"stage": stage, **facts}), durable=False)


def carry_out(study: Study, run: PlannedRun, *, output_dir: Path, work: Path, data_dir: Path | None) -> RunRecord:
    """Train and evaluate one run; resume from its checkpoint if it was stopped.

    A run of the sweep is not evaluated, and neither is one that stopped because its numbers were not finite.

    Args:
        study: The study.
        run: One of its runs.
        output_dir: The study's folder; the record goes to ``runs``, mteb's result files to ``mteb``.
        work: Folder for checkpoints and models.
        data_dir: Folder that replaces ``{data}``.
    """
    folder = work / run.id
    folder.mkdir(parents=True, exist_ok=True)
    if run.kind == "bm25":
        started = time.monotonic()
        scores = bm25_scores(study, data_dir)
        record = _record(run, training={}, evaluation_seconds=time.monotonic() - started)
        write_record(record, Results(scores), output_dir)
        return record
    recipe = run.to_recipe(data_dir, run.training_folder(work), cache_of(study, work))
    model, report = _train(recipe, folder) if run.trains else _untrained(recipe)
    started, table = time.monotonic(), complete(pd.DataFrame(columns=COLUMNS))
    if model is not None and run.kind != "sweep":
        write_progress(folder, "evaluating")
        scores = evaluate(
            model,
            output_dir=output_dir / "mteb" / (run.id if run.trains else f"{run.base}_untrained"),
            suite=study.suite,
            data_dir=data_dir,
            limit=study.limit,
            instruct=study.instruct,
            allow_missing=study.allow_missing,
            batch_size=study.batch_size,
            show_progress=False,
            cache=recipe.training.cache if _is_cacheable(model) else None,
            cache_dtype=recipe.training.cache_dtype,
        )
        write_progress(folder, f"evaluated by {scores.inference}")
        table = read_results([str(scores.folder)], task_types={row.task: row.type for row in scores.rows}).table
    record = _record(
        run,
        training=report,
        stages=_stages(run.training_folder(work) / "stages"),
        evaluation_seconds=time.monotonic() - started,
        data=_digests(recipe) if run.trains else {},
    )
    write_record(record, Results(table), output_dir)
    shutil.rmtree(run.training_folder(work) / "checkpoints", ignore_errors=True)  # the optimizer's state
    return record


def _record(run: PlannedRun, *, evaluation_seconds: float, training: dict[str, Any], **facts: Any) -> RunRecord:
    return RunRecord(
        **{name: getattr(run, name) for name in _OF_THE_PLAN},
        training=training,
        evaluation_seconds=round(evaluation_seconds, 1),
        machine=_machine(),
        **facts,
    )


def _train(recipe: Recipe, folder: Path) -> tuple[SentenceTransformer | None, dict[str, Any]]:
    """Return the trained model and the report of its training; no model if the numbers were not finite."""
    try:
        frozen = recipe.training.cache is not None
        result = train(recipe, resume=True, callbacks=[ProgressFile(folder)], measure_card=not frozen)
        if frozen:  # hundreds of short runs would fill the disk with one backbone
            share_files(result.model_dir, Path(str(recipe.training.cache)) / "weights")
    except TrainingError as error:
        logger.error("%s", error)
        return None, {"not_finite": True}
    return result.model, result.report


def _untrained(recipe: Recipe) -> tuple[SentenceTransformer, dict[str, Any]]:
    model = untrained_model(recipe)
    return model, {"steps": 0, "wall_seconds": 0.0, "parameters": count_weights(model.parameters())}


def _is_cacheable(model: SentenceTransformer) -> bool:
    try:
        check_poolings(model)
    except ConfigurationError:  # of an untrained model; training would have been refused
        return False
    return True


def bm25_scores(study: Study, data_dir: Path | None) -> pd.DataFrame:
    """Return the rows of BM25 on the search tasks of a study's suite."""
    names = [task.name for task in read_suite(study.suite).tasks if task.type in SEARCH_TYPES]
    tasks = load_suite(study.suite, data_dir, tasks=names, limit=study.limit, allow_missing=study.allow_missing)
    rows = [
        {
            "task": task.metadata.name,
            "task_type": task.metadata.type,
            "corpus": task.corpus,
            "languages": " ".join(task.metadata.eval_langs),
            "dataset_revision": task.metadata.revision,
            "mteb_version": version("mteb"),
            "score": bm25_baseline(task),
        }
        for task in tasks
    ]
    return complete(pd.DataFrame(rows))


def cache_of(study: Study, work: Path) -> Path | None:
    """Return the folder of the layer summaries that all runs of a study share, None if its backbones train."""
    return work / "cache" if study.frozen else None


def lock_of(run_id: str, output_dir: Path) -> FileLock:
    """Return the lock of a run; entering it raises Timeout if another process holds it.

    It is a lock of the operating system, which is freed when the process ends, even by a crash.
    """
    (output_dir / "locks").mkdir(parents=True, exist_ok=True)
    return FileLock(output_dir / "locks" / f"{run_id}.lock", timeout=0)


def main(arguments: list[str]) -> int:
    """Run one run under its lock; returns `LOCKED` if another process has it."""
    parser = argparse.ArgumentParser(prog="python -m st_llmpool.study.worker")
    for name in ("study", "run", "out", "work", "data"):
        parser.add_argument(f"--{name}", required=name != "data")
    given = parser.parse_args(arguments)
    study, output_dir = Study.load(given.study), Path(given.out)
    everything = [*study.reference_runs(), *sweep_runs(study), *ready_runs(study, output_dir)]
    run = next(run for run in everything if run.id == given.run)
    try:
        with lock_of(run.id, output_dir):
            if not finished([run], output_dir):
                data_dir = None if given.data is None else Path(given.data)
                carry_out(study, run, output_dir=output_dir, work=Path(given.work), data_dir=data_dir)
    except Timeout:
        return LOCKED
    return 0


def _digests(recipe: Any) -> dict[str, str]:
    sources = [Path(item.source) for item in recipe.data]
    return {f"{path.parent.name}/{path.name}": file_digest(path) for path in sources if path.is_file()}


def _stages(folder: Path) -> list[dict[str, Any]]:
    """Return the facts to keep of the stages before the recipe's own training."""
    wanted = ("steps", "wall_seconds", "masked_accuracy", "merge", "losses")
    found = []
    for file in sorted(folder.glob("*/training.json")):
        report = read_json_object(file)
        found.append({"stage": file.parent.name, **{name: report[name] for name in wanted if name in report}})
    return found


def _machine() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "processor": platform.machine(), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
