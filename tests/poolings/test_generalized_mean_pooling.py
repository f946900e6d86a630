"""Generalized mean: signed values, powers from 1 up, no overflow, gradients that stay finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.poolings.generalized_mean_pooling import GeneralizedMeanPooling
from tests.modules.token_batches import embed, padded

HUGE = torch.finfo(torch.float32).max


def pooling_with(powers: list[float], dimension: int, **options) -> GeneralizedMeanPooling:
    pooling = GeneralizedMeanPooling(dimension, num_groups=len(powers), readout_skip=False, **options)
    with torch.no_grad():
        pooling.excess.copy_(torch.tensor(powers) - 1)
    return pooling


def pool(pooling: GeneralizedMeanPooling, text: Tensor) -> Tensor:
    return embed(pooling, **padded([text], [1], len(text) + 2))[0]


def slow_pool(powers: list[float], rows: list[list[float]]) -> list[float]:
    """One feature at a time, in Python floats."""
    dimension = len(rows[0])
    pooled = []
    for feature in range(dimension):
        power = powers[feature * len(powers) // dimension]
        values = [row[feature] for row in rows]
        parts = [[max(value, 0.0) for value in values], [max(-value, 0.0) for value in values]]
        strong, weak = ((sum(x**power for x in part) / len(part)) ** (1 / power) for part in parts)
        pooled.append(strong - weak)
    return pooled


@pytest.mark.parametrize("powers", [[1.0], [3.0], [1.0, 2.0, 7.5], [1.5, 1.0, 4.0, 2.0, 9.0, 3.3]])
def test_embedding_is_the_formula(powers):
    text = torch.randn(5, 6)
    expected = torch.tensor(slow_pool(powers, text.double().tolist()))
    torch.testing.assert_close(pool(pooling_with(powers, 6), text).detach(), expected, rtol=1e-5, atol=1e-5)


def test_the_skip_adds_it_to_the_readout():
    pooling, text, readout = GeneralizedMeanPooling(6, power=2.0), torch.randn(5, 6), torch.randn(1, 6)
    torch.nn.init.normal_(pooling.to_embedding.weight)
    expected = torch.tensor(slow_pool([2.0], text.double().tolist()))
    expected = readout[0] + pooling.to_embedding.weight.detach() @ expected
    embedding = embed(pooling, **padded([text], [1], 7), readout=readout)[0]
    torch.testing.assert_close(embedding.detach(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=6))
def test_power_one_is_the_mean_and_has_its_gradient(values):
    text = torch.tensor(values).unsqueeze(1).requires_grad_()
    pooled = pool(pooling_with([1.0], 1), text)
    largest = max(abs(value) for value in values)
    torch.testing.assert_close(pooled.double(), text.double().mean(dim=0), rtol=0, atol=1e-6 * largest + 1e-38)
    pooled.sum().backward()
    if min(values) < 0 < max(values):  # at a tip, where all values of one sign are 0, there is no gradient to equal
        torch.testing.assert_close(text.grad, torch.full_like(text, 1 / len(values)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(-HUGE, HUGE, width=32)), min_size=1, max_size=6),
    st.floats(1, 1e6, width=32),
)
def test_nothing_overflows_and_every_gradient_is_finite(values, power):
    text = torch.tensor(values).unsqueeze(1).requires_grad_()
    pooling = pooling_with([power], 1)
    pooled = pool(pooling, text)
    assert pooled.abs().item() <= max(abs(value) for value in values)
    pooled.sum().backward()
    assert text.grad.isfinite().all()
    assert text.grad.abs().max() <= 1 + 1e-3  # at the smallest float, ratios of it round coarsely
    if text.detach().abs().max() < HUGE / 10:  # the true derivative may be a little larger than the values
        assert pooling.excess.grad.isfinite().all()


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0, 8.0])
def test_embedding_is_continuous_where_values_change_sign(power):
    pooling = pooling_with([power], 1)
    around = [pool(pooling, torch.tensor([[x], [-0.5], [0.25]])).item() for x in (-1e-6, 0.0, 1e-6)]
    assert around == pytest.approx([around[1]] * 3, abs=2e-6)
    cancelling = [pool(pooling, torch.tensor([[0.5 + x], [-0.5]])).item() for x in (-1e-6, 0.0, 1e-6)]
    assert cancelling == pytest.approx([0.0] * 3, abs=2e-6)


def test_gradients_are_those_of_float64_differences():
    torch.manual_seed(0)
    text = torch.randn(4, 3).requires_grad_()
    pooling = pooling_with([2.5], 3)
    pool(pooling, text).sum().backward()
    rows, step = text.detach().double().tolist(), 1e-6

    def total(power: float) -> float:
        return sum(slow_pool([power], rows))

    assert pooling.excess.grad.item() == pytest.approx((total(2.5 + step) - total(2.5 - step)) / (2 * step), abs=1e-4)
    for token in range(4):
        for feature in range(3):
            rows[token][feature] += step
            above = total(2.5)
            rows[token][feature] -= 2 * step
            below = total(2.5)
            rows[token][feature] += step
            assert text.grad[token, feature].item() == pytest.approx((above - below) / (2 * step), abs=1e-4)


def test_a_growing_power_leaves_the_strongest_of_each_sign():
    pooled = pool(pooling_with([1e6], 1), torch.tensor([[3.0], [-1.0], [2.0], [-7.0]]))
    assert pooled.item() == pytest.approx(3 - 7, abs=1e-4)


@pytest.mark.parametrize("start", [1.0, 1.001])
def test_a_power_never_falls_below_one_and_never_stays_there(start):
    pooling, text = GeneralizedMeanPooling(1, power=start, readout_skip=False), torch.tensor([[1.0], [3.0]])
    optimizer = torch.optim.SGD(pooling.parameters(), lr=0.05)
    for sign in (1, 1, 1, -1, -1, -1):  # first towards smaller embeddings, then towards larger ones
        optimizer.zero_grad()
        (sign * pool(pooling, text).sum()).backward()
        assert pooling.excess.grad.abs().item() > 0
        optimizer.step()
        assert pooling.powers.item() >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 0}, "num_groups=0 must be a positive integer"),
        ({"num_groups": 5}, r"num_groups=5 does not divide embedding_dimension=16; these do: \[1, 2, 4, 8, 16\]"),
        ({"power": 0.5}, "power=0.5 must be a number from 1 to"),
        ({"power": float("nan")}, "power=nan must be a number from 1 to"),
        ({"power": "3"}, "power='3' must be a number from 1 to"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        GeneralizedMeanPooling(16, **settings)
