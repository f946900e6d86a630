"""Which layers train, that the others do not, and that a resumed run draws what an unbroken one does."""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from st_llmpool import build_embedder
from st_llmpool.modules.attention import decoder_layers
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training import Recipe, train
from st_llmpool.training.recipe import SparseTuningSettings
from st_llmpool.training.sparse_tuning import SparseTuning, updated_importance

SETTINGS = SparseTuningSettings(layers=2, interval=2, trials=4)


@pytest.fixture(scope="module")
def model(tiny_llm):
    model = build_embedder(tiny_llm, peft_config={"r": 2, "lora_alpha": 2, "lora_dropout": 0.5})
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


class SumOfEmbedding(nn.Module):
    """A loss that a slow reference can have for any set of adapters."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features, labels):
        return sum(self.model(dict(column))["sentence_embedding"].sum(dim=1).mean() for column in features) + labels


def callback(model, seed=0, settings=SETTINGS):
    for place in range(4):
        for weight in adapter_weights(model, place):
            weight.requires_grad_(True)
    return SparseTuning(settings, model, SumOfEmbedding(model), seed=seed)


def adapter_weights(model, place):
    return [p for name, p in decoder_layers(model[0].model)[place].named_parameters() if "lora_" in name]


def state(step, saved=None):
    return SimpleNamespace(global_step=step, stateful_callbacks=saved or {})


def run_interval(model, sparse, features, labels, first_step=0):
    """What the trainer does between two draws, without an optimizer."""
    for step in range(first_step, first_step + 2):
        sparse.on_step_begin(None, state(step), None)
        model.zero_grad()
        sparse._loss(features, labels).backward()
        sparse.on_step_end(None, state(step + 1), None)


def test_only_the_drawn_layers_get_a_gradient(model):
    sparse = callback(model)
    sparse.on_step_begin(None, state(0), None)
    model.train()
    model.zero_grad()
    SumOfEmbedding(model)([model[0].preprocess(["the quick fox"])], 0.0).backward()
    drawn = sparse.draw(0)
    assert len(drawn) == 2
    for place in range(4):
        assert {weight.grad is not None for weight in adapter_weights(model, place)} == {place in drawn}
    assert all(parameter.grad is not None for parameter in model[1].parameters() if parameter.requires_grad)
    sparse.on_train_end(None, None, None)
    assert all(weight.requires_grad for place in range(4) for weight in adapter_weights(model, place))


def test_draws_differ_by_step_and_seed_and_leave_other_random_numbers_alone(model):
    before = torch.get_rng_state()
    draws = {(seed, step): callback(model, seed).draw(step) for seed in (0, 1) for step in range(0, 20, 2)}
    assert torch.equal(torch.get_rng_state(), before)
    for seed in (0, 1):
        assert len({tuple(draws[seed, step]) for step in range(0, 20, 2)}) > 2
    assert [draws[0, step] for step in range(0, 20, 2)] != [draws[1, step] for step in range(0, 20, 2)]
    assert callback(model, 1).draw(4) == draws[1, 4]


def test_layers_are_drawn_by_the_sigmoid_of_their_importance(model):
    sparse = callback(model, settings=SparseTuningSettings(layers=1))
    sparse.importance = np.array([-1.0, 0.0, 1.0, 2.0])
    counts = np.bincount([sparse.draw(step)[0] for step in range(3000)], minlength=4)
    odds = np.array([1 / (1 + math.exp(-value)) for value in sparse.importance])
    assert stats.chisquare(counts, 3000 * odds / odds.sum()).pvalue > 1e-3


def test_importance_follows_the_loss_without_the_weakened_adapters(model):
    """The same by switching the adapters' own weights, one trial at a time."""
    sparse = callback(model)
    sparse.importance = np.array([0.5, -0.2, 0.0, 0.3])
    features, before = [model[0].preprocess(["the quick fox", "lazy dogs"])], sparse.importance.copy()
    model.train()
    generator = np.random.default_rng([0, 2, 1])
    odds = np.array([1 / (1 + math.exp(value)) for value in before])
    sets = [generator.choice(4, size=2, replace=False, p=odds / odds.sum()) for _ in range(4)]
    rewards = []
    model.eval()
    for weakened in sets:
        halves = [w for place in weakened for w in adapter_weights(model, place)]
        kept = [weight.detach().clone() for weight in halves]
        with torch.no_grad():
            for weight in halves:
                weight.mul_(math.sqrt(0.25))  # A and B each, so their product by a quarter
            rewards.append(math.exp(-SumOfEmbedding(model)(features, 0.7).item()))
            for weight, value in zip(halves, kept, strict=True):
                weight.copy_(value)
    assert max(rewards) - min(rewards) > 1e-3
    model.train()
    run_interval(model, sparse, features, 0.7)
    expected = before.copy()
    for place in range(4):
        share = 1 / (1 + math.exp(-before[place]))
        for weakened, reward in zip(sets, rewards, strict=True):
            if place in weakened:
                expected[place] -= 10 * share * (1 - share) * (reward - sum(rewards) / 4)
    np.testing.assert_allclose(sparse.importance, expected, atol=1e-5)
    assert not np.allclose(sparse.importance, before, atol=1e-3)
    assert model.training
    assert {s for m in model.modules() if hasattr(m, "lora_A") for s in m.scaling.values()} == {1.0}


def test_a_layer_whose_loss_is_missed_gains_importance():
    updated = updated_importance(np.zeros(3), [[0, 1], [1, 2]], rewards=[0.2, 0.8], rate=10)
    assert updated[0] > 0 > updated[2]
    assert updated[1] == pytest.approx(0)


def test_more_layers_than_have_an_adapter_is_an_error(model):
    with pytest.raises(ConfigurationError, match="layers=5 is more than the 4 layers"):
        callback(model, settings=SparseTuningSettings(layers=5))


def test_a_resumed_run_has_the_losses_of_one_that_was_never_stopped(make_recipe, tmp_path):
    """Killed between two draws, so the interval's layer is drawn again; it would be another one without importance."""
    recipe = make_recipe(
        {
            "model": {"lora": {"r": 4, "lora_dropout": 0.2}},
            "training": {
                "max_steps": 6,
                "save_steps": 3,
                "learning_rate": 0.03,
                "sparse_tuning": {"layers": 1, "interval": 2, "importance_rate": 1e4},
            },
        }
    )
    expected = train(recipe)
    (tmp_path / "resumed" / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "run/checkpoints/checkpoint-3", tmp_path / "resumed/checkpoints/checkpoint-3")
    shutil.copy(tmp_path / "run/recipe.yaml", tmp_path / "resumed")
    resumed = train(Recipe.from_dict(recipe.to_dict(), [f"output_dir={tmp_path / 'resumed'}"]), resume=True)
    assert resumed.report["losses"] == expected.report["losses"]
    theirs = dict(expected.model.named_parameters())
    for name, tensor in resumed.model.named_parameters():
        assert torch.equal(tensor, theirs[name]), name
    assert resumed.report["trained_parameters"] == sum(p.numel() for n, p in theirs.items() if p.requires_grad)
