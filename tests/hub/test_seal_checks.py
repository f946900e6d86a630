"""The doctor compares a model with its seal and seals again on demand; what the Hub lost is named at load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from st_llmpool import build_embedder
from st_llmpool.cli import app
from st_llmpool.hub.doctor import doctor
from st_llmpool.hub.push import push
from st_llmpool.hub.seal_checks import PROBES, probe_vectors, seal_findings
from st_llmpool.modules.errors import DataError
from st_llmpool.modules.seal import check_seal, read_manifest, write_manifest


@pytest.fixture(scope="module")
def saved_once(tiny_llm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / "model"
    build_embedder(tiny_llm, pooling="scalar_mix", prompts={"query": "Find: "}).save_pretrained(str(folder))
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A sealed model that the test may damage."""
    return shutil.copytree(saved_once, tmp_path / "model")


def failed(folder: Path) -> dict[str, str]:
    return {finding.check: finding.detail for finding in doctor(folder).findings if finding.status == "failed"}


def test_a_sound_model_has_its_files_and_probe_vectors(saved):
    found = {finding.check: finding for finding in doctor(saved).findings}
    assert (found["seal"].status, found["probe vectors"].status) == ("ok", "ok")
    assert "files added" not in found


def test_the_probe_vectors_are_projections_of_the_embeddings(tiny_llm):
    model = build_embedder(tiny_llm, pooling="scalar_mix", verify=False)
    vectors = model.encode([*PROBES, *PROBES], batch_size=1, convert_to_tensor=True).double()
    angles = torch.outer(torch.arange(1, 33).double(), torch.arange(1, 33).double()) * 2.399963
    torch.testing.assert_close(probe_vectors(model), vectors @ angles.cos() / 4, atol=1e-6, rtol=0)


def test_an_edited_setting_is_named_with_its_field(saved):
    file = saved / "config_sentence_transformers.json"
    file.write_text(file.read_text().replace("Find: ", "Find; "))
    assert "config_sentence_transformers.json has changed in prompts.query" in failed(saved)["seal"]


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "model.safetensors.index.json", "added_tokens.json", "tokenizer.model"]
)
def test_an_added_file_that_loaders_prefer_fails(saved, name):
    (saved / name).write_text("{}")
    assert name in " ".join(finding.detail for finding in seal_findings(saved) if finding.status == "failed")


def test_other_added_files_do_not_fail(saved):
    for name in ("handler.py", ".gitattributes", "eval_results.json", "notes.txt"):
        (saved / name).write_text("")
    statuses = {finding.check: (finding.status, finding.detail) for finding in seal_findings(saved)}
    assert statuses["code added"][0] == "warning"
    assert "handler.py" in statuses["code added"][1]
    assert "failed" not in {status for status, _ in statuses.values()}
    (saved / "README.md").write_text("A better card.")
    assert not [finding for finding in seal_findings(saved) if finding.status == "failed"]


def test_other_weights_under_a_seal_of_their_own_are_found_by_the_probe_vectors(saved):
    weights = load_file(saved / "model.safetensors")
    name = next(name for name in weights if "layers.2.mlp" in name)
    weights[name][0, 0] += 0.5
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert set(failed(saved)) == {"seal"}
    probes = read_manifest(saved)["probes"]
    assert CliRunner().invoke(app, ["doctor", str(saved), "--seal"]).exit_code == 0
    write_manifest(saved, {**read_manifest(saved), "probes": probes})
    assert "largest relative difference" in failed(saved)["probe vectors"]


def test_a_change_on_purpose_is_shown_and_sealed(saved):
    file = saved / "config_sentence_transformers.json"
    file.write_text(file.read_text().replace("Find: ", "Search: "))
    (saved / "tokenizer_config.json").unlink()
    assert not doctor(saved).ok
    sealed = doctor(saved, seal=True)
    assert sealed.ok
    (finding,) = (finding for finding in sealed.findings if finding.check == "seal")
    assert "tokenizer_config.json is missing" in finding.detail
    assert "changed in prompts.query" in finding.detail
    assert doctor(saved).ok
    assert SentenceTransformer(str(saved), trust_remote_code=True).prompts["query"] == "Search: "


def test_a_model_that_fails_otherwise_keeps_its_old_seal(saved):
    before = (saved / "st_llmpool.json").read_text()
    config = json.loads((saved / "1_ScalarMixPooling/config.json").read_text())
    (saved / "1_ScalarMixPooling/config.json").write_text(json.dumps(config | {"num_layers": 3}))
    assert not doctor(saved, seal=True).ok
    assert (saved / "st_llmpool.json").read_text() == before
    assert not (saved / ".st_llmpool.json.old").exists()


def test_a_lost_manifest_is_not_taken_for_an_old_model(saved):
    (saved / "st_llmpool.json").unlink()
    assert "st_llmpool.json" in failed(saved)["seal"]
    assert doctor(saved, seal=True).ok
    SentenceTransformer(str(saved), trust_remote_code=True)


def test_a_plain_model_of_sentence_transformers_can_be_sealed(tiny_llm, tmp_path):
    folder = tmp_path / "plain"
    SentenceTransformer(tiny_llm).save_pretrained(str(folder))
    assert {finding.check: finding.status for finding in doctor(folder).findings}["seal"] == "warning"
    assert doctor(folder, seal=True).ok
    assert {finding.check: finding.status for finding in doctor(folder).findings}["seal"] == "ok"
    (folder / "1_Pooling/config.json").unlink()
    assert "1_Pooling/config.json is missing" in failed(folder)["seal"]


def test_a_file_that_a_hub_repository_lost_is_named_at_load(hub, saved, tmp_path):
    push(saved, "alice/embedder", check=False, native=False)
    check_seal("alice/embedder", cache_folder=str(tmp_path / "cache"))
    HfApi().delete_file("2_Normalize/config.json", "alice/embedder")
    with pytest.raises(DataError, match=r"2_Normalize/config\.json is missing"):
        check_seal("alice/embedder", cache_folder=str(tmp_path / "cache"))


def test_the_probe_vectors_are_the_same_in_16_bits_within_their_tolerance(tiny_llm, tmp_path):
    build_embedder(tiny_llm, pooling="scalar_mix", dtype=torch.bfloat16).save_pretrained(str(tmp_path / "half"))
    found = {finding.check: finding for finding in doctor(tmp_path / "half").findings}
    assert (found["probe vectors"].status, read_manifest(tmp_path / "half")["probes"]["dtype"]) == ("ok", "bfloat16")
