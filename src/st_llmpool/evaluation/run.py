"""Evaluate a model on a local suite, on mteb tasks by name, on an mteb benchmark, or on a suite during training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator

from ..fast_inference import optimized_inference
from ..hub.loading import check_code, load_model
from ..modules.errors import ConfigurationError, DataError, nearest
from ..summary_cache import cached_summaries
from ..utils.extras import importing_mteb
from ..utils.files import check_writable, write_atomically
from ..utils.random_state import preserve_rng_state
from .encoder import FiniteEncoder, identify
from .suite import read_suite
from .tasks import MTEB_TASKS, load_suite

with importing_mteb():
    import mteb
    from mteb.abstasks import AbsTask
    from mteb.cache import ResultCache
    from mteb.models import ModelMeta
    from mteb.results import TaskResult


def evaluate(
    model: SentenceTransformer | str | Path,
    *,
    output_dir: str | Path,
    suite: str | Path | None = None,
    data_dir: str | Path | None = None,
    benchmark: str | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    instruct: str | None = None,
    allow_missing: bool = False,
    batch_size: int = 32,
    show_progress: bool = True,
    cache: str | Path | None = None,
    cache_dtype: str = "float16",
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> EvaluationResult:
    r"""Score a model; write mteb's result files to `output_dir/results` and the main scores to `scores.json`.

    Existing results for the same weights, settings and data are reused, so an interrupted run is resumed. Local data
    are checked before the model is loaded; mteb's are downloaded when needed. The global random state is preserved.

    Args:
        model: A model, or the folder or Hub id to load one from.
        output_dir: Output folder.
        suite: A shipped suite (`shipped_suites()`) or a suite file, see `st_llmpool.evaluation.suite`; None is
            "builtin" without a benchmark.
        data_dir: Parent of the suite's data folders.
        benchmark: An mteb benchmark, such as "MTEB(eng, v2)", instead of a suite. Needs a network.
        tasks: Tasks to run, of the suite or benchmark, else of mteb; None for all of the suite or benchmark.
        limit: Largest number of rows, queries or documents per task of the suite.
        instruct: Template for the instructions of the suite's tasks, such as ``"Instruct: {}\nQuery: "``, for models
            that follow instructions; None leaves them out.
        allow_missing: Leave out tasks of the suite that have no data, with a warning that lists them.
        batch_size: Batch size.
        show_progress: Show mteb's progress bars.
        cache: Folder for the backbone's layer summaries, which poolings on one backbone share; None for none.
        cache_dtype: As :func:`st_llmpool.summary_cache.cached_summaries`.
        trust_remote_code: Run code of the model that is not the installed package's.
        revision: Branch, tag or commit of a Hub model.
        token: Hub token.

    Raises:
        ConfigurationError: If a suite, benchmark, task or setting is unknown, or two exclude each other.
        DataError: If data of the suite are missing or wrong.
        InputError: If the model gives an embedding that is not finite.

    Example:
        >>> result = evaluate("my-model", suite="squad", data_dir="data", output_dir="results")  # doctest: +SKIP
        >>> rich.print(result.to_rich())  # doctest: +SKIP
    """
    for name, value in {"suite": suite, "data_dir": data_dir, "limit": limit, "instruct": instruct}.items():
        if benchmark is not None and value is not None:
            raise ConfigurationError(
                f"{name}={str(value)!r} is of a local suite, not of benchmark={benchmark!r}: leave one out."
            )
    if batch_size < 1:
        raise ConfigurationError(f"batch_size={batch_size} must be at least 1.")
    check_writable(Path(output_dir))
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision, "token": token}
    source = None if isinstance(model, SentenceTransformer) else str(model)
    if source is not None:
        check_code(source, **hub)
    with preserve_rng_state():
        chosen = _choose(suite or "builtin", data_dir, benchmark, tasks, limit, instruct, allow_missing)
        if not isinstance(model, SentenceTransformer):
            model = load_model(str(source), **hub)
        encoder = FiniteEncoder(model, chosen, identify(model, source))
        meta, results = encoder.mteb_model_meta, ResultCache(output_dir)
        _drop_stale(results, meta, chosen)
        cached = nullcontext() if cache is None else cached_summaries(model, cache, dtype=cache_dtype)
        with cached, optimized_inference(model) as used:
            try:
                rows = run_tasks(encoder, chosen, results, batch_size, show_progress)
            except ConnectionError as error:
                raise DataError(
                    f"Data of mteb cannot be downloaded: {error}. mteb's own tasks need a network or a filled cache; a "
                    f"local suite (suite=..., --suite) needs neither."
                ) from error
    folder = results.get_task_result_path(chosen[0].metadata.name, meta).parent
    result = EvaluationResult(str(meta.name), str(meta.revision), rows, folder, str(used))
    write_atomically(Path(output_dir) / "scores.json", result.to_json())
    return result


def run_tasks(
    encoder: FiniteEncoder, tasks: Sequence[AbsTask], cache: ResultCache | None, batch_size: int, show_progress: bool
) -> tuple[TaskScore, ...]:
    """Run tasks through mteb and return their main scores, as in the result files; stop at the first error."""
    with nullcontext() if show_progress else _without_dataset_bars():
        results = mteb.evaluate(
            encoder,
            list(tasks),
            cache=cache,
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress},
            show_progress_bar=show_progress,
        ).task_results
    if cache is not None:  # the files are rounded, and a resumed run must give the same numbers
        paths = [cache.get_task_result_path(task.metadata.name, encoder.mteb_model_meta) for task in tasks]
        results = [TaskResult.from_disk(path) for path in paths]
    return tuple(
        TaskScore(task.metadata.name, task.metadata.type, task.metadata.main_score, float(result.get_score()))
        for task, result in zip(tasks, results, strict=True)
    )


@contextmanager
def _without_dataset_bars() -> Iterator[None]:
    """Turn off the progress bars of `datasets`, which mteb does not control."""
    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def _choose(
    suite: str | Path,
    data_dir: str | Path | None,
    benchmark: str | None,
    tasks: Sequence[str] | None,
    limit: int | None,
    instruct: str | None,
    allow_missing: bool,
) -> list[AbsTask]:
    """Return the tasks to run, in the order in which they were named."""
    if benchmark is not None:
        own = {task.metadata.name: task for task in find_benchmark(benchmark).tasks}
    else:
        names = [task.name for task in read_suite(suite).tasks]
        wanted = [name for name in names if tasks is None or name in tasks]
        found = load_suite(suite, data_dir, tasks=wanted, limit=limit, instruct=instruct, allow_missing=allow_missing)
        own = {task.metadata.name: task for task in found}
    if tasks is None:
        return list(own.values())
    if not tasks:
        raise ConfigurationError("tasks is empty; leave it out to run all tasks.")
    return [own[name] if name in own else _mteb_task(name, own) for name in tasks]


def find_benchmark(name: str) -> mteb.Benchmark:
    """Return mteb's benchmark of that name."""
    try:
        return mteb.get_benchmark(name)
    except KeyError as error:
        raise ConfigurationError(f"mteb has no benchmark {error.args[0]}") from None


