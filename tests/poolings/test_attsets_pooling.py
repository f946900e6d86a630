"""AttSets: one softmax over the vectors for each feature."""

from __future__ import annotations

import math

import pytest
import torch

from st_llmpool.poolings.attsets_pooling import AttSetsPooling
from tests.modules.token_batches import embed, padded


def trained_pooling(**settings) -> AttSetsPooling:
    torch.manual_seed(0)
    pooling = AttSetsPooling(4, **settings)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(torch.randn_like(parameter))
    return pooling


def slow_pool(pooling: AttSetsPooling, rows: list[list[float]]) -> list[float]:
    """One feature at a time, in Python floats."""
    matrix = pooling.to_scores.weight.double().tolist()
    pooled = []
    for feature in range(len(rows[0])):
        powers = [math.exp(sum(w * x for w, x in zip(matrix[feature], row, strict=True))) for row in rows]
        pooled.append(sum(p * row[feature] for p, row in zip(powers, rows, strict=True)) / sum(powers))
    return pooled


@pytest.mark.parametrize("readout_skip", [True, False])
def test_embedding_is_the_formula(readout_skip):
    pooling, text, readout = trained_pooling(readout_skip=readout_skip), torch.randn(5, 4), torch.randn(1, 4)
    expected = torch.tensor(slow_pool(pooling, text.double().tolist()))
    if readout_skip:
        expected = readout[0] + pooling.to_embedding.weight.detach() @ expected
    embedding = embed(pooling, **padded([text], [2], 9), readout=readout)[0]
    torch.testing.assert_close(embedding.detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_large_score_of_one_feature_picks_its_token_for_that_feature_alone():
    pooling, text = AttSetsPooling(2, readout_skip=False), torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 60.0]])
    with torch.no_grad():
        pooling.to_scores.weight[0, 0] = 1000.0
    torch.testing.assert_close(embed(pooling, **padded([text], [1], 5)).detach(), torch.tensor([[3.0, 30.0]]))
