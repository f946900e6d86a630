from __future__ import annotations

import numpy as np
import pytest

from st_llmpool.evaluation import bm25_baseline, load_suite
from st_llmpool.modules.errors import ConfigurationError
from tests.evaluation.test_tasks import slow_average_precision, slow_bm25
from tests.evaluation.tiny_suite import CANDIDATES, QUERIES, write_table


def test_bm25_ranks_by_shared_words_of_title_and_text(suite_of):
    suite = suite_of({"name": "TinySearch", "type": "Retrieval", "folder": "search"})
    numbers, documents = [f"{n}" * 2 for n in range(12)], [f"d{n}" for n in range(12)]
    write_table(suite.parent / "search/queries.parquet", {"id": QUERIES["id"], "text": numbers})
    write_table(suite.parent / "search/corpus.parquet", {"id": documents, "title": numbers, "text": ["apple"] * 12})
    write_table(suite.parent / "search/qrels.parquet", {"query-id": QUERIES["id"], "corpus-id": documents})
    (task,) = load_suite(suite)
    assert bm25_baseline(task) == pytest.approx(1)
    assert not task.data_loaded


def test_bm25_reranks_own_candidates_only(suite):
    (task,) = load_suite(suite, tasks=["TinyCandidates"])
    worst, best = [], []
    for query, positives, negatives in zip(*CANDIDATES.values(), strict=True):
        scores = slow_bm25(query, positives + negatives)
        for values, sign in ((worst, 1), (best, -1)):  # of equal scores, which comes first is not defined
            order = sorted(range(len(scores)), key=lambda n: (-round(scores[n], 5), sign * (n < len(positives))))
            values.append(slow_average_precision([position < len(positives) for position in order]))
    assert np.mean(worst) - 1e-4 <= bm25_baseline(task) <= np.mean(best) + 1e-4


def test_bm25_needs_a_retrieval_task(suite):
    (task,) = load_suite(suite, tasks=["TinySts"])
    with pytest.raises(ConfigurationError, match="needs a retrieval task; TinySts is STS"):
        bm25_baseline(task)
