"""A cheap evaluation on held-out pairs: can each query find its positive among all of their texts?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

if TYPE_CHECKING:
    from datasets import Dataset


def held_out_evaluator(
    name: str, pairs: Dataset, *, query_prompt: str | None, batch_size: int, truncate_dim: int | None = None
) -> InformationRetrievalEvaluator:
    """Return an evaluator over all positives and negatives of `pairs`; equal texts count once.

    Args:
        name: Prefix of the metrics, as in ``pairs_cosine_ndcg@10``.
        pairs: Columns ``query``, ``positive`` and any negatives.
        query_prompt: Put before every query.
        batch_size: Batch size.
        truncate_dim: Truncate embeddings to this many dimensions; None keeps the model's own size.
    """
    columns = [pairs[column] for column in pairs.column_names if column != "query"]
    corpus = _number("d", (text for texts in columns for text in texts))
    queries = _number("q", pairs["query"])
    relevant: dict[str, set[str]] = {}
    for query, positive in zip(pairs["query"], pairs["positive"], strict=True):
        relevant.setdefault(queries[query], set()).add(corpus[positive])
    return InformationRetrievalEvaluator(
        queries=_by_id(queries),
        corpus=_by_id(corpus),
        relevant_docs=relevant,
        query_prompt=query_prompt,
        batch_size=batch_size,
        truncate_dim=truncate_dim,
        name=name,
        accuracy_at_k=[1],
        precision_recall_at_k=[10],
        mrr_at_k=[10],
        ndcg_at_k=[10],
        map_at_k=[100],
        write_csv=False,
    )


def _number(prefix: str, texts: Iterable[str]) -> dict[str, str]:
    return {text: f"{prefix}{place}" for place, text in enumerate(dict.fromkeys(texts))}


def _by_id(ids: Mapping[str, str]) -> dict[str, Any]:
    return {number: text for text, number in ids.items()}
