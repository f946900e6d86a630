"""A saved model is sealed: later damage never loads, edits are named, and a new save leaves nothing of the old one."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import logging
import pickle
import shutil
import sys
import timeit
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_llmpool import build_embedder
from st_llmpool.modules import seal
from st_llmpool.modules.errors import ConfigurationError, DataError
from tests.conftest import save_tiny_llm, unseal

TEXTS = ["the quick fox", "a lazy dog sleeps near tall trees"]


@pytest.fixture(scope="module")
def model(tiny_llm: str) -> SentenceTransformer:
    return build_embedder(tiny_llm, pooling="scalar_mix", prompts={"query": "Find: "}, verify=False)


@pytest.fixture(scope="module")
def saved_once(model: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / "model"
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A sealed model that the test may damage."""
    return shutil.copytree(saved_once, tmp_path / "model")


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "st_llmpool.json").read_text())


def edit(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields, indent=2))


def test_the_seal_is_checked_in_20_ms(saved):
    best = min(timeit.repeat(lambda: seal.check_seal(str(saved)), number=1, repeat=5))
    assert best < 0.02


def test_a_save_where_the_package_is_not_installed_records_hashes_alone(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "st_llmpool.hub.seal_checks", None)  # its import fails
    model.save_pretrained(str(tmp_path), create_model_card=False)
    assert manifest_of(tmp_path)["probes"] == {"skipped": "saved without st_llmpool"}
    assert "model.safetensors" in manifest_of(tmp_path)["files"]
    seal.check_seal(str(tmp_path))


def test_every_file_but_the_card_is_recorded_with_size_and_hash(saved):
    files = {path.relative_to(saved).as_posix(): path for path in saved.rglob("*") if path.is_file()}
    due = {name for name in files if not name.startswith(("README", "assets/", "st_llmpool.json"))}
    recorded = manifest_of(saved)["files"]
    assert set(recorded) == due
    for name, record in recorded.items():
        content = files[name].read_bytes()
        assert (record["size"], record["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_every_file_can_be_read_by_whoever_may_read_its_neighbours(saved_once):
    modes = {path.stat().st_mode for path in saved_once.rglob("*") if path.is_file()}
    assert modes == {(saved_once / "modules.json").stat().st_mode}


def test_a_save_without_card_and_a_save_of_a_copy_are_sealed(model, tmp_path):
    model.save_pretrained(str(tmp_path / "no card"), create_model_card=False)
    copy.deepcopy(model).save_pretrained(str(tmp_path / "copied"))
    pickle.loads(pickle.dumps(model)).save_pretrained(str(tmp_path / "pickled"))
    files = [manifest_of(tmp_path / name)["files"] for name in ("no card", "copied", "pickled")]
    assert files[0] == files[1] == files[2]


def test_a_save_changes_neither_random_state_nor_modes(model, tmp_path):
    model = copy.deepcopy(model).train()
    model[0].model.eval()
    before = torch.get_rng_state(), {name: module.training for name, module in model.named_modules()}
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)  # for a card the library encodes examples
    assert torch.equal(torch.get_rng_state(), before[0])
    assert {name: module.training for name, module in model.named_modules()} == before[1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    (tmp_path / "modules.json").write_text("before")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        seal.write_text(tmp_path / "modules.json", "after")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("modules.json", "before")]


def test_an_untouched_model_loads_without_a_word(saved, caplog):
    with caplog.at_level(logging.WARNING):
        SentenceTransformer(str(saved), trust_remote_code=True)
    assert "as it was saved" not in caplog.text


@pytest.mark.parametrize(
    "name", ["config_sentence_transformers.json", "2_Normalize/config.json", "tokenizer_config.json", "errors.py"]
)
def test_a_missing_file_is_refused_by_name(saved, name):
    (saved / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        seal.check_seal(str(saved))


def test_a_cut_file_is_refused_by_name(saved):
    for name in ("model.safetensors", "tokenizer.json", "errors.py"):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[:-7])
        with pytest.raises(DataError, match=f"{name} (is cut|cannot be read)"):
            seal.check_seal(str(saved))
        (saved / name).write_bytes(content)
    seal.check_seal(str(saved))


def test_changed_settings_give_one_warning_that_names_files_and_fields(saved, caplog):
    edit(saved / "config_sentence_transformers.json", prompts={"query": "Find; ", "document": ""})
    edit(saved / "2_Normalize/config.json", module_input_name="token_embeddings")
    with caplog.at_level(logging.WARNING):
        seal.check_seal(str(saved))
    (warning,) = caplog.messages
    assert "2_Normalize/config.json has changed in module_input_name" in warning
    assert "config_sentence_transformers.json has changed in prompts.query" in warning
    assert "prompts.document" not in warning


def test_weights_are_hashed_at_load_only_when_asked(saved):
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)
    SentenceTransformer(str(saved), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"model\.safetensors has other content"):
        SentenceTransformer(str(saved), trust_remote_code=True, model_kwargs={"verify_weights": True})


