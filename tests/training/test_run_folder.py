"""What a run's folder lets in: one run, one process at a time, resumed where it stopped."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from transformers import TrainerCallback

from st_llmpool.model_card.identity import fingerprint
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training import Recipe, train
from st_llmpool.training.checkpoints import seal_checkpoint
from st_llmpool.training.mntp.adaptation import adapt

from .mntp.test_adaptation import make as make_adaptation
from .test_run import assert_same_weights, changed_output


class At(TrainerCallback):
    """Calls `action` at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def fail():
    raise KeyboardInterrupt


@pytest.mark.parametrize("stages", [[], [{"kind": "mntp"}]])
def test_a_first_start_without_a_checkpoint_gives_way_to_a_corrected_recipe(make_recipe, make_lm, words_file, stages):
    base = make_lm()
    stages = [{**stage, "texts": [{"source": words_file}], "training": {"max_steps": 1}} for stage in stages]
    recipe = make_recipe({"stages": stages, "model": {"base": base}})
    corrected = Recipe.from_dict(recipe.to_dict(), ["training.learning_rate=1e-3"])
    folder = Path(recipe.output_dir)
    if stages:
        (folder / "stages/1-mntp").mkdir(parents=True)
        recipe.to_yaml(folder / "recipe.yaml")
        (folder / "stages/1-mntp/recipe.yaml").write_text("base: another\n")
    else:
        with pytest.raises(KeyboardInterrupt):
            train(recipe, callbacks=[At(1, fail)])
    assert (folder / "recipe.yaml").is_file()
    result = train(corrected)
    assert Recipe.from_yaml(folder / "recipe.yaml") == corrected
    assert result.report["learning_rates"][0][1] == 1e-3


def test_a_run_with_a_checkpoint_does_not(make_recipe):
    recipe = make_recipe({"training": {"save_steps": 1}})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[At(2, fail)])
    with pytest.raises(ConfigurationError, match="already holds a run"):
        train(recipe)
    with pytest.raises(ConfigurationError, match="seed changed"):
        train(Recipe.from_dict(recipe.to_dict(), ["seed=7"]), resume=True)
    assert train(recipe, resume=True).report["steps"] == 2


def test_a_run_is_not_resumed_on_other_rows(make_recipe, tmp_path, write_pairs):
    file = Path(write_pairs(tmp_path / "mine.jsonl", rows=12))
    recipe = make_recipe({"data": [{"source": str(file)}], "training": {"save_steps": 1}})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[At(2, fail)])
    texts = file.read_text()
    file.write_text(texts.replace("fox", "cat"))
    with pytest.raises(ConfigurationError, match=r"on other data: mine \(12 rows then, 12 different ones now\)"):
        train(recipe, resume=True)
    file.write_text(texts)
    assert train(recipe, resume=True).report["steps"] == 2


def test_an_adaptation_is_not_resumed_on_other_texts(tmp_path, tiny_lm, words_file):
    texts = Path(shutil.copy(words_file, tmp_path / "words.txt"))
    recipe = make_adaptation(tmp_path / "run", tiny_lm, str(texts))
    adapt(recipe)
    for done in ("model", "checkpoints/checkpoint-4", "checkpoints/checkpoint-5"):
        shutil.rmtree(tmp_path / "run" / done)
    texts.write_text(texts.read_text().replace("fox", "cat"))
    with pytest.raises(ConfigurationError, match="on other data: the training texts"):
        adapt(recipe, resume=True)


def test_a_first_start_says_nothing_of_checkpoints_and_a_lost_one_is_named(make_recipe, caplog):
    recipe = make_recipe()
    with caplog.at_level(logging.INFO, "st_llmpool"):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, resume=True, callbacks=[At(1, fail)])
        assert "checkpoint" not in caplog.text
        half = Path(recipe.output_dir) / "checkpoints" / "checkpoint-1"
        half.mkdir(parents=True)
        train(recipe, resume=True)
    assert "No checkpoint in" in caplog.text
    assert "is complete (checkpoint-1): step 1 is next" in caplog.text
    assert not half.exists()


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_run_in_the_same_folder_is_refused_by_name(make_recipe, resume):
    recipe = make_recipe()
    refused = []

    def start_again():
        with pytest.raises(ConfigurationError, match=r"run' is in use by process \d+ on") as raised:
            train(recipe, resume=resume)
        refused.append(raised)

    result = train(recipe, callbacks=[At(1, start_again)])
    assert refused
    assert result.report["steps"] == 2
    assert not (Path(recipe.output_dir) / ".lock").exists()


