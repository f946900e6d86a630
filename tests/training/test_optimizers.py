"""LAMB against the paper's algorithm, number by number."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training import AdaptRecipe, Recipe, adapt, train
from st_llmpool.training import run as run_file
from st_llmpool.training.mntp import adaptation
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


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"lr_scheduler_type": "polynomial", "warmup_steps": 2},
            r"^training\.warmup_steps=2 of 2 steps with training\.lr_scheduler_type=polynomial cannot .*by zero",
        ),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1}}, r"must be smaller than initial lr"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}}, r"polynomial cannot be used"),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}}, r"inverse_sqrt.*division"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, r"warmup_stable_decay.*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"cosine_with_min_lr.*min_lr_rate"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, r"cosine.*'cycles'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, r"requires an eval strategy"),
        ({"adam_beta1": 1.5}, r"^training\.optim=adamw_torch cannot .*Invalid beta parameter at index 0: 1\.5"),
        ({"adam_epsilon": -1}, r"Invalid epsilon value"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, r"training\.optim=sgd.*Invalid momentum value: -1"),
        ({"optim": "galore_adamw"}, r"training\.optim=galore_adamw.*galore_torch"),
        ({"optim": "lomo"}, r"training\.optim=lomo.*lomo_optim"),
    ],
)
def test_what_an_optimizer_or_a_schedule_refuses_is_refused_before_weights_are_loaded(
    make_recipe, tiny_lm, words_file, tmp_path, monkeypatch, training, message
):
    monkeypatch.setattr(run_file, "build_embedder", None)
    monkeypatch.setattr(adaptation, "load_language_model", None)
    with pytest.raises(ConfigurationError, match=message):
        train(make_recipe({"training": training}))
    values = {"output_dir": str(tmp_path / "adapted"), "base": tiny_lm, "texts": [{"source": words_file}]}
    training = {"max_steps": 2, "warmup_steps": 0} | training
    with pytest.raises(ConfigurationError, match=message):
        adapt(AdaptRecipe.from_dict({**values, "training": training}))


def test_a_schedule_that_follows_a_loss_is_refused_since_evaluations_measure_rankings(make_recipe, pairs):
    evaluation = {"data": [{"source": pairs}], "eval_steps": 1}
    for name in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(ConfigurationError, match=rf"{name} cannot be used.*Use linear"):
            train(make_recipe({"evaluation": evaluation, "training": {"lr_scheduler_type": name}}))


def test_the_steps_that_a_schedule_is_followed_over_are_those_that_epochs_give(make_recipe):
    """12 rows in batches of 4, two to a step, are 2 steps an epoch."""
    epochs = {"max_steps": None, "num_train_epochs": 1.5, "gradient_accumulation_steps": 2, "warmup_steps": 3}
    recipe = make_recipe({"training": epochs | {"lr_scheduler_type": "polynomial"}})
    with pytest.raises(ConfigurationError, match=r"warmup_steps=3 of 3 steps"):
        train(recipe)
    assert train(Recipe.from_dict(recipe.to_dict(), ["training.lr_scheduler_type=linear"])).report["steps"] == 3
