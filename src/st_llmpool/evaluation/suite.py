"""Suite files: the local tasks of an evaluation and their data.

```yaml
description: Search and similarity on our own texts.
tasks:
  - name: LocalManualRetrieval
    type: Retrieval            # Retrieval, Reranking, STS, PairClassification, Classification, Clustering
    folder: manual             # in the data folder, with corpus, queries and qrels, .parquet or .jsonl
    columns: {id: _id}         # column of the task: column of the file, if they differ
    corpus: manual             # tasks of one corpus are not independent evidence; by default the folder
    language: eng-Latn         # as mteb writes it
    prompt: {query: "query: "} # for models without a prompt of their own
    instruction: Find the page # a prompt too where the evaluation is given a template (`instruct`)
    where:                     # keep a slice: table, column, condition; all must hold
      corpus: {title: {in: [Engines, Brakes]}}
      queries: {text: {starts: [how, why], length: [0.0, 0.5]}}
```

Tables by type: Retrieval reads `corpus` (id, optional title, text), `queries` (id, text) and `qrels` (query-id,
corpus-id, optional score), or `pairs` (query, positive) if `files` names it; Reranking `test` (query, positive,
negative: texts or lists of texts); STS `test` (sentence1, sentence2, score); PairClassification `test` (sentence1,
sentence2, label 0 or 1); Classification `train` and `test` (text, label); Clustering `test` (text, label).

`where` selects rows by value (`in`), first words (`starts`), quantile of length (`length`) or equal parts (`part`), see
`st_llmpool.evaluation.slices`. Queries without a remaining answer, and training texts of classes that are not in the
test table, are dropped too. It is part of the task's revision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..modules.errors import ConfigurationError, DataError, nearest
from ..utils.reading import exists, read_yaml
from ..utils.settings import from_mapping
from .slices import Where

SEARCH_TYPES = ("Retrieval", "Reranking")
_SHIPPED = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class TaskSpec:
    """One task of a suite file; `make_task` checks it and makes the task.

    Args:
        name: Name of the task and of its result file; not one of mteb's.
        type: A key of `TASK_TYPES`.
        folder: Folder of its files, in the data folder.
        source: A key of `SOURCES`, instead of a folder.
        files: Role to file name, if it is not `role.parquet` or `role.jsonl`.
        columns: Column of the task to its name in the files, if that differs.
        metric: Main score; by default that of mteb's tasks of the type.
        corpus: Name of the collection that the texts are from; None is the folder or source.
        language: Language and script, such as ``eng-Latn``.
        prompt: Prompt, or one each for `query` and `document`, for models without one.
        instruction: What the task asks for, in words, for models that follow instructions; see `instructed`.
        limit: Largest number of rows, queries or documents, applied after `where`.
        where: Rows to keep, see `slices`.
    """

    name: str
    type: str
    folder: str | None = None
    source: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    corpus: str | None = None
    language: str = "eng-Latn"
    metric: str | None = None
    prompt: str | Mapping[str, str] | None = None
    instruction: str | None = None
    limit: int | None = None
    where: Where = field(default_factory=dict)

    def instructed(self, template: str) -> TaskSpec:
        r"""Return the task with its instruction as the prompt: of queries in search, of every text elsewhere.

        Args:
            template: Such as ``"Instruct: {}\nQuery: "``.

        Example:
            >>> TaskSpec("Mine", "STS", instruction="Find similar texts").instructed("Instruct: {}; ").prompt
            'Instruct: Find similar texts; '
        """
        if self.instruction is None or self.prompt is not None:
            return self
        prompt = template.replace("{}", self.instruction)
        return replace(self, prompt={"query": prompt} if self.type in SEARCH_TYPES else prompt)


@dataclass(frozen=True)
class Suite:
    """A suite file; its data are not read.

    Args:
        name: Name of a shipped suite, or the file.
        folder: Default parent of the data folders; None for a shipped suite.
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
    """Return the names of the suites that come with the package.

    Example:
        >>> shipped_suites()
        ['builtin', 'open', 'squad', 'squad_slices']
    """
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def read_suite(name_or_file: str | Path) -> Suite:
    """Read a suite by its shipped name or from a YAML file.

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
