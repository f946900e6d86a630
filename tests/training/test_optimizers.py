"""LAMB against the paper's algorithm, number by number."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from st_llmpool.training.optimizers import check_optimizer, lamb
from st_llmpool.utils.extras import MissingExtraError

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-6


def algorithm(values, gradients, *, rate, decay, is_corrected):
    """Algorithm 2 of arXiv 1904.00962 for one tensor, in Python floats; `is_corrected` as in its last version."""
    x, m, v = list(values), [0.0] * len(values), [0.0] * len(values)
    for step, gradient in enumerate(gradients, start=1):
        m = [BETA1 * a + (1 - BETA1) * g for a, g in zip(m, gradient, strict=True)]
        v = [BETA2 * a + (1 - BETA2) * g * g for a, g in zip(v, gradient, strict=True)]
        by_m, by_v = (1 - BETA1**step, 1 - BETA2**step) if is_corrected else (1.0, 1.0)
        ratios = [(a / by_m) / (math.sqrt(b / by_v) + EPSILON) for a, b in zip(m, v, strict=True)]
        update = [r + decay * a for r, a in zip(ratios, x, strict=True)]
        trust = math.hypot(*x) / math.hypot(*update) if any(x) and any(update) else 1.0
        x = [a - rate * trust * u for a, u in zip(x, update, strict=True)]
    return x


def steps_of(values, gradients, *, rate, decay=0.0, **options):
    parameter = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
    optimizer = lamb()([{"params": [parameter], "weight_decay": decay}], lr=rate)
    optimizer.param_groups[0].update(options)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return parameter.tolist()


GRADIENTS = [[0.3, -2.0, 0.01], [0.1, 0.5, -0.02], [-1.0, 0.2, 0.03]]


@pytest.fixture(autouse=True)
def installed():
    pytest.importorskip("pytorch_optimizer")


@pytest.mark.parametrize("foreach", [False, None])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("start", [[1.0, -2.0, 0.5], [30.0, 40.0, 0.0], [0.0, 0.0, 0.0]])
def test_the_step_is_the_papers(start, decay, foreach):
    expected = algorithm(start, GRADIENTS, rate=0.1, decay=decay, is_corrected=False)
    assert steps_of(start, GRADIENTS, rate=0.1, decay=decay, foreach=foreach) == pytest.approx(expected, rel=2e-6)


def test_without_decay_it_is_the_papers_last_version_too():
    start, large = [1.0, -2.0, 0.5], [[100 * value for value in gradient] for gradient in GRADIENTS]  # against epsilon
    expected = algorithm(start, large, rate=0.1, decay=0.0, is_corrected=True)
    assert steps_of(start, large, rate=0.1) == pytest.approx(expected, rel=1e-4)


def test_each_group_has_its_own_learning_rate():
    first, second = (torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    optimizer = lamb()([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.1)
    first.grad, second.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    moved = [(torch.tensor([3.0, 4.0]) - parameter).norm().item() for parameter in (first, second)]
    assert moved == pytest.approx([0.5, 2.5], rel=1e-5)


@pytest.mark.parametrize(("name", "package"), [("lamb", "lamb"), ("paged_adamw_8bit", "train")])
def test_an_optimizer_that_is_not_installed_says_what_to_install(name, package, monkeypatch):
    check_optimizer(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf'pip install "st-llmpool\[{package}\]"'):
        check_optimizer(name)
    check_optimizer("adamw_torch")
