"""Suite files: which local tasks make one evaluation, and where their data lie.

```yaml
description: Search and similarity on our own texts.
tasks:
  - name: LocalManualRetrieval
    type: Retrieval            # Retrieval, Reranking, STS, PairClassification, Classification, Clustering
    folder: manual             # below the data folder; holds corpus, queries and qrels, .parquet or .jsonl
    columns: {id: _id}         # column of the task: column of the file, where they differ
    prompt: {query: "query: "} # for models that bring no prompt of their own
    where:                     # keep a slice: table, column, condition; all must hold
      corpus: {title: {in: [Engines, Brakes]}}
      queries: {text: {starts: [how, why], length: [0.0, 0.5]}}
```

Tables by type: Retrieval reads `corpus` (id, title if there, text), `queries` (id, text) and `qrels` (query-id,
corpus-id, score if there), or `pairs` (query, positive) where `files` names it; Reranking `test` (query, positive,
negative: texts or lists of texts); STS `test` (sentence1, sentence2, score); PairClassification `test` (sentence1,
sentence2, label 0 or 1); Classification `train` and `test` (text, label); Clustering `test` (text, label).

`where` cuts one task out of larger tables, by values (`in`), first words (`starts`), quantiles of length (`length`) or
parts of equal size (`part`), see `st_llmpool.evaluation.slices`. What belongs to dropped rows goes with them: queries
without an answer left, and training texts of classes that are not in the test table. It is part of the task's revision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..modules.errors import ConfigurationError, DataError, nearest
from ..utils.random_state import preserve_rng_state
from ..utils.reading import exists, read_yaml
from ..utils.settings import from_mapping
from .tasks import LocalTask, TaskSpec, make_task

_SHIPPED = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Suite:
    """A suite file as read; the data are not looked at.

    Args:
        name: Name of a shipped suite, or the file.
        folder: Where the data lie unless the user says otherwise; None for a shipped suite.
        description: One line for people.
        tasks: The tasks in order.
    """

    name: str
    folder: Path | None
    description: str
    tasks: tuple[TaskSpec, ...]


@dataclass
class _SuiteFile:
    description: str = ""
    tasks: list[TaskSpec] = field(default_factory=list)


def shipped_suites() -> list[str]:
    """Returns the names of the suites that come with the package.

    Example:
        >>> shipped_suites()
        ['builtin', 'squad', 'squad_slices']
    """
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def read_suite(name_or_file: str | Path) -> Suite:
    """Reads a suite by its shipped name or from a YAML file.

    Raises:
        DataError: If there is no such suite or file.
        ConfigurationError: If the file is not YAML, or has keys or values of the wrong kind.

    Example:
        >>> [task.name for task in read_suite("builtin").tasks]
        ['LocalDocstringRetrieval']
    """
    shipped = str(name_or_file) in shipped_suites()
    path = _SHIPPED / f"{name_or_file}.yaml" if shipped else Path(name_or_file)
    if not exists(path):
        raise DataError(
            f"suite {str(name_or_file)!r} is neither a file nor one of {', '.join(shipped_suites())}."
            f"{nearest(str(name_or_file), shipped_suites())}"
        )
    try:
        content = from_mapping(_SuiteFile, read_yaml(path))
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    tasks = content.tasks
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ConfigurationError(f"{path} must list tasks, each name once; it has {', '.join(names) or 'none'}.")
    return Suite(str(name_or_file), None if shipped else path.parent, content.description, tuple(tasks))


def load_suite(
    name_or_file: str | Path,
    data_dir: str | Path | None = None,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[LocalTask]:
    """Makes the mteb tasks of a suite and checks all their data.

    Args:
        name_or_file: A shipped suite or a YAML file.
        data_dir: Where the tasks' folders are; by default beside the suite file.
        tasks: Names of the tasks to make; None for all.
        limit: The most rows, queries or documents of each task, chosen the same way every time.

    Raises:
        ConfigurationError: If the suite or an argument names something that does not exist.
        DataError: If data are missing or not what a task needs. The message names the file.

    Example:
        >>> [task.metadata.name for task in load_suite("squad", "data")]  # doctest: +SKIP
        ['LocalSquadRetrieval', 'LocalStsBenchmark', 'LocalBanking77', 'LocalSquadTopicsP2P', 'LocalSquadTopicsS2S']
    """
    suite = read_suite(name_or_file)
    known = [task.name for task in suite.tasks]
    for name in tasks or ():
        if name not in known:
            raise ConfigurationError(
                f"suite {suite.name} has no task {name!r}; it has {', '.join(known)}.{nearest(name, known)}"
            )
    if limit is not None and limit < 1:
        raise ConfigurationError(f"limit={limit} must be at least 1.")
    chosen = [task for task in suite.tasks if tasks is None or task.name in tasks]
    folder = suite.folder if data_dir is None else Path(data_dir)
    if folder is None:
        if any(task.folder for task in chosen):
            raise DataError(f"suite {suite.name} reads folders: say where they are (data_dir, or --data DIR).")
        folder = Path()
    with preserve_rng_state():
        return [make_task(task, folder, limit) for task in chosen]
