"""What a run's folder lets in: one run, one process at a time, resumed where it stopped."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from pathlib import Path

import pytest
from transformers import TrainerCallback

from st_llmpool.model_card.identity import fingerprint
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.modules.seal import read_manifest
from st_llmpool.training import Recipe, train
from st_llmpool.training.mntp.adaptation import adapt
from st_llmpool.training.run_folder import check_output, fault_of, last_checkpoint, processes_of, seal_checkpoint

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


def write(folder: Path, step: int, ranks: tuple[str, ...] = ("",)) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in (*(f"rng_state{rank}.pth" for rank in ranks), "optimizer.pt", "scheduler.pt"):
        with zipfile.ZipFile(checkpoint / name, "w") as file:
            file.writestr("data", "x" * 100)
    return checkpoint


def test_the_newest_checkpoint_is_found_by_its_number(tmp_path):
    for step in (90, 100, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_without_any_checkpoint_there_is_none(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None


@pytest.mark.logs_warning
@pytest.mark.parametrize("damage", ["no state", "half state", "no random state", "half random state"])
def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path, damage):
    complete, broken = write(tmp_path, 10), write(tmp_path, 20)
    file = broken / ("rng_state.pth" if "random" in damage else "trainer_state.json")
    if damage.startswith("half"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    assert last_checkpoint(tmp_path) == complete


@pytest.mark.logs_warning
def test_the_random_state_of_every_process_must_be_complete(tmp_path):
    """How many there were is not asked: the trainer's own state is written when all have written theirs."""
    complete, broken = (write(tmp_path, step, ranks=("_0", "_1")) for step in (10, 20))
    half = (broken / "rng_state_1.pth").read_bytes()[:50]
    (broken / "rng_state_1.pth").write_bytes(half)
    assert last_checkpoint(tmp_path) == complete
    assert processes_of(complete) == 2


BEST = ["evaluation.load_best_model_at_end=true", "evaluation.data=[{source: held_out.jsonl}]"]


@pytest.mark.parametrize(
    ("start", "change", "refused"),
    [
        ([], ["evaluation.eval_steps=7", "evaluation.batch_size=3", "evaluation.eval_on_start=true"], None),
        ([], BEST, "evaluation.data, evaluation.load_best_model_at_end"),
        (BEST, ["evaluation.data.0.limit=5"], "evaluation.data"),
        (BEST, ["evaluation.suite=builtin"], "evaluation.suite"),
        (BEST, ["evaluation.eval_steps=7"], "evaluation.eval_steps"),
        (BEST, ["evaluation.batch_size=3", "evaluation.eval_on_start=true", "training.logging_steps=3"], None),
        (["loss.teacher=t", "loss.name=distill"], ["evaluation.batch_size=3"], "evaluation.batch_size"),
    ],
)
def test_a_resumed_run_may_change_only_what_leaves_the_weights_as_they_are(
    make_recipe, tmp_path, start, change, refused
):
    make_recipe(None, *start).to_yaml(tmp_path / "recipe.yaml")
    write(tmp_path / "checkpoints", 10)
    changed = make_recipe(None, *start, *change)
    if refused is None:
        check_output(changed, tmp_path, resume=True)
        return
    with pytest.raises(ConfigurationError, match=rf": {refused} changed\. Restore"):
        check_output(changed, tmp_path, resume=True)


@pytest.fixture(scope="module")
def trained(tiny_llm: str, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a short run. Read only."""
    folder = tmp_path_factory.mktemp("sealed_run") / "run"
    steps = {"max_steps": 4, "save_steps": 2, "save_total_limit": 2, "batch_size": 4, "warmup_steps": 0}
    model = {"base": tiny_llm, "max_seq_length": 24}
    values = {"output_dir": str(folder), "model": model, "data": [{"source": pairs}], "training": steps}
    train(Recipe.from_dict(values))
    return folder / "checkpoints"


def damaged(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


def test_every_file_of_a_checkpoint_but_the_card_is_sealed(trained):
    checkpoint = trained / "checkpoint-4"
    manifest = read_manifest(checkpoint)
    files = {file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file()}
    sealed = {*manifest["files"], *manifest["state"]}
    assert sealed == {name for name in files if not name.startswith(("README", "assets", "st_llmpool"))}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(manifest["state"])
    assert fault_of(checkpoint) is None


def test_one_missing_cut_or_changed_file_sends_training_back_to_the_checkpoint_before(trained, tmp_path, caplog):
    folder = shutil.copytree(trained, tmp_path / "checkpoints")
    last = folder / "checkpoint-4"
    assert last_checkpoint(folder) == last
    for file in sorted(path for path in last.rglob("*") if path.is_file()):
        name = file.relative_to(last).as_posix()
        if name.startswith(("README", "assets/", "st_llmpool")):
            continue
        content = file.read_bytes()
        for damage in (None, content[:-1], damaged(content)):
            file.unlink() if damage is None else file.write_bytes(damage)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert last_checkpoint(folder) == folder / "checkpoint-2", (name, damage)
            assert file.name in caplog.text.replace("the optimizer's state", "optimizer.pt")
            file.write_bytes(content)
    assert last_checkpoint(folder) == last


def test_a_checkpoint_of_an_older_version_is_taken_by_its_form(tmp_path):
    assert fault_of(write(tmp_path, 10)) is None
    (tmp_path / "checkpoint-10/scheduler.pt").unlink()
    assert fault_of(tmp_path / "checkpoint-10") == "scheduler.pt is missing or cut"


def test_a_checkpoint_without_a_model_of_ours_is_sealed_too(tmp_path):
    checkpoint = write(tmp_path, 10)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    seal_checkpoint(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"weightz")
    assert fault_of(checkpoint) == "model.safetensors has other content or layout"
