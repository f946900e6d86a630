"""A checkpoint with a missing, cut or changed file is skipped by name, and training resumes from the one before."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from st_llmpool.modules.seal import read_manifest
from st_llmpool.training import Recipe, train
from st_llmpool.training.checkpoints import fault_of, last_checkpoint, seal_checkpoint
from tests.training.test_checkpoints import write


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