def _mteb_task(name: str, own: dict[str, AbsTask]) -> AbsTask:
    try:
        return mteb.get_task(name)
    except KeyError:
        hint = nearest(name, [*own, *MTEB_TASKS])
        raise ConfigurationError(f"neither the suite nor mteb has a task {name!r}.{hint}") from None


def _drop_stale(cache: ResultCache, meta: ModelMeta, tasks: Sequence[AbsTask]) -> None:
    """Remove results on other data of the same name, which mteb would reuse."""
    for task in tasks:
        path = cache.get_task_result_path(task.metadata.name, meta)
        if path.exists() and TaskResult.from_disk(path).dataset_revision != task.metadata.revision:
            path.unlink()


@dataclass(frozen=True)
class TaskScore:
    """The main score of a model on a task, averaged over the task's splits and subsets.

    NaN if it is undefined, as a correlation is when all embeddings are equal.
    """

    task: str
    type: str
    metric: str
    score: float


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model.

    Args:
        model: Name of the model in mteb's result files.
        revision: Its revision there.
        rows: One for each task, in the order of the suite.
        folder: Folder of mteb's result files, with every metric, split and subset (and nDCG@10 by query for retrieval
            from a local suite); None if none were written.
        inference: Fast paths that were used, see `optimize_inference`.

    Example:
        >>> result = EvaluationResult("local/m", "1", (TaskScore("LocalSts", "STS", "cosine_spearman", 0.5),))
        >>> print(result.to_markdown())
        | Task | Type | Metric | Score |
        | --- | --- | --- | ---: |
        | LocalSts | STS | cosine_spearman | 0.5000 |
        >>> result.scores
        {'LocalSts': 0.5}
    """

    model: str
    revision: str
    rows: tuple[TaskScore, ...]
    folder: Path | None = None
    inference: str = ""

    @property
    def scores(self) -> dict[str, float]:
        """Task name to main score."""
        return {row.task: row.score for row in self.rows}

    def to_rich(self) -> Table:
        """Return a table for `rich.print`."""
        table = Table(
            "Task", "Type", "Metric", title=f"{self.model} @ {self.revision[:8]}", caption=self.inference or None
        )
        table.add_column("Score", justify="right")
        for row in self.rows:
            table.add_row(row.task, row.type, row.metric, f"{row.score:.4f}")
        return table

    def to_markdown(self) -> str:
        """Return a table in Markdown."""
        lines = ["| Task | Type | Metric | Score |", "| --- | --- | --- | ---: |"]
        lines += [f"| {row.task} | {row.type} | {row.metric} | {row.score:.4f} |" for row in self.rows]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return model, revision and rows as JSON; a score that is not defined is null."""
        rows = [asdict(row) | {"score": row.score if math.isfinite(row.score) else None} for row in self.rows]
        return json.dumps({"model": self.model, "revision": self.revision, "rows": rows}, indent=2)


