"""Checkpoints: the newest complete one is found; a missing, cut or changed file is skipped by name."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from pathlib import Path

import pytest

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.modules.seal import read_manifest
from st_llmpool.training import Recipe, train
from st_llmpool.training.checkpoints import fault_of, last_checkpoint, processes_of, seal_checkpoint
from st_llmpool.training.run_folder import check_output


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
