"""Hopfield pooling: the equation of the paper, step by step, and what its steps mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.poolings.hopfield_pooling import HopfieldPooling
from tests.modules.token_batches import embed, padded


def trained_pooling(**settings) -> HopfieldPooling:
    torch.manual_seed(0)
    pooling = HopfieldPooling(6, num_patterns=3, num_heads=2, head_dim=4, **settings)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return pooling


def normalised(row: list[float], weight: list[float], bias: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + 1e-5)
    return [(x - mean) / deviation * w + b for x, w, b in zip(row, weight, bias, strict=True)]


def times(matrix: list[list[float]], row: list[float]) -> list[float]:
    return [sum(w * x for w, x in zip(line, row, strict=True)) for line in matrix]


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def mix(weights: list[float], rows: list[list[float]]) -> list[float]:
    return [sum(w * row[d] for w, row in zip(weights, rows, strict=True)) for d in range(len(rows[0]))]


def slow_pool(pooling: HopfieldPooling, text: Tensor) -> tuple[list[float], int]:
    """One pattern and head at a time, in Python floats; also counts the softmaxes of one pattern and head."""
    own = {name: tensor.double().tolist() for name, tensor in pooling.state_dict().items()}
    stored = [normalised(row, own["norm_stored.weight"], own["norm_stored.bias"]) for row in text.tolist()]
    size, inner = pooling.head_dim, pooling.num_heads * pooling.head_dim
    retrieved = []
    for pattern in own["state_patterns"]:
        query = times(own["to_query.weight"], normalised(pattern, own["norm_states.weight"], own["norm_states.bias"]))
        output = []
        for head in range(pooling.num_heads):
            part = slice(head * size, (head + 1) * size)
            keys = [times(own["to_key_value.weight"][:inner], row)[part] for row in stored]
            values = [times(own["to_key_value.weight"][inner:], row)[part] for row in stored]
            state, softmaxes = query[part], 0
            for step in range(pooling.update_steps + 1):
                weights = softmax([pooling.beta * score for score in times(keys, state)])
                softmaxes += 1
                if step < pooling.update_steps:
                    state = mix(weights, keys)
            output += mix(weights, values)
        retrieved.append(times(own["to_embedding.weight"], output))
    return [sum(column) / len(retrieved) for column in zip(*retrieved, strict=True)], softmaxes


@pytest.mark.parametrize("update_steps", [0, 1, 4])
@pytest.mark.parametrize("beta", [None, 2.5])
@pytest.mark.parametrize("readout_skip", [True, False])
def test_embedding_is_the_formula(update_steps, beta, readout_skip):
    pooling = trained_pooling(update_steps=update_steps, beta=beta, readout_skip=readout_skip)
    text, readout = torch.randn(5, 6), torch.randn(1, 6)
    expected, softmaxes = slow_pool(pooling, text)
    assert softmaxes == update_steps + 1
    expected = torch.tensor(expected) + (readout[0] if readout_skip else 0)
    embedding = embed(pooling, **padded([text], [2], 9), readout=readout)[0]
    torch.testing.assert_close(embedding.detach(), expected, rtol=1e-5, atol=1e-5)


def test_no_update_is_attention():
    pooling = trained_pooling(readout_skip=False)
    text = torch.randn(5, 6)
    stored = pooling.to_key_value(pooling.norm_stored(text)).unflatten(1, (2, 2, 4)).permute(1, 2, 0, 3)
    queries = pooling.to_query(pooling.norm_states(pooling.state_patterns)).unflatten(1, (2, 4)).transpose(0, 1)
    attention = torch.nn.functional.scaled_dot_product_attention(queries, stored[0], stored[1])
    expected = pooling.to_embedding(attention.mean(dim=1).flatten())
    torch.testing.assert_close(embed(pooling, **padded([text], [0], 5))[0], expected, rtol=1e-5, atol=1e-5)


def test_many_sharp_updates_settle_on_one_stored_pattern():
    pooling = trained_pooling(update_steps=50, beta=1000.0, readout_skip=False)
    text = torch.randn(5, 6)
    values = pooling.to_key_value(pooling.norm_stored(text))[:, 8:].unflatten(1, (2, 4))
    retrieved = pooling.pool_set(text[None], torch.ones(1, 5, dtype=torch.bool)).unflatten(1, (2, 4))[0]
    for head in range(2):  # the mean over the 3 patterns of values that they settled on
        means = torch.cartesian_prod(*[torch.arange(5)] * 3)
        nearest = (values[means, head].mean(dim=1) - retrieved[head]).norm(dim=1).min()
        assert nearest < 1e-4


def test_beta_is_saved_as_it_works():
    assert HopfieldPooling(64).get_config_dict()["beta"] == pytest.approx(8**-0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_patterns": 0}, "num_patterns=0 must be a positive integer"),
        ({"head_dim": 1.5}, "head_dim=1.5 must be a positive integer"),
        ({"update_steps": -1}, "update_steps=-1 must be an integer from 0"),
        ({"update_steps": 1.0}, "update_steps=1.0 must be an integer from 0"),
        ({"beta": 0}, "beta=0 must be a number"),
        ({"beta": float("inf")}, "beta=inf must be a number"),
        ({"beta": "1"}, "beta='1' must be a number"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        HopfieldPooling(16, **settings)
