"""Weights between a base and what was made of it."""

import pytest
import torch
from torch import nn

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training.interpolation import interpolate, merge_with_base


def linear(value: float) -> nn.Linear:
    model = nn.Linear(2, 3)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, -value)
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_merged_weight_is_the_weighted_mean_of_both(alpha):
    model, base = linear(5.0), linear(1.0)
    assert merge_with_base(model, base.state_dict(), [alpha], pytest.fail) == (alpha, {})
    expected = (1 - alpha) * 1.0 + alpha * 5.0
    torch.testing.assert_close(model.weight.data, torch.full((3, 2), expected))
    torch.testing.assert_close(model.bias.data, torch.full((3,), -expected))
    assert torch.equal(base.weight, torch.ones(3, 2))


def test_trained_weights_that_stay_are_neither_copied_nor_compared():
    """Nothing is asked of the base, which need not be in memory."""
    model = linear(5.0)
    places = [weight.data_ptr() for weight in model.parameters()]
    assert merge_with_base(model, {}, [1.0], pytest.fail) == (1.0, {})
    assert [weight.data_ptr() for weight in model.parameters()] == places
    assert torch.equal(model.weight, torch.full((3, 2), 5.0))


def test_half_precision_weights_are_merged_in_float32_and_the_trained_ones_stay_exact():
    base, tuned = torch.full((4,), 1.0).bfloat16(), torch.full((4,), 1.0078125).bfloat16()
    merged = interpolate(base, tuned, 0.5)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, torch.full((4,), 1.00390625).bfloat16())
    assert torch.equal(interpolate(base, tuned, 1.0), tuned)


def test_the_best_share_wins_and_of_equal_ones_that_nearest_the_base():
    model = linear(1.0)
    tried = []

    def score() -> float:
        tried.append(model.weight[0, 0].item())
        return {0.25: 0.5, 0.5: 0.9, 0.75: 0.9}[tried[-1]]

    assert merge_with_base(model, linear(0.0).state_dict(), [0.75, 0.25, 0.5], score)[0] == 0.5
    assert tried == [0.25, 0.5, 0.75]
    assert model.weight[0, 0] == 0.5


def test_a_base_of_other_shapes_or_names_is_refused():
    with pytest.raises(ConfigurationError, match=r"'weight' is \(3, 2\), and \(1, 2\) in its base"):
        merge_with_base(nn.Linear(2, 3), nn.Linear(2, 1).state_dict(), [0.5], pytest.fail)
    with pytest.raises(ConfigurationError, match="nothing to merge"):
        merge_with_base(nn.Linear(2, 3), {"other": torch.ones(1)}, [0.5], pytest.fail)
