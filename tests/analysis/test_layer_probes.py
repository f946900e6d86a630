from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr

from st_llmpool.analysis.layer_probes import Probes, sample_probes, search_score, similarity_score
from st_llmpool.modules.errors import DataError


def test_search_score_of_one_answer_is_the_discount_of_its_rank():
    documents = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    queries = torch.tensor([[0.7, 0.7], [0.6, 0.8]])  # to the first the second document is nearest, then both others
    assert search_score(queries, documents) == pytest.approx((1 / math.log2(4) + 1) / 2)
    far = torch.cat([torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 0.0]]).repeat(10, 1)])
    assert search_score(torch.tensor([[1.0, 0.0]]), far) == 0


def test_similarity_score_is_spearman_of_cosines():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(8, 3, generator=generator) for _ in range(2))
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(first, second, strict=True)]
    scores = [3.0, 1.0, 2.0, 5.0, 4.0, 0.0, 1.5, 2.5]
    assert similarity_score(first, second, scores) == pytest.approx(spearmanr(cosines, scores).statistic)
    assert math.isnan(similarity_score(torch.ones(3, 2), torch.ones(3, 2), [1.0, 2.0, 3.0]))


def test_fewer_documents_than_queries_are_refused():
    with pytest.raises(DataError, match="a document for each query"):
        Probes(sample_probes().pairs, ("a", "b"), ("a",))
