"""Deterministic subsampling of a task's data, for short evaluations.

The choice is by hashes of the content, so it is the same on every machine and changes little when the data grow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ..modules.errors import DataError

T = TypeVar("T")


def sample(keys: Sequence[str], limit: int | None) -> list[int]:
    """Return the positions of at most `limit` keys, in order; all if `limit` is None."""
    if limit is None or limit >= len(keys):
        return list(range(len(keys)))
    return sorted(_by_hash(keys)[:limit])


def select_rows(table: Mapping[str, Sequence[T]], rows: Sequence[int]) -> dict[str, list[T]]:
    """Return some rows of a table of columns."""
    return {name: [column[row] for row in rows] for name, column in table.items()}


def sample_retrieval(
    queries: Sequence[str], documents: Sequence[str], relevant: Mapping[str, Mapping[str, int]], limit: int | None
) -> tuple[set[str], set[str]]:
    """Return the ids of at most `limit` queries and at most `limit` documents; grades above 0 are relevant.

    Every kept query keeps all its relevant documents; other documents fill the rest.
    """
    if limit is None:
        return set(queries), set(documents)
    kept_queries: set[str] = set()
    kept_documents: set[str] = set()
    for position in _by_hash(queries):
        answers = {document for document, grade in relevant.get(queries[position], {}).items() if grade > 0}
        if answers and len(kept_documents | answers) <= limit:
            kept_queries.add(queries[position])
            kept_documents |= answers
        if len(kept_queries) == limit:
            break
    if not kept_queries:
        raise DataError(f"limit={limit} is too small: no query has so few relevant documents. Raise it.")
    for position in _by_hash(documents):
        if len(kept_documents) >= limit:
            break
        kept_documents.add(documents[position])
    return kept_queries, kept_documents


def _by_hash(keys: Sequence[str]) -> list[int]:
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    return sorted(range(len(keys)), key=digests.__getitem__)
