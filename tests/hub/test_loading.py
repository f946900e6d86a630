"""A saved model loads by the installed package's code, and runs nothing of its folder without the flag."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from st_llmpool import build_embedder
from st_llmpool.hub.loading import load_model
from st_llmpool.modules import LLMTransformer, MultiLayerPooling
from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.poolings import HopfieldPooling
from st_llmpool.utils.extras import MissingExtraError

TEXTS = ["a cat", "The quick brown fox jumps over the lazy dog."]


@pytest.fixture
def saved(tiny_llm, tmp_path) -> Path:
    build_embedder(tiny_llm, verify=False).save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.mark.parametrize(("pooling", "kind"), [("multi_layer", MultiLayerPooling), ("hopfield", HopfieldPooling)])
@pytest.mark.parametrize("adapter", [None, "paper"])
def test_our_models_load_with_the_installed_classes_and_no_flag(tiny_llm, tmp_path, pooling, kind, adapter):
    model = build_embedder(tiny_llm, pooling=pooling, peft_config=adapter, verify=False)
    model.save_pretrained(str(tmp_path / "model"))
    imported = set(sys.modules)
    loaded = load_model(tmp_path / "model")
    assert not [name for name in set(sys.modules) - imported if name.startswith("transformers_modules")]
    assert (type(loaded[0]), type(loaded[1])) == (LLMTransformer, kind)
    np.testing.assert_allclose(loaded.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    loaded.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True)
    np.testing.assert_allclose(again.encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_a_plain_model_and_a_language_model_load_as_in_sentence_transformers(tiny_llm, tmp_path):
    plain = SentenceTransformer(tiny_llm)
    plain.save_pretrained(str(tmp_path / "plain"))
    for folder in (tiny_llm, tmp_path / "plain"):
        np.testing.assert_allclose(load_model(folder).encode(TEXTS), plain.encode(TEXTS), atol=1e-6)


def test_changed_code_is_refused_by_name_without_the_flag_and_runs_with_it(saved, tmp_path):
    witness = tmp_path / "it_ran"
    code = saved / "errors.py"
    code.write_text(code.read_text() + f"\nimport pathlib\npathlib.Path({str(witness)!r}).touch()\n")
    with pytest.raises(ConfigurationError, match=r"errors\.py .*--trust-remote-code") as refusal:
        load_model(saved)
    assert "\n" not in str(refusal.value)
    assert not witness.exists()
    load_model(saved, trust_remote_code=True)
    assert witness.exists()


def test_a_name_that_is_no_module_of_ours_is_refused(saved):
    modules = json.loads((saved / "modules.json").read_text())
    modules[1]["type"] = "errors.InputError"
    (saved / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(DataError, match=r"errors\.InputError"):
        load_model(saved)


@pytest.mark.logs_warning
def test_where_a_library_refuses_the_files_that_name_code_are_named(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match=r"config\.json: Auto.* .*--trust-remote-code"):
        load_model(saved)


@pytest.mark.parametrize("name", ["no/such", "nowhere", "a/b/c"])
def test_what_is_nowhere_is_one_line(name):
    with pytest.raises(DataError, match="is neither a folder nor a readable model on the Hub") as refusal:
        load_model(name)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a saved model"):
        load_model(tmp_path)


@pytest.mark.parametrize("file", ["config_sentence_transformers.json", "st_llmpool.json", "README.md"])
def test_a_pipe_in_the_folder_is_named_and_not_opened(saved, file):
    (saved / file).unlink()
    os.mkfifo(saved / file)
    for trust in (False, True):
        with pytest.raises(DataError, match=rf"{file}' is a pipe or device"):
            load_model(saved, trust_remote_code=trust)


def test_an_adapter_without_peft_is_one_line_that_names_the_extra(tiny_llm, tmp_path, monkeypatch):
    build_embedder(tiny_llm, peft_config="paper", verify=False).save_pretrained(str(tmp_path))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (name != "peft" and find_spec(name, *rest)) or None
    )
    for trusted in (False, True):
        with pytest.raises(
            MissingExtraError, match=r'is an adapter, which needs peft: pip install "st-llmpool\[train\]"'
        ):
            load_model(tmp_path, trust_remote_code=trusted)


def test_damage_is_one_line_of_ours(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot be (loaded|read)") as refusal:
        load_model(saved)
    assert "\n" not in str(refusal.value)