def test_a_model_that_lost_its_seal_is_refused_by_name(saved):
    (saved / "st_llmpool.json").unlink()
    with pytest.raises(DataError, match=r"st_llmpool\.json is missing.*doctor --seal"):
        seal.check_seal(str(saved))
    with pytest.raises(ValueError, match=r"st_llmpool\.json is missing"):
        SentenceTransformer(str(saved), trust_remote_code=True)


def test_a_model_of_a_version_without_seals_loads_and_cannot_be_verified(saved):
    unseal(saved)
    SentenceTransformer(str(saved), trust_remote_code=True)
    with pytest.raises(DataError, match="no seal"):
        seal.check_seal(str(saved), verify_weights=True)


def test_the_last_save_wins(model, tmp_path):
    adapted = build_embedder(save_tiny_llm(tmp_path / "base"), pooling="mean", peft_config={"r": 4}, verify=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter)
    for last, first in ((model, adapted), (adapted, model)):
        folder = tmp_path / type(last[1]).__name__
        folder.mkdir()
        (folder / "of its owner.json").write_text("{}")
        first.save_pretrained(str(folder))
        last.save_pretrained(str(folder))
        loaded = SentenceTransformer(str(folder), trust_remote_code=True)
        torch.testing.assert_close(torch.tensor(loaded.encode(TEXTS)), torch.tensor(last.encode(TEXTS)))
        assert (folder / "of its owner.json").is_file()
        assert {path.name for path in folder.iterdir() if path.name[0].isdigit()} == {
            f"{index}_{type(module).__name__}" for index, module in enumerate(last) if index
        }


@pytest.mark.parametrize("saved_before", [False, True], ids=["base LLM", "saved embedder"])
def test_an_adapter_is_not_saved_over_the_base_that_it_needs(tmp_path, saved_before):
    base = Path(save_tiny_llm(tmp_path / "base"))
    if saved_before:
        build_embedder(str(base), pooling="mean", verify=False).save_pretrained(str(tmp_path / "model"))
        base = tmp_path / "model"
    adapted = build_embedder(str(base), pooling=None if saved_before else "mean", peft_config={"r": 4}, verify=False)
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match=r"holds the base that this adapter needs.*another folder"):
        adapted.save_pretrained(str(base))
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
    adapted.save_pretrained(str(tmp_path / "adapter"))


def test_a_dora_adapter_is_not_saved_without_the_package_that_names_its_magnitudes(tiny_llm, tmp_path, monkeypatch):
    adapted = build_embedder(tiny_llm, pooling="mean", peft_config={"r": 4, "use_dora": True}, verify=False)
    adapted.save_pretrained(str(tmp_path / "model"))
    monkeypatch.setattr(seal, "of_package", lambda module: None)
    with pytest.raises(ConfigurationError, match=r"DoRA.*pip install st-llmpool"):
        adapted.save_pretrained(str(tmp_path / "model"))
    SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")  # of the save before


def test_a_manifest_cannot_remove_files_outside_the_folder(model, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.txt").write_text("")
    (tmp_path / "model/link").symlink_to(tmp_path)
    files = {name: {} for name in ("../mine.txt", "link/mine.txt", str(tmp_path / "mine.txt"))}
    (tmp_path / "model/st_llmpool.json").write_text(json.dumps({"files": files}))
    model.save_pretrained(str(tmp_path / "model"))
    assert (tmp_path / "mine.txt").is_file()


@pytest.mark.parametrize("content", ["", "[]", '{"files": {"model.safetensors": 5}}', '{"code": 5}', '{"files": 1}'])
def test_a_manifest_of_any_form_neither_breaks_a_save_nor_is_believed(tmp_path, content):
    (tmp_path / "st_llmpool.json").write_text(content)
    refused = pytest.raises(DataError, match=r"st_llmpool\.json is damaged")
    with refused if content != '{"code": 5}' else contextlib.nullcontext():
        seal.check_seal(str(tmp_path))
    seal.begin_save(tmp_path, torch.nn.Linear(1, 1))
    assert [file.name for file in tmp_path.iterdir()] == ["modules.json"]


def test_an_edited_manifest_is_told_from_one_of_an_old_version(saved, caplog):
    file = saved / "st_llmpool.json"
    text = file.read_text()
    file.write_text('{"version": "0.0.1", "code": {}}')
    seal.check_seal(str(saved))
    assert not caplog.messages
    file.write_text(text.replace('"dtype": "float32"', '"dtype": "float16"'))
    with pytest.raises(DataError, match=r"st_llmpool\.json is damaged"):
        seal.check_seal(str(saved))


def test_a_tokenizer_that_a_trainer_saves_once_more_breaks_no_seal(model, tmp_path):
    model.encode(TEXTS)
    model.save_pretrained(str(tmp_path))
    model.tokenizer.save_pretrained(str(tmp_path))
    assert not list(seal.differences(tmp_path, manifest_of(tmp_path)["files"]))