class SuiteEvaluator(BaseEvaluator):
    """Score a model on a local suite at every evaluation step, without changing the training.

    The random state is preserved, so data order and dropout are those of a training without evaluation. Every call
    scores the same rows; nothing is cached.

    Args:
        suite: A shipped suite or a suite file.
        data_dir: Parent of the suite's data folders.
        tasks: Names of the tasks to run; None for all.
        limit: Largest number of rows, queries or documents per task; None for all.
        batch_size: Batch size.
        name: Prefix of the metrics.

    Raises:
        ConfigurationError: As `load_suite`.
        DataError: As `load_suite`.

    Returns on call:
        `{"[name_]<task>_<metric>": score, ..., "[name_]mean": mean of the scores}`; the mean is the primary metric.

    Example:
        >>> evaluator = SuiteEvaluator("squad", "data", limit=200)  # doctest: +SKIP
        >>> SentenceTransformerTrainer(model, args, train, evaluator=evaluator, loss=loss)  # doctest: +SKIP
    """

    def __init__(
        self,
        suite: str | Path = "builtin",
        data_dir: str | Path | None = None,
        *,
        tasks: Sequence[str] | None = None,
        limit: int | None = 200,
        batch_size: int = 32,
        name: str = "",
    ) -> None:
        super().__init__()
        self.tasks = load_suite(suite, data_dir, tasks=tasks, limit=limit)
        if not self.tasks:
            raise ConfigurationError("tasks is empty; leave it out to run all tasks.")
        self.suite = str(suite)
        self.limit = limit
        self.batch_size = batch_size
        self.name = name
        self.primary_metric = f"{name}_mean" if name else "mean"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return the scores, and record them in the model card.

        Raises:
            InputError: If the model gives an embedding that is not finite.
        """
        with preserve_rng_state(), optimized_inference(model):
            tasks = [type(task)() for task in self.tasks]  # fresh ones: a task has its own random generator
            rows = run_tasks(FiniteEncoder(model, tasks), tasks, None, self.batch_size, show_progress=False)
        scores = {f"{row.task}_{row.metric}": row.score for row in rows}
        scores["mean"] = sum(row.score for row in rows) / len(rows)
        metrics = self.prefix_name_to_metrics(scores, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def get_config_dict(self) -> dict[str, object]:
        """Return the evaluator's settings for the model card."""
        return {"suite": self.suite, "limit": self.limit}
