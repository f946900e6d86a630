"""The doctor finds what would hurt a recipient, and runs no foreign code to find it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from st_llmpool import build_embedder, set_attention
from st_llmpool.hub.doctor import Diagnosis, doctor
from tests.conftest import unseal


@pytest.fixture
def saved(tiny_llm: str, tmp_path: Path) -> Path:
    build_embedder(tiny_llm).save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


def failed(diagnosis: Diagnosis) -> dict[str, str]:
    return {finding.check: finding.detail for finding in diagnosis.findings if finding.status == "failed"}


def rename_class(folder: Path, reference: str) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = reference
    (folder / "modules.json").write_text(json.dumps(modules))


def test_a_sound_model_passes(saved):
    diagnosis = doctor(saved)
    assert diagnosis.ok
    assert {"attention", "EOS and truncation", "padding", "weights"} <= {found.check for found in diagnosis.findings}


def test_no_extra_is_needed(saved, monkeypatch):
    monkeypatch.setattr("st_llmpool.hub.doctor.find_spec", lambda name: None)
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda *args: False)
    assert doctor(saved).ok


def test_a_loaded_model_can_be_examined(tiny_llm):
    assert doctor(build_embedder(tiny_llm, attention="causal", pooling="eos")).ok


def test_a_lost_attention_mode_is_found(tiny_llm):
    model = build_embedder(tiny_llm)
    set_attention(model[0].model, "causal")
    assert "measured causal" in failed(doctor(model))["attention"]


def test_a_truncated_weight_file_is_named(saved):
    file = saved / "1_MultiLayerPooling" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "1_MultiLayerPooling/model.safetensors" in failed(doctor(saved))["weights"]


def test_a_missing_pooling_folder_is_named(saved):
    for file in (saved / "1_MultiLayerPooling").iterdir():
        file.unlink()
    (saved / "1_MultiLayerPooling").rmdir()
    assert "1_MultiLayerPooling" in failed(doctor(saved))["modules.json"]


def test_a_path_that_leads_out_of_the_folder_is_refused(saved):
    modules = json.loads((saved / "modules.json").read_text())
    modules[1]["path"] = "../elsewhere"
    (saved / "modules.json").write_text(json.dumps(modules))
    assert "points outside" in failed(doctor(saved))["modules.json"]


def test_missing_module_code_is_named(saved):
    (saved / "multi_layer_pooling.py").unlink()
    assert "multi_layer_pooling.py" in failed(doctor(saved))["modules.json"]


def test_pickled_weights_are_pointed_out(saved):
    (saved / "pytorch_model.bin").write_bytes(b"")
    assert any(found.check == "pickle" and found.status == "warning" for found in doctor(saved).findings)


def test_nan_in_the_pooling_is_found(tiny_llm):
    model = build_embedder(tiny_llm)
    with torch.no_grad():
        model[1].layer_table[0, 0] = float("nan")
    assert "layer_table" in failed(doctor(model))["finite weights"]


def test_a_class_that_its_file_does_not_define_is_named(saved):
    rename_class(saved, "multi_layer_pooling.NoSuchPooling")
    assert "NoSuchPooling is not defined in multi_layer_pooling.py" in failed(doctor(saved))["modules.json"]


@pytest.mark.parametrize("reference", ["../../evil.Pooling", "user/repository--pooling.Pooling"])
def test_a_class_of_elsewhere_is_refused(saved, reference):
    rename_class(saved, reference)
    assert "do not load" in failed(doctor(saved))["modules.json"]


def test_a_folder_that_does_not_exist_is_said(tmp_path):
    assert "no such folder" in failed(doctor(tmp_path / "nothing"))["files"]


def test_code_that_changed_after_the_save_is_named(saved):
    file = saved / "multi_layer_pooling.py"
    file.write_text(file.read_text() + "# changed\n")
    assert "multi_layer_pooling.py has other content" in failed(doctor(saved, trust_remote_code=True))["seal"]
    file.unlink()
    (saved / "errors.py").unlink()
    assert "errors.py is missing" in failed(doctor(saved))["seal"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", b"[" * 3000),
        ("modules.json", b"[1]"),
        ("config.json", b"\xe9"),
        ("config.json", b"[1]"),
        ("adapter_config.json", b"[" * 3000),
        ("adapter_config.json", b'{"a": ' + b"9" * 5000 + b"}"),
        ("tokenizer_config.json", b""),
    ],
)
def test_a_broken_json_file_is_one_line(saved, file, content):
    unseal(saved)
    (saved / file).write_bytes(content)
    diagnosis = doctor(saved)
    assert not diagnosis.ok
    assert all("\n" not in finding.detail for finding in diagnosis.findings)


def test_a_pipe_in_the_folder_is_named_and_not_opened(saved):
    (saved / "config.json").unlink()
    os.mkfifo(saved / "config.json")
    assert "config.json' is a pipe" in failed(doctor(saved))["files"]


def test_a_damaged_config_and_missing_tensors_are_named(saved):
    unseal(saved)
    config = saved / "1_MultiLayerPooling" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"of_tomorrow": 1}))
    assert "1_MultiLayerPooling/config.json" in failed(doctor(saved))["loading"]
    backbone = load_file(saved / "model.safetensors")
    name = next(name for name in backbone if "layers.1" in name)
    del backbone[name]
    save_file(backbone, saved / "model.safetensors", metadata={"format": "pt"})
    assert name in failed(doctor(saved))["loading"]


@pytest.mark.parametrize("file", ["multi_layer_pooling.py", "errors.py"])
def test_code_that_is_not_ours_does_not_run_unasked(saved, tmp_path, file):
    witness = tmp_path / "it_ran"
    code = (saved / file).read_text()
    (saved / file).write_text(code + f"\nimport pathlib\npathlib.Path({str(witness)!r}).touch()\n")
    unseal(saved)  # whoever puts other code there can put other hashes there too
    diagnosis = doctor(saved)
    assert not witness.exists()
    assert any(found.check == "code" and file in found.detail for found in diagnosis.findings)
    assert not diagnosis.ok
    assert (diagnosis.failed, diagnosis.complete) == (False, False)
    doctor(saved, trust_remote_code=True)
    assert witness.exists()


def test_an_adapter_on_a_local_base_is_pointed_out(tiny_llm, tmp_path):
    build_embedder(tiny_llm, peft_config="paper").save_pretrained(str(tmp_path / "adapter"))
    findings = {found.check: found for found in doctor(tmp_path / "adapter").findings}
    assert findings["adapter base"].status == "warning"
    assert tiny_llm in findings["adapter base"].detail
    assert findings["attention"].status == "ok"


def test_a_plain_model_of_sentence_transformers_can_be_examined(tiny_llm, tmp_path):
    SentenceTransformer(tiny_llm).save_pretrained(str(tmp_path / "plain"))
    diagnosis = doctor(tmp_path / "plain")
    assert "native" in next(found.detail for found in diagnosis.findings if found.check == "modules.json")


@pytest.mark.parametrize("layers", [3, 5])
def test_a_native_folder_whose_config_counts_other_layers_fails(tiny_llm, tmp_path, layers):
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    plain = SentenceTransformer(modules=[Transformer(tiny_llm), Pooling(32)])
    plain.save_pretrained(str(tmp_path))
    assert doctor(tmp_path).ok
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = layers
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = {finding.check: finding for finding in doctor(tmp_path).findings}["weights of the config"]
    assert found.status == "failed"
    assert "layers." in found.detail


def test_a_base_that_cannot_be_looked_up_without_a_network_is_a_warning(tiny_llm, tmp_path, monkeypatch):
    class ConnectError(Exception):
        """As that of httpx, which is no OSError."""

    def no_network(*args, **kwargs):
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", no_network)
    build_embedder(tiny_llm, peft_config="paper").save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "alice/base"}))
    findings = {found.check: found for found in doctor(tmp_path / "adapter").findings}
    assert findings["adapter base"].status == "warning"
    assert "cannot be reached" in findings["adapter base"].detail
