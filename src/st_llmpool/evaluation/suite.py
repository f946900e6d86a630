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

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..modules.errors import ConfigurationError, DataError, nearest
from ..utils.reading import exists, read_yaml
from ..utils.settings import from_mapping
from .slices import Where

_SHIPPED = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class TaskSpec:
    """One task of a suite file; `make_task` checks it and makes the task.

    Args:
        name: Name of the task and of its result file; none of mteb's.
        type: A key of `TASK_TYPES`.
        folder: Folder of its files, below the data folder.
        source: A key of `SOURCES`, instead of a folder.
        files: Role to file name, where it is not `role.parquet` or `role.jsonl`.
        columns: Column of the task to its name in the files, where that differs.
        metric: Main score, by default the one that mteb's tasks of the type have.
        prompt: Text before every input, or one each for `query` and `document`, for models that bring none.
        limit: The most rows, queries or documents.
        where: Which rows the task keeps, see `slices`; the limit comes after it.
    """

    name: str
    type: str
    folder: str | None = None
    source: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    metric: str | None = None
    prompt: str | Mapping[str, str] | None = None
    limit: int | None = None
    where: Where = field(default_factory=dict)


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
