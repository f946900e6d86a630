"""BM25, the baseline of every retrieval table: the score of plain word overlap on the same task.

mteb's own BM25 needs a stemmer package on top of bm25s; this is plain bm25s, scored by mteb's own task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bm25s
from datasets import Dataset

from ..modules.errors import ConfigurationError
from ..utils.extras import importing_mteb
from ..utils.random_state import preserve_rng_state

with importing_mteb():
    from mteb.abstasks import AbsTask, AbsTaskRetrieval
    from mteb.models import ModelMeta


def bm25_baseline(task: AbsTask) -> float:
    """Return the main score of BM25 (bm25s's defaults, English stop words, title and text) on a search task.

    Raises:
        ConfigurationError: If the task is of another type.

    Example:
        >>> bm25_baseline(load_suite("builtin")[0])  # doctest: +SKIP
        0.52
    """
    if not isinstance(task, AbsTaskRetrieval):
        raise ConfigurationError(
            f"BM25 ranks documents, so it needs a retrieval task; {task.metadata.name} is {task.metadata.type}."
        )
    loaded_here = not task.data_loaded
    with preserve_rng_state():
        scores = [
            subset["main_score"]
            for split in task.eval_splits
            for subset in task.evaluate(_BM25(), split, encode_kwargs={}).values()
        ]
    if loaded_here:
        task.unload_data()
    return sum(scores) / len(scores)


class _BM25:
    """The interface that mteb's retrieval tasks need of a search engine."""

    mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "local/bm25s", "revision": bm25s.__version__})

    def index(self, corpus: Dataset, **kwargs: Any) -> None:
        titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
        texts = [f"{title} {text}" for title, text in zip(titles, corpus["text"], strict=True)]
        self._ids = list(corpus["id"])
        self._engine = bm25s.BM25()
        self._engine.index(_words(texts), show_progress=False)

    def search(
        self, queries: Dataset, *, top_k: int, top_ranked: Mapping[str, list[str]] | None = None, **kwargs: Any
    ) -> dict[str, dict[str, float]]:
        results = {}
        for query, words in zip(queries["id"], _words(list(queries["text"])), strict=True):
            scores = dict(zip(self._ids, self._engine.get_scores(words).tolist(), strict=True))
            if top_ranked is not None:
                scores = {document: scores[document] for document in top_ranked[query]}
            best = sorted(scores, key=scores.__getitem__, reverse=True)[:top_k]
            results[query] = {document: scores[document] for document in best}
        return results


def _words(texts: list[str]) -> Any:
    return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
