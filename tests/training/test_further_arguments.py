"""Arguments of the trainer pass through a recipe by their own names; old names are refused with the new one."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training import Recipe, train
from st_llmpool.training.further_arguments import MANAGED, check_reports
from st_llmpool.training.recipe import TrainingSettings, with_earlier_names
from st_llmpool.utils.extras import MissingExtraError

MINIMAL = {"output_dir": "run", "model": {"base": "builtin"}, "data": [{"source": "pairs.jsonl"}]}


def test_further_arguments_stand_among_the_others_and_come_back_from_a_file(tmp_path):
    recipe = Recipe.from_dict(MINIMAL, ["training.adam_beta2=0.95", "training.lr_scheduler_kwargs={num_cycles: 2}"])
    assert recipe.training.arguments == {"adam_beta2": 0.95, "lr_scheduler_kwargs": {"num_cycles": 2}}
    assert recipe.to_dict()["training"]["adam_beta2"] == 0.95
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.steps=5", r"^training\.steps is now training\.max_steps\.$"),
        ("training.epochs=5", r"^training\.epochs is now training\.num_train_epochs\.$"),
        ("training.schedule=cosine", r"training\.schedule is now training\.lr_scheduler_type"),
        ("training.optimizer=lamb", r"training\.optimizer is now training\.optim"),
        ("training.workers=1", r"training\.workers is now training\.dataloader_num_workers"),
        ("training.keep_checkpoints=1", r"training\.keep_checkpoints is now training\.save_total_limit"),
        ("training.no_duplicates=true", r"training\.no_duplicates is now training\.batch_sampler"),
        ("evaluation.steps=1", r"evaluation\.steps is now evaluation\.eval_steps"),
        ("evaluation.at_start=true", r"evaluation\.at_start is now evaluation\.eval_on_start"),
        ("evaluation.keep_best=true", r"evaluation\.keep_best is now evaluation\.load_best_model_at_end"),
        ("training.seed=1", r"training\.seed is not for a recipe: set seed at the top of the recipe"),
        (
            "training.per_device_train_batch_size=8",
            r"per_device_train_batch_size .* set training\.batch_size",
        ),
        ("training.max_stps=8", r"training\.max_stps is not a key here\. Did you mean 'max_steps'"),
        ("training.adam_beta3=8", r"training\.adam_beta3 is not a key here\. Did you mean 'adam_beta"),
        ("training.adam_beta2=much", r"training\.adam_beta2='much' must be of type float"),
        ("training.torch_compile=no", r"torch_compile=False|torch_compile"),
        ("training.arguments={adam_beta2: 0.9}", r"training\.arguments is not a key here"),
        ("training.gradient_accumulation_steps=0", r"gradient_accumulation_steps=0 must be at least 1"),
    ],
)
def test_a_wrong_name_or_value_is_refused_with_the_right_one(assignment, message):
    if assignment.endswith("torch_compile=no"):  # YAML 1.1 reads no as false, which is what a user means
        assert Recipe.from_dict(MINIMAL, [assignment]).training.arguments == {"torch_compile": False}
        return
    with pytest.raises(ConfigurationError, match=message):
        Recipe.from_dict(MINIMAL, [assignment])


def test_every_argument_of_the_trainer_is_a_field_or_passes_through_or_is_refused_with_a_reason():
    names = {field.name for field in dataclasses.fields(SentenceTransformerTrainingArguments)}
    own = {field.name for field in dataclasses.fields(TrainingSettings)}
    assert set(MANAGED) <= names
    assert not own & set(MANAGED)


def test_further_arguments_and_accumulation_reach_the_trainer(make_recipe):
    seen = {}

    class Look:
        def __getattr__(self, name):
            if name == "on_step_end":
                return lambda args, state, control, **kwargs: seen.update(vars(args), steps=state.global_step)
            if name.startswith("on_"):
                return lambda *args, **kwargs: None
            raise AttributeError(name)

    recipe = make_recipe({"training": {"max_steps": 2, "gradient_accumulation_steps": 3, "adam_beta2": 0.9}})
    report = train(recipe, callbacks=[Look()]).report
    assert (seen["adam_beta2"], seen["gradient_accumulation_steps"], seen["steps"]) == (0.9, 3, 2)
    assert report["steps"] == 2


@pytest.mark.parametrize("name", [*INTEGRATION_TO_CALLBACK, ["none", "wandb"]])
def test_every_integration_of_transformers_is_known_and_a_missing_package_is_one_line(name, monkeypatch):
    utils = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(utils, lambda: [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        (ConfigurationError, MissingExtraError),
        match=r"needs a package that is not installed: pip install \S+.*, or set|needs tensorboard: pip install",
    ):
        check_reports(name)
    monkeypatch.setattr(utils, lambda: [name] if isinstance(name, str) else name)
    check_reports(name)
    with pytest.raises(ConfigurationError, match=r"unknown.*Did you mean 'wandb'"):
        check_reports("wanbd")


def test_a_run_with_an_old_recipe_is_resumed_after_its_names_are_changed(make_recipe):
    recipe = make_recipe()
    train(recipe)
    file = train(recipe, resume=True).model_dir.parent / "recipe.yaml"
    file.write_text(file.read_text().replace("max_steps:", "steps:", 1))
    with pytest.raises(ConfigurationError, match=r"recipe\.yaml cannot be resumed: training\.steps is now"):
        train(recipe, resume=True)


def test_earlier_names_are_those_that_keys_of_earlier_studies_were_made_from():
    values = {
        "training": {"max_steps": 40, "optim": "lamb", "batch_size": 8},
        "evaluation": {"eval_on_start": True},
        "stages": [{"kind": "mntp", "training": {"max_steps": 20, "lr_scheduler_type": "cosine"}}],
    }
    assert with_earlier_names(values) == {
        "training": {"steps": 40, "optimizer": "lamb", "batch_size": 8},
        "evaluation": {"at_start": True},
        "stages": [{"kind": "mntp", "training": {"steps": 20, "schedule": "cosine"}}],
    }
