"""A cheap evaluation on held-out pairs: can each query find its positive among all of their texts?"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

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
    corpus = {f"d{place}": text for place, text in enumerate(dict.fromkeys(chain(*columns)))}
    queries = {f"q{place}": text for place, text in enumerate(dict.fromkeys(pairs["query"]))}
    ids = [{text: name for name, text in texts.items()} for texts in (queries, corpus)]
    relevant: dict[str, set[str]] = {}
    for query, positive in zip(pairs["query"], pairs["positive"], strict=True):
        relevant.setdefault(ids[0][query], set()).add(ids[1][positive])
    return InformationRetrievalEvaluator(
        queries=queries,
        corpus=corpus,
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
