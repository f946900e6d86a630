"""Run a study: every planned run once, several in parallel, on one or more machines; then the report.

References and the sweep are first, then all designs seed by seed, with the values that the sweep chose.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.table import Table

from ..evaluation.tasks import load_suite
from ..modules.errors import ConfigurationError, StLlmpoolError
from ..stats.plots import require_libraries
from ..stats.results import Results
from ..training.checks import check_names
from ..utils.extras import require
from ..utils.files import write_atomically
from ..utils.words import counted
from .records import RunRecord, finished, read_record, read_scores, reuse_runs, write_results, write_study
from .settings import PlannedRun, Study
from .sweep import ready_runs, sweep_runs, tunings
from .worker import LOCKED, PROGRESS, cache_of, lock_of

_RETRY_SECONDS = 10.0  # between two attempts at a run that another process has locked
_LOG_LINES = 15


class StudyError(StLlmpoolError, RuntimeError):
    """A run of a study failed."""


@dataclass
class _State:
    """What the table shows of a run."""

    run: PlannedRun
    stage: str = "waiting"
    seconds: float = 0.0
    started: float | None = None
    record: RunRecord | None = None


class StudyRunner:
    """Runs what is missing of a study.

    Finished runs are skipped, and an interrupted run resumes from its checkpoint with the same results. Several
    machines, or the processes of ``accelerate launch``, may share one folder: each run has a lock.

    Args:
        study: The study.
        output_dir: Output folder. ``study.yaml``, ``results.parquet``, ``summary.md`` and its pictures are worth
            committing; ``runs``, ``report`` and ``mteb`` can be removed when the study is finished.
        work: Folder for checkpoints, models and logs; None is ``work`` in `output_dir`.
        data_dir: Folder that replaces ``{data}`` in the recipe, with the suite's folders.
        jobs: Number of parallel runs of this process; GPUs are assigned in turn.
        reuse_from: Folders of other studies, or their ``results.parquet``; identical runs are reused.
        report_only: Only report on the finished runs; needs no data.
        console: Console for the progress; None is standard error.

    Raises:
        ConfigurationError: If a recipe does not fit, or `output_dir` holds runs that were made with other settings.
        DataError: If data of the suite are missing or wrong.

    Example:
        >>> study = Study.load("quick")
        >>> StudyRunner(study, "runs/quick", data_dir="data").run()  # doctest: +SKIP
    """

    def __init__(
        self,
        study: Study,
        output_dir: str | Path,
        *,
        work: str | Path | None = None,
        data_dir: str | Path | None = None,
        jobs: int = 1,
        reuse_from: Sequence[Path] = (),
        report_only: bool = False,
        console: Console | None = None,
    ) -> None:
        require("train", "accelerate", "datasets", purpose="A study")
        require("eval", "mteb", "pyarrow", "scipy", "statsmodels", purpose="A study")
        require_libraries()
        if jobs < 1:
            raise ConfigurationError(f"jobs={jobs} must be at least 1.")
        self.study = study
        self.output_dir = Path(output_dir)
        self.work = self.output_dir / "work" if work is None else Path(work)
        self.data_dir = None if data_dir is None else Path(data_dir)
        self.jobs = jobs
        self.reuse_from = reuse_from
        self.console = console or Console(stderr=True)
        self._first = [*study.reference_runs(), *sweep_runs(study)]
        if not report_only:
            for run in (run for run in [*self._first, *study.runs()] if run.recipe):
                recipe = run.to_recipe(self.data_dir, run.training_folder(self.work), cache_of(study, self.work))
                if run.trains:
                    check_names(recipe)
            self.tasks = load_suite(
                study.suite,
                self.data_dir,
                limit=study.limit,
                instruct=study.instruct,
                allow_missing=study.allow_missing,
            )
        self.finished  # noqa: B018 # raises if runs of other settings are there
        self._stop = threading.Event()
        self._processes: set[subprocess.Popen[bytes]] = set()

    @property
    def runs(self) -> list[PlannedRun]:
        """The runs of all designs and seeds, as far as the sweep has chosen their values."""
        return ready_runs(self.study, self.output_dir)

    @property
    def records(self) -> list[RunRecord]:
        """Those of them that are finished, in the order of the study."""
        return finished(self.runs, self.output_dir)

    @property
    def finished(self) -> list[RunRecord]:
        """All finished runs: references, the sweep and `records`."""
        return [*finished(self._first, self.output_dir), *self.records]

    def run(self) -> list[RunRecord]:
        """Carry out all unfinished runs, and return `records`.

        Raises:
            StudyError: If runs failed; the others are finished by then. The message names their logs.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        write_study(replace(self.study, base_folders={}), self.output_dir / "study.yaml")  # no paths of this machine
        states = {run.id: _State(run) for run in [*self._first, *self.study.runs()]}
        began = time.monotonic()
        try:
            self._carry_out(self._first, states, began)
            self._end_sweep(states)
            self._carry_out(self.runs, states, began)
        finally:
            self._stop.set()
            for process in list(self._processes):
                process.terminate()
        failed = [run_id for run_id, state in states.items() if state.stage == "failed"]
        if failed:
            log = self.log(failed[0])
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])
            raise StudyError(
                f"{len(failed)} of {counted(len(states), 'run')} failed: {', '.join(failed)}. End of {log}:\n{tail}\n"
                f"Start the study again to resume from the last checkpoints."
            )
        return self.records

    def _carry_out(self, runs: Sequence[PlannedRun], states: dict[str, _State], began: float) -> None:
        """Reuse or carry out some runs."""
        for other in self.reuse_from:
            with lock_of("reuse", self.output_dir).acquire(timeout=-1):  # one of several processes copies
                reused = reuse_runs(runs, other, self.output_dir)
            self.console.print(f"{counted(len(reused), 'run')} reused from {other}", highlight=False)
        before = {record.id: record for record in finished(runs, self.output_dir)}
        waiting: queue.Queue[PlannedRun] = queue.Queue()
        for run in runs:
            states[run.id].run = run
            if run.id in before:
                states[run.id].stage, states[run.id].record = "finished before", before[run.id]
            else:
                waiting.put(run)
        threads = [
            threading.Thread(target=self._work, args=(slot, waiting, states), daemon=True) for slot in range(self.jobs)
        ]
        for thread in threads:
            thread.start()
        self._watch(threads, states, began)

    def _end_sweep(self, states: dict[str, _State]) -> None:
        """Print what was chosen, remove the other models, and leave out designs of which all runs diverged."""
        for tuning in tunings(self.study, self.output_dir):
            name = " ".join([*[tuning.base] * (len(self.study.bases) > 1), tuning.label])
            if tuning.chosen is not None:
                chosen = ", ".join(f"{key} {value:g}" for key, value in tuning.values[tuning.chosen].items())
                self.console.print(f"{name}: the sweep chose {chosen}", highlight=False)
            elif tuning.is_finished:
                self.console.print(f"{name}: every run of the sweep diverged, so it is left out.", highlight=False)
                for run_id in [key for key, state in states.items() if tuning.is_of(state.run)]:
                    del states[run_id]
            for record in tuning.records if tuning.is_finished else ():
                if record.id != tuning.chosen:
                    shutil.rmtree(self.work / record.id / "training", ignore_errors=True)

    def measure(self) -> None:
        """Measure cost and layers of the first seed's models that are on this machine, in sequence, under a lock.

        Of a design that does not train, only the cost.
        """
        from .measurements import measure_run

        with lock_of("measure", self.output_dir).acquire(timeout=-1):
            measured = {r.id for r in self.records if r.cost and (r.layers or not self.study.layers)}
            here = [
                (run, run.training_folder(self.work))
                for run in self.runs
                if run.seed == self.study.seeds[0]
                and run.id not in measured
                and (self.output_dir / "runs" / run.id).is_dir()
                and ((run.training_folder(self.work) / "model").is_dir() or not run.trains)
            ]
            for run, training in track(here, "cost and layers", console=self.console):
                model, layers = (training / "model", self.study.layers) if run.trains else (None, False)
                recipe = run.to_recipe(self.data_dir, training)
                measure_run(model, recipe, self.output_dir / "runs" / run.id, self.tasks, layers=layers)

    @property
    def results(self) -> Results:
        """The scores of all finished runs and references.

        Raises:
            StudyError: If none is finished.
        """
        if not self.records:
            raise StudyError(f"no run in {self.output_dir / 'runs'} is finished: start the study first.")
        return read_scores(self.finished, self.output_dir)

    def write_results(self) -> Path:
        """Write ``results.parquet`` with scores and facts of all finished runs, and return its path."""
        sweep = [tuning.to_dict() for tuning in tunings(self.study, self.output_dir)]
        return write_results(self.finished, self.results, self.output_dir, sweep)

    def report(self) -> Path:
        """Write results, report and summary of what is finished, and return the report's page.

        ``study.yaml``, ``results.parquet``, ``summary.md`` and its pictures are what to keep of a study: the report
        can be made from them again, and another study can reuse the runs.
        """
        from .report import write_report

        self.write_results()
        page = write_report(self.study, self.records, self.results, self.output_dir / "report")
        for file in (page.parent / "summary").iterdir():
            write_atomically(self.output_dir / file.name, file.read_bytes())
        return page

    def log(self, run_id: str) -> Path:
        """Return the log file of a run."""
        return self.work / run_id / "log.txt"

    def _work(self, slot: int, waiting: queue.Queue[PlannedRun], states: dict[str, _State]) -> None:
        """Process runs until none is left."""
        while not self._stop.is_set():
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            state = states[run.id]
            state.stage, state.started = "starting", time.monotonic()
            returned = self.run_worker(run, slot)
            state.seconds = time.monotonic() - state.started
            if returned == LOCKED:
                state.stage, state.started = "elsewhere", None
                waiting.put(run)
                self._stop.wait(_RETRY_SECONDS)
            else:
                state.record = read_record(self.output_dir / "runs" / run.id)
                if returned == 0 and state.record is not None:
                    state.stage = "finished"
                elif not self._stop.is_set():
                    state.stage = "failed"

    def run_worker(self, run: PlannedRun, slot: int) -> int:
        """Carry out a run in a process of its own, and return its exit code, `LOCKED` if another process has the run.

        Args:
            run: The run.
            slot: Its number among the parallel runs.
        """
        try:
            with lock_of(run.id, self.output_dir):  # asked here too, since a worker needs seconds to start
                if read_record(self.output_dir / "runs" / run.id) is not None:
                    return 0
        except Timeout:
            return LOCKED
        self.log(run.id).parent.mkdir(parents=True, exist_ok=True)
        study = self.log(run.id).with_name("study.yaml")  # that of the folder may be another study's by now
        write_study(self.study, study)
        folders = {"study": study, "run": run.id, "out": self.output_dir, "work": self.work}
        if self.data_dir is not None:
            folders["data"] = self.data_dir
        command = [sys.executable, "-m", "st_llmpool.study.worker"]
        command += [f"--{name}={value}" for name, value in folders.items()]
        with self.log(run.id).open("ab") as log:
            environment = environment_of_run(slot, self.jobs, self.study.threads)
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
            self._processes.add(process)
            try:
                return process.wait()
            finally:
                self._processes.discard(process)

    def _watch(self, threads: Sequence[threading.Thread], states: dict[str, _State], began: float) -> None:
        """Show the runs until all threads end: a table on a terminal, lines elsewhere."""
        printed: dict[str, str] = {}
        with Live(console=self.console, auto_refresh=False, transient=False) as live:
            while True:
                alive = any(thread.is_alive() for thread in threads)
                if self.console.is_terminal:
                    live.update(self._table(states, began), refresh=True)
                else:
                    self._print_changes(states, printed)
                if not alive:
                    return
                for thread in threads:
                    thread.join(1.0 / len(threads))

    def _print_changes(self, states: dict[str, _State], printed: dict[str, str]) -> None:
        for run_id, state in states.items():
            stage = self._progress(state).get("stage", state.stage)
            if printed.get(run_id, "waiting") != stage:
                printed[run_id] = stage
                done = sum(other.stage.startswith("finished") for other in states.values())
                self.console.print(f"{run_id}: {stage}  ({done} of {len(states)} finished)", highlight=False)

    def _progress(self, state: _State) -> dict[str, Any]:
        """Return the progress that a running process wrote."""
        if state.stage not in ("starting", "elsewhere"):
            return {}
        try:
            progress = json.loads((self.work / state.run.id / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return dict(progress)

    def _table(self, states: dict[str, _State], began: float) -> Table:
        table = Table(title=f"{self.study.name}: {self._left(states, began)}", title_justify="left")
        for heading in ("run", "stage", "step", "loss", "time"):
            table.add_column(heading, justify="left" if heading in ("run", "stage") else "right", overflow="fold")
        order = {"starting": 0, "elsewhere": 0, "failed": 0, "waiting": 1}  # the end does not fit into a small window
        for run_id, state in sorted(states.items(), key=lambda entry: order.get(entry[1].stage, 2)):
            progress = self._progress(state)
            seconds = state.seconds if state.started is None else time.monotonic() - state.started
            if state.stage in ("finished", "failed"):
                seconds = state.seconds
            step = f"{progress['step']}/{progress['steps']}" if "step" in progress else ""
            loss = progress.get("loss")
            if state.record is not None and state.record.training.get("losses"):
                step, loss = str(state.record.training["steps"]), state.record.training["losses"][-1][1]
            table.add_row(
                run_id,
                str(progress.get("stage", state.stage)),
                step,
                "" if loss is None else f"{float(loss):.3f}",
                f"{seconds:.0f} s" if seconds else "",
            )
        return table

    def _left(self, states: dict[str, _State], began: float) -> str:
        done = [state for state in states.values() if state.stage == "finished"]
        left = sum(not state.stage.startswith(("finished", "failed")) for state in states.values())
        text = f"{len(states) - left} of {counted(len(states), 'run')} finished"
        if done and left:
            each = sum(state.seconds for state in done) / len(done)
            running = [time.monotonic() - s.started for s in states.values() if s.started and s.stage == "starting"]
            rest = max(left * each - sum(min(seconds, each) for seconds in running), 0) / self.jobs
            text += f", about {rest / 60:.0f} minutes left"
        return text + f", {(time.monotonic() - began) / 60:.0f} minutes so far"


def environment_of_run(slot: int, jobs: int, threads: int | None) -> dict[str, str]:
    """Return the environment of a run: its own threads and GPU, without a launcher's process group.

    Args:
        slot: Number of the run among the parallel ones.
        jobs: Number of parallel runs.
        threads: CPU threads; None divides the cores among parallel runs.
    """
    launched = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((*launched, "LOCAL_", "ACCELERATE_", "OMP_NUM_THREADS", "FSDP_"))
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment["OMP_NUM_THREADS"] = str(threads or max(cores // jobs, 1))
    environment["TOKENIZERS_PARALLELISM"] = "false"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = [gpu for gpu in visible if gpu] or [str(number) for number in range(torch.cuda.device_count())]
    if gpus:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        environment["CUDA_VISIBLE_DEVICES"] = gpus[(rank * jobs + slot) % len(gpus)]
    return environment