def test_a_second_adaptation_as_well(tmp_path, tiny_lm, words_file, monkeypatch):
    recipe = make_adaptation(tmp_path / "run", tiny_lm, words_file)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("1\nelsewhere\n")
    with pytest.raises(ConfigurationError, match=r"in use by process 1 on elsewhere.*delete"):
        adapt(recipe)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_run_that_was_killed_after_its_last_step_leaves_the_same_folder(make_recipe, tmp_path, tune):
    training = {"save_steps": 1, "learning_rate": 1e-3}
    unbroken = make_recipe({"training": training, "model": {"tune": tune}})
    expected = train(unbroken)
    shutil.copytree(Path(unbroken.output_dir) / "checkpoints", tmp_path / "killed" / "checkpoints")
    shutil.copy(Path(unbroken.output_dir) / "recipe.yaml", tmp_path / "killed")
    result = train(changed_output(unbroken, tmp_path / "killed"), resume=True)
    assert fingerprint(result.model) == fingerprint(expected.model)
    for file in expected.model_dir.rglob("*"):
        if file.suffix in (".json", ".safetensors"):
            other = result.model_dir / file.relative_to(expected.model_dir)
            assert other.read_bytes() == file.read_bytes(), file.name


def as_of_two_processes(checkpoint: Path) -> None:
    for rank in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    seal_checkpoint(checkpoint)


def test_a_run_of_two_processes_goes_on_with_one_and_says_what_differs(make_recipe, tmp_path, caplog):
    training = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
    recipe = make_recipe({"training": training, "model": {"lora": {"r": 4, "lora_dropout": 0.0}}})
    expected = train(recipe)
    folder = tmp_path / "resumed"
    shutil.copytree(Path(recipe.output_dir) / "checkpoints/checkpoint-2", folder / "checkpoints/checkpoint-2")
    shutil.copy(Path(recipe.output_dir) / "recipe.yaml", folder)
    as_of_two_processes(folder / "checkpoints/checkpoint-2")
    resumed = train(changed_output(recipe, folder), resume=True)
    assert "is of 2 processes and continues with 1: batches stay the same, dropout differs" in caplog.text
    assert resumed.report["losses"] == expected.report["losses"]
    assert_same_weights(resumed.model, expected.model)
    assert json.loads((folder / "checkpoints/checkpoint-4/trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.logs_warning
def test_dropout_after_such_a_resumption_is_not_that_of_the_first_steps(make_recipe, tmp_path, monkeypatch):
    import torch

    from st_llmpool.training.trainer import EmbedderTrainer

    states = []
    training_step = EmbedderTrainer.training_step

    def spy(self, *args, **kwargs):
        states.append(torch.get_rng_state().sum().item())
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(EmbedderTrainer, "training_step", spy)
    training = {"max_steps": 3, "save_steps": 1, "save_total_limit": 3}
    recipe = make_recipe({"training": training, "model": {"lora": {"r": 4, "lora_dropout": 0.5}}})
    train(recipe)
    for step in (1, 2):
        folder = tmp_path / f"resumed-{step}"
        name = f"checkpoints/checkpoint-{step}"
        shutil.copytree(Path(recipe.output_dir) / name, folder / name)
        shutil.copy(Path(recipe.output_dir) / "recipe.yaml", folder)
        as_of_two_processes(folder / name)
        train(changed_output(recipe, folder), resume=True)
    assert len(states) == 3 + 2 + 1
    assert len(set(states)) == len(states)
