"""Tasks of local suites: mteb's task classes, reading local tables instead of the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeAlias

import numpy as np
from datasets import Dataset, DatasetDict

from ..data import docstring_pairs
from ..modules.errors import ConfigurationError, DataError, nearest
from ..utils.extras import importing_mteb
from ..utils.files import file_digest
from ..utils.random_state import preserve_rng_state
from ..utils.reading import is_folder
from ..utils.words import listed
from .slices import Where, check_where, cut, sample, sample_retrieval, select_rows
from .suite import TaskSpec, read_suite
from .task_files import Column, find_table, read_table

with importing_mteb():
    from mteb.abstasks import (
        AbsTask,
        AbsTaskClassification,
        AbsTaskClustering,
        AbsTaskPairClassification,
        AbsTaskRetrieval,
        AbsTaskSTS,
    )
    from mteb.abstasks.classification import ClassificationMetrics
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.sts import STSMetrics
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.get_tasks import TASK_LIST
    from mteb.types import PromptType

logger = logging.getLogger(__name__)

SPLIT = "test"

Table: TypeAlias = dict[str, list[Any]]

MTEB_TASKS = frozenset(task.metadata.name for task in TASK_LIST)

_FORMAT = 1  # part of every revision: raise it when the same files come to mean another task
_RETRIEVAL_METRICS = frozenset(
    f"{metric}_at_{k}"
    for metric in ("ndcg", "map", "recall", "precision", "mrr", "hit_rate")
    for k in AbsTaskRetrieval.k_values
)


class LocalTask(AbsTask):
    """Base of all local tasks; `make_task` derives the class of a task from one of the subclasses."""

    tables: ClassVar[dict[str, tuple[Column, ...]]]
    metrics: ClassVar[frozenset[str]]
    default_metric: ClassVar[str]
    read: ClassVar[Callable[[], dict[str, Table]]]
    limit: ClassVar[int | None]
    where: ClassVar[Where]
    corpus: ClassVar[str]

    def load_data(self, num_proc: int | None = None, **kwargs: object) -> None:
        """Read the tables, once."""
        if not self.data_loaded:
            self.dataset = self.build(self.select(type(self).read()))
            self.data_loaded = True

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return mteb's scores and the name of the corpus."""
        scores: Any = super().evaluate(*args, **kwargs)
        for values in scores.values():
            values["corpus"] = self.corpus
        return scores

    def select(self, tables: dict[str, Table]) -> dict[str, Table]:
        """Return the rows that the suite's `where` keeps, and the rows of other tables that belong to them."""
        return cut(self.metadata.name, self.where, tables)

    def build(self, tables: dict[str, Table]) -> Any:
        """Return the data in the shape that mteb's class of this type reads."""
        table = tables[SPLIT]
        keys = ["\n".join(str(value) for value in row) for row in zip(*table.values(), strict=True)]
        return DatasetDict({SPLIT: Dataset.from_dict(select_rows(table, sample(keys, self.limit)))})


class LocalSTS(LocalTask, AbsTaskSTS):
    """Pairs of texts with human similarity scores."""

    tables = {SPLIT: (Column("sentence1", "text"), Column("sentence2", "text"), Column("score", "number"))}
    metrics = frozenset(STSMetrics.__annotations__)
    default_metric = "cosine_spearman"


class LocalPairClassification(LocalTask, AbsTaskPairClassification):
    """Pairs of texts that belong together (1) or do not (0)."""

    tables = {SPLIT: (Column("sentence1", "text"), Column("sentence2", "text"), Column("label", "integer"))}
    metrics = frozenset(
        f"{score}_{metric}"
        for score in ("max", "similarity", "cosine", "manhattan", "euclidean", "dot")
        for metric in ("accuracy", "f1", "precision", "recall", "ap")
    )
    default_metric = "max_ap"
    label_column_name = "label"

    def build(self, tables: dict[str, Table]) -> DatasetDict:
        """Return the pairs."""
        found = set(tables[SPLIT]["label"])
        if found != {0, 1}:
            raise DataError(f"Task {self.metadata.name}: the labels are {sorted(found)[:10]}, expected both 0 and 1.")
        return super().build(tables)


