"""Probes of single layers: small built-in sets of texts, and two scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize

from ..modules.errors import DataError

#: A text, a paraphrase, and another text of the same topic on each line.
_TRIPLES = Path(__file__).with_name("probes.tsv")


@dataclass(frozen=True)
class Probes:
    """Texts that single layers are scored on.

    Args:
        pairs: First text, second text, human similarity score.
        queries: Queries.
        documents: Document i answers query i; further documents answer none.
    """

    pairs: tuple[tuple[str, str, float], ...]
    queries: tuple[str, ...]
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.pairs) < 2 or not 0 < len(self.queries) <= len(self.documents):
            raise DataError(
                f"{len(self.pairs)} pairs, {len(self.queries)} queries, {len(self.documents)} documents: give at least "
                f"two pairs, one query and a document for each query."
            )

    @property
    def texts(self) -> list[str]:
        """All distinct texts."""
        pairs = [text for first, second, _ in self.pairs for text in (first, second)]
        return list(dict.fromkeys([*pairs, *self.queries, *self.documents]))


def sample_probes() -> Probes:
    """Return the built-in probes, 36 pairs and 12 queries in 24 documents; they show large differences only."""
    rows = [line.split("\t") for line in _TRIPLES.read_text(encoding="utf-8").splitlines()]
    firsts, same, others = (tuple(texts) for texts in zip(*rows, strict=True))
    unrelated = same[1:] + same[:1]
    pairs = [(text, second, 2.0) for text, second in zip(firsts, same, strict=True)]
    pairs += [(text, second, 1.0) for text, second in zip(firsts, others, strict=True)]
    pairs += [(text, second, 0.0) for text, second in zip(firsts, unrelated, strict=True)]
    return Probes(tuple(pairs), firsts, same + others)


def similarity_score(first: Tensor, second: Tensor, scores: Sequence[float]) -> float:
    """Return Spearman's correlation of cosine similarities of (B, D) and (B, D) with scores; NaN if undefined."""
    cosines = (normalize(first.double(), dim=-1) * normalize(second.double(), dim=-1)).sum(dim=-1)
    if cosines.max() == cosines.min():
        return float("nan")
    return float(spearmanr(cosines.numpy(), scores).statistic)


def search_score(queries: Tensor, documents: Tensor) -> float:
    """Return nDCG@10 by cosine, mean over queries (Q, D), where document i of (N, D) is the only answer of query i.

    With one answer nDCG is 1 / log2(1 + rank); the answer ranks last among ties.
    """
    cosines = normalize(queries.double(), dim=-1) @ normalize(documents.double(), dim=-1).T
    ranks = (cosines >= cosines.diagonal().unsqueeze(-1)).sum(dim=-1)
    return float(torch.where(ranks <= 10, 1 / torch.log2(1.0 + ranks), 0.0).mean())
