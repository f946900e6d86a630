"""A model on the Hub loads by its id as from a folder: of one commit, without its code, and not when damaged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from st_llmpool import build_embedder
from st_llmpool.hub import loading
from st_llmpool.hub.loading import load_model
from st_llmpool.modules import LLMTransformer, MultiLayerPooling
from st_llmpool.modules.errors import ConfigurationError, DataError
from tests.hub.hub_server import File, HubServer, Repository

TEXTS = ["a cat", "The quick brown fox jumps over the lazy dog."]


def put(hub: HubServer, name: str, folder: Path, **changes: bytes | None) -> str:
    """Commits a folder to a repository's main branch; `changes` replace files, None leaves one out."""
    content = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    files = {path: File(text) for path, text in {**content, **changes}.items() if text is not None}
    repository = hub.repositories.setdefault(name, Repository())
    return repository.add("main", f"{len(repository.commits)}", files).sha


@pytest.fixture
def saved(hub, tiny_llm, tmp_path) -> Path:
    """A small saved model of design 5 whose pooling is not at its start."""
    model = build_embedder(tiny_llm, prompts={"query": "Find: "}, verify=False)
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter += torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


def test_a_portable_model_loads_with_the_installed_classes_online_and_from_the_cache(hub, saved, monkeypatch):
    expected = load_model(saved).encode(TEXTS, prompt_name="query")
    put(hub, "alice/model", saved)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        loaded = load_model("alice/model")
        assert (type(loaded[0]), type(loaded[1])) == (LLMTransformer, MultiLayerPooling)
        np.testing.assert_array_equal(loaded.encode(TEXTS, prompt_name="query"), expected)


def test_an_adapter_loads_beside_its_base(hub, tiny_llm, tmp_path, monkeypatch):
    put(hub, "alice/base", Path(tiny_llm))
    model = build_embedder("alice/base", peft_config={"r": 4}, verify=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "adapted"))
    put(hub, "alice/adapted", tmp_path / "adapted")
    np.testing.assert_allclose(load_model("alice/adapted").encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_code_and_weights_are_of_the_commit_that_was_examined(hub, saved, tmp_path, monkeypatch):
    put(hub, "alice/model", saved)
    expected = load_model("alice/model").encode(TEXTS)
    witness = tmp_path / "it_ran"
    evil = (saved / "errors.py").read_bytes() + f"\nopen({str(witness)!r}, 'w')\n".encode()
    examined = loading.find_code

    def overtaken(folder):
        put(hub, "alice/model", saved, **{"errors.py": evil, "1_MultiLayerPooling/config.json": b"{}"})
        return examined(folder)

    monkeypatch.setattr(loading, "find_code", overtaken)
    np.testing.assert_array_equal(load_model("alice/model").encode(TEXTS), expected)
    monkeypatch.undo()
    assert not witness.exists()


def test_a_revision_is_loaded_as_it_was(hub, saved):
    first = put(hub, "alice/model", saved)
    expected = load_model(saved).encode(TEXTS)
    put(hub, "alice/model", saved, **{"modules.json": b"[]"})
    np.testing.assert_array_equal(load_model("alice/model", revision=first).encode(TEXTS), expected)
    with pytest.raises(DataError, match="readable model on the Hub"):
        load_model("alice/model", revision="no-such-branch")


@pytest.mark.logs_warning
@pytest.mark.parametrize("file", ["errors.py", "config.json"])
def test_foreign_code_is_refused_by_name_and_does_not_run(hub, saved, tmp_path, file):
    witness = tmp_path / "it_ran"
    line = f"\nopen({str(witness)!r}, 'w')\n".encode()
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    planted = {
        "errors.py": {"errors.py": (saved / "errors.py").read_bytes() + line},
        "config.json": {
            "config.json": json.dumps(config).encode(),
            "evil.py": line + b"class Evil: ...\n",
        },
    }
    put(hub, "alice/model", saved, **planted[file])
    with pytest.raises(ConfigurationError, match=rf"{file}.*--trust-remote-code") as refusal:
        load_model("alice/model")
    assert "\n" not in str(refusal.value)
    assert not witness.exists()


@pytest.mark.parametrize(
    "file",
    [
        *("modules.json", "config.json", "model.safetensors", "tokenizer.json", "sentence_bert_config.json"),
        *("config_sentence_transformers.json", "1_MultiLayerPooling/config.json"),
        *("1_MultiLayerPooling/model.safetensors", "errors.py"),
    ],
)
@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_damaged_repository_is_refused_in_one_line(hub, saved, file, damage):
    content = (saved / file).read_bytes()
    put(hub, "alice/model", saved, **{file: None if damage == "deleted" else content[: len(content) // 2]})
    with pytest.raises((DataError, ConfigurationError)) as refusal:
        load_model("alice/model")
    assert "\n" not in str(refusal.value)


def test_an_edited_prompt_is_named_by_its_field(hub, saved, caplog):
    settings = json.loads((saved / "config_sentence_transformers.json").read_text())
    settings["prompts"]["query"] = "Look for: "
    put(hub, "alice/model", saved, **{"config_sentence_transformers.json": json.dumps(settings).encode()})
    with caplog.at_level(logging.WARNING):
        assert load_model("alice/model").prompts["query"] == "Look for: "
    assert "config_sentence_transformers.json has changed in prompts.query" in caplog.text