class LocalClustering(LocalTask, AbsTaskClustering):
    """Texts with topics, to be recovered by clustering; all texts are embedded."""

    tables = {SPLIT: (Column("text", "text"), Column("label", "label"))}
    metrics = frozenset({"v_measure", "ami"})
    default_metric = "v_measure"
    input_column_name = "text"
    label_column_name = "label"
    max_fraction_of_documents_to_embed = None


class LocalClassification(LocalTask, AbsTaskClassification):
    """Texts with classes, learned from eight embeddings of each class, ten times."""

    tables = {role: (Column("text", "text"), Column("label", "label")) for role in ("train", SPLIT)}
    metrics = frozenset(ClassificationMetrics.__annotations__) - {"ap", "ap_weighted"}
    default_metric = "accuracy"

    def select(self, tables: dict[str, Table]) -> dict[str, Table]:
        """Return the rows that `where` keeps; a slice learns only the classes of its test texts."""
        tables = super().select(tables)
        if self.where:
            train, wanted = tables["train"], set(tables[SPLIT]["label"])
            tables["train"] = select_rows(train, [row for row, label in enumerate(train["label"]) if label in wanted])
        return tables

    def build(self, tables: dict[str, Table]) -> DatasetDict:
        """Return both splits with integer labels; only the test split is cut to the limit."""
        train, test = tables["train"], tables[SPLIT]
        unseen = set(test["label"]) - set(train["label"])
        if unseen:
            raise DataError(
                f"Task {self.metadata.name}: the test labels {_first(unseen)} do not occur in the training split."
            )
        names = sorted(set(train["label"]), key=lambda label: (str(type(label)), label))
        number = {name: position for position, name in enumerate(names)}
        splits = {"train": train, SPLIT: select_rows(test, sample(test["text"], self.limit))}
        return DatasetDict(
            {
                split: Dataset.from_dict({"text": table["text"], "label": [number[name] for name in table["label"]]})
                for split, table in splits.items()
            }
        )

    def _calculate_scores(self, y_test: Any, y_pred: Any) -> Any:
        """As mteb, whose labels are a lazy column: scikit-learn would read it value by value, again and again."""
        return super()._calculate_scores(list(y_test), y_pred)

    def evaluate(
        self, model: Any, split: str = SPLIT, *args: Any, prediction_folder: Path | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return mteb's scores and `accuracy_by_text`: the fraction of ten fits that were right on each test text."""
        with TemporaryDirectory() as folder:
            place = prediction_folder or Path(folder)
            scores: dict[str, Any] = super().evaluate(model, split, *args, prediction_folder=place, **kwargs)
            predictions = json.loads((place / self.prediction_file_name).read_text(encoding="utf-8"))
        assert self.dataset is not None
        for subset, values in scores.items():
            right = np.equal(predictions[subset][split], self.dataset[split]["label"]).mean(axis=0)
            values["accuracy_by_text"] = {str(text): rate for text, rate in enumerate(right.tolist())}
        return scores


class LocalRetrieval(LocalTask, AbsTaskRetrieval):
    """Queries, documents and relevance (as in BEIR)."""

    tables = {
        "corpus": (Column("id", "id"), Column("title", "text", default=""), Column("text", "text")),
        "queries": (Column("id", "id"), Column("text", "text")),
        "qrels": (Column("query-id", "id"), Column("corpus-id", "id"), Column("score", "integer", default=1)),
    }
    metrics = _RETRIEVAL_METRICS
    default_metric = "ndcg_at_10"

    def select(self, tables: dict[str, Table]) -> dict[str, Table]:
        """Return the rows that `where` keeps, without queries that have no answer left."""
        qrels = tables["qrels"]
        self._check_ids("queries", tables["queries"]["id"], qrels["query-id"])
        self._check_ids("corpus", tables["corpus"]["id"], qrels["corpus-id"])
        tables = super().select(tables)
        if self.where:
            tables = _connected(tables)
            if not tables["queries"]["id"]:
                raise DataError(f"Task {self.metadata.name}: where keeps no query together with a document for it.")
        return tables

    def build(self, tables: dict[str, Table]) -> dict[str, dict[str, RetrievalSplitData]]:
        """Return corpus, queries and relevance."""
        queries, corpus, qrels = tables["queries"], tables["corpus"], tables["qrels"]
        relevant: dict[str, dict[str, int]] = {}
        for query, document, grade in zip(qrels["query-id"], qrels["corpus-id"], qrels["score"], strict=True):
            relevant.setdefault(query, {})[document] = grade
        return self._split(queries, corpus, relevant)

    def _check_ids(self, role: str, ids: list[str], referred: list[str]) -> None:
        known = set(ids)
        if len(known) < len(ids):
            repeated = Counter(ids).most_common(1)[0][0]
            raise DataError(f"Task {self.metadata.name}: the {role} file holds id {repeated!r} more than once.")
        if dangling := set(referred) - known:
            raise DataError(f"Task {self.metadata.name}: qrels name {_first(dangling)}, not in the {role} file.")

    def _split(
        self, queries: Table, corpus: Table, relevant: Mapping[str, Mapping[str, int]]
    ) -> dict[str, dict[str, RetrievalSplitData]]:
        kept_queries, kept_documents = sample_retrieval(queries["id"], corpus["id"], relevant, self.limit)
        data = RetrievalSplitData(
            queries=_rows_with_ids(queries, kept_queries),
            corpus=_rows_with_ids(corpus, kept_documents),
            relevant_docs={
                query: {document: grade for document, grade in grades.items() if document in kept_documents}
                for query, grades in relevant.items()
                if query in kept_queries
            },
            top_ranked=None,
        )
        return {"default": {SPLIT: data}}

    def task_specific_scores(  # type: ignore[override] # mteb's hint says numbers; its result files take any JSON
        self, scores: dict[str, dict[str, float]], *args: object, **kwargs: object
    ) -> dict[str, dict[str, float]]:
        """Return nDCG@10 by query, for mteb's result file."""
        return {"ndcg_at_10_by_query": {query: metrics["ndcg_cut_10"] for query, metrics in scores.items()}}


class LocalPairRetrieval(LocalRetrieval):
    """Retrieval from pairs: the documents are the distinct positives of all pairs."""

    tables = {"pairs": (Column("query", "text"), Column("positive", "text"))}
    select = LocalTask.select

    def build(self, tables: dict[str, Table]) -> dict[str, dict[str, RetrievalSplitData]]:
        """Return corpus, queries and relevance."""
        pairs = tables["pairs"]
        relevant: dict[str, dict[str, int]] = {}
        for query, positive in zip(pairs["query"], pairs["positive"], strict=True):
            relevant.setdefault(_text_id(query), {})[_text_id(positive)] = 1
        return self._split(_with_ids(pairs["query"]), _with_ids(pairs["positive"]), relevant)


class LocalReranking(LocalRetrieval):
    """Queries, each with its own candidates to rank: some positive, some negative."""

    tables = {SPLIT: (Column("query", "text"), Column("positive", "texts"), Column("negative", "texts"))}
    default_metric = "map_at_1000"
    select = LocalTask.select

    def build(self, tables: dict[str, Table]) -> dict[str, dict[str, RetrievalSplitData]]:
        """Return all candidates as the corpus, and the candidates of every query."""
        rows = select_rows(tables[SPLIT], sample(tables[SPLIT]["query"], self.limit))
        grades: dict[str, dict[str, int]] = {}
        for query, positives, negatives in zip(rows["query"], rows["positive"], rows["negative"], strict=True):
            own = grades.setdefault(_text_id(query), {})
            own |= {_text_id(text): 0 for text in negatives if not own.get(_text_id(text))}
            own |= {_text_id(text): 1 for text in positives}
        candidates = [text for column in ("positive", "negative") for texts in rows[column] for text in texts]
        data = RetrievalSplitData(
            queries=Dataset.from_dict(_with_ids(rows["query"])),
            corpus=Dataset.from_dict(_with_ids(candidates)),
            relevant_docs=grades,
            top_ranked={query: list(own) for query, own in grades.items()},
        )
        return {"default": {SPLIT: data}}


TASK_TYPES: dict[str, type[LocalTask]] = {
    "Retrieval": LocalRetrieval,
    "Reranking": LocalReranking,
    "STS": LocalSTS,
    "PairClassification": LocalPairClassification,
    "Classification": LocalClassification,
    "Clustering": LocalClustering,
}


def _docstring_tables() -> dict[str, Table]:
    pairs = docstring_pairs(split="test")
    return {"pairs": {"query": [pair.query for pair in pairs], "positive": [pair.positive for pair in pairs]}}


SOURCES: dict[str, Callable[[], dict[str, Table]]] = {"docstrings": _docstring_tables}


def load_suite(
    name_or_file: str | Path,
    data_dir: str | Path | None = None,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    instruct: str | None = None,
    allow_missing: bool = False,
) -> list[LocalTask]:
    r"""Return the mteb tasks of a suite, after checking all their data.

    Args:
        name_or_file: A shipped suite or a YAML file.
        data_dir: Parent of the tasks' folders; by default the suite file's folder.
        tasks: Names of the tasks; None for all.
        limit: Largest number of rows, queries or documents per task, chosen deterministically.
        instruct: Template for the tasks' instructions, such as ``"Instruct: {}\nQuery: "``; None leaves them out.
        allow_missing: Leave out tasks whose folder does not exist, with a warning that lists them.

    Raises:
        ConfigurationError: If the suite or an argument names something that does not exist.
        DataError: If data are missing or do not fit the task; the message names the file.

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
    if instruct is not None:
        chosen = [task.instructed(instruct) for task in chosen]
    for task in chosen:
        _task_class(task)  # what is wrong in the file comes before what is missing on disk
    missing = [task for task in chosen if task.folder and not is_folder(folder / task.folder)]
    if missing and (len(missing) == len(chosen) or not allow_missing):
        names = [path.name for path in folder.iterdir()] if is_folder(folder) else []
        raise DataError(
            f"{folder} lacks {len(missing)} of the {len(chosen)} data sets of suite {suite.name}: "
            f"{listed((str(task.folder) for task in missing), most=50)}. Add them, or leave these tasks out with "
            f"allow_missing (--allow-missing).{nearest(str(missing[0].folder), names)}"
        )
    if missing:
        logger.warning("Left out, without data: %s.", ", ".join(task.name for task in missing))
        chosen = [task for task in chosen if task not in missing]
    with preserve_rng_state():
        return [make_task(task, folder, limit) for task in chosen]


def make_task(spec: TaskSpec, data_dir: Path, limit: int | None = None) -> LocalTask:
    """Return a task after reading its data once, so that errors come before a model is loaded.

    Args:
        spec: Settings of the task.
        data_dir: Parent of the task's folder.
        limit: Largest number of rows, queries or documents, if smaller than the suite's.

    Returns:
        An mteb task without loaded data. `metadata.revision` is a hash of the data and all settings here.

    Raises:
        ConfigurationError: If the spec names a type, source, column, file, metric or condition that does not exist.
        DataError: If files are missing or do not fit the type.
    """
    base = _task_class(spec)
    roles = () if spec.source else base.tables
    paths = {role: find_table(data_dir / str(spec.folder), role, spec.files.get(role)) for role in roles}
    smallest = min((value for value in (spec.limit, limit) if value is not None), default=None)

    def read() -> dict[str, Table]:
        if spec.source:
            return SOURCES[spec.source]()
        return {role: read_table(path, base.tables[role], spec.columns) for role, path in paths.items()}

    metadata = TaskMetadata.model_validate(
        {
            "name": spec.name,
            "description": f"{spec.type} on {spec.source or spec.folder}, read from this machine.",
            "dataset": {"path": spec.source or str(spec.folder), "revision": _revision(spec, smallest, paths)},
            "type": spec.type,
            "prompt": dict(spec.prompt) if isinstance(spec.prompt, Mapping) else spec.prompt,
            "category": "t2c" if base in (LocalClassification, LocalClustering) else "t2t",
            "eval_splits": [SPLIT],
            "eval_langs": [spec.language],
            "main_score": spec.metric or base.default_metric,
        }
    )
    attributes = {"metadata": metadata, "read": staticmethod(read), "limit": smallest, "where": spec.where}
    attributes["corpus"] = spec.corpus or spec.source or spec.folder
    task: LocalTask = type(spec.name, (base,), attributes)()
    task.load_data()
    task.unload_data()
    return task


def _task_class(spec: TaskSpec) -> type[LocalTask]:
    """Return the base class of the task, after checking all names in the spec."""

    def check(what: str, names: Iterable[str], known: Iterable[str]) -> None:
        known = sorted(known)
        for name in names:
            if name not in known:
                raise ConfigurationError(
                    f"Task {spec.name}: unknown {what} {name!r}; known are {', '.join(known)}.{nearest(name, known)}"
                )

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", spec.name):
        raise ConfigurationError(f"Task name {spec.name!r} must be letters, digits, '.', '-' and '_': it names a file.")
    if spec.name in MTEB_TASKS:
        raise ConfigurationError(f"Task name {spec.name!r} is one of mteb's; name it 'Local{spec.name}', for example.")
    check("type", [spec.type], TASK_TYPES)
    if (spec.folder is None) == (spec.source is None):
        raise ConfigurationError(f"Task {spec.name} needs a folder or a source, and not both.")
    check("source", [spec.source] if spec.source else [], SOURCES)
    base = TASK_TYPES[spec.type]
    if base is LocalRetrieval and (spec.source or "pairs" in spec.files):
        base = LocalPairRetrieval
    if spec.source and base is not LocalPairRetrieval:
        raise ConfigurationError(f"Task {spec.name}: source {spec.source!r} serves type 'Retrieval' only.")
    check("file", spec.files, base.tables)
    check("column", spec.columns, {column.name for columns in base.tables.values() for column in columns})
    check("metric", [spec.metric] if spec.metric else [], base.metrics)
    if isinstance(spec.prompt, Mapping):
        check("prompt", spec.prompt, [prompt_type.value for prompt_type in PromptType])
    if spec.where:
        check_where(spec.name, spec.where, base.tables)
    if spec.limit is not None and spec.limit < 1:
        raise ConfigurationError(f"Task {spec.name}: limit={spec.limit} must be at least 1.")
    return base


def _revision(spec: TaskSpec, limit: int | None, paths: Mapping[str, Path]) -> str:
    """Return a hash of everything but the model that the scores depend on."""
    content: Any = SOURCES[spec.source]() if spec.source else {role: file_digest(path) for role, path in paths.items()}
    apart = ("folder", "files", "limit", "corpus", "language", "instruction")
    settings = {key: value for key, value in asdict(spec).items() if key not in apart}
    if not spec.where:  # tasks from before there were slices keep their revision
        del settings["where"]
    key = json.dumps([_FORMAT, settings, limit, content], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def _first(labels: Iterable[object]) -> str:
    return ", ".join(repr(label) for label in sorted(labels, key=str)[:5])


def _text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_ids(texts: Iterable[str]) -> Table:
    unique = list(dict.fromkeys(texts))
    return {"id": [_text_id(text) for text in unique], "text": unique}


def _connected(tables: dict[str, Table]) -> dict[str, Table]:
    """Return a search task without relevance and queries that have lost their counterpart; documents stay."""
    queries, corpus, qrels = tables["queries"], set(tables["corpus"]["id"]), tables["qrels"]
    asked = set(queries["id"])
    pairs = zip(qrels["query-id"], qrels["corpus-id"], strict=True)
    qrels = select_rows(qrels, [row for row, (query, text) in enumerate(pairs) if query in asked and text in corpus])
    graded = zip(qrels["query-id"], qrels["score"], strict=True)
    answered = {query for query, grade in graded if grade > 0}
    rows = [row for row, query in enumerate(queries["id"]) if query in answered]
    return tables | {"queries": select_rows(queries, rows), "qrels": qrels}


def _rows_with_ids(table: Table, ids: set[str]) -> Dataset:
    return Dataset.from_dict(select_rows(table, [row for row, key in enumerate(table["id"]) if key in ids]))
