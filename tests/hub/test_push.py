"""What is pushed is sound and whole, and loads anywhere; anything else leaves the repository as it was."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from typer.testing import CliRunner

from st_llmpool import build_embedder
from st_llmpool.cli import app
from st_llmpool.hub.push import PushError, push
from st_llmpool.modules.errors import ConfigurationError, InputError
from st_llmpool.training import Recipe, train
from tests.conftest import unseal
from tests.hub.hub_server import File, HubServer

TEXTS = ["fox", "the quick brown fox jumps over the lazy dog"]


@pytest.fixture
def folder(tiny_llm: str, tmp_path: Path) -> Path:
    """A saved design 5."""
    build_embedder(tiny_llm).save_pretrained(str(tmp_path / "embedder"))
    return tmp_path / "embedder"


@pytest.fixture
def adapter(tiny_llm: str, tmp_path: Path) -> Path:
    """A saved adapter whose base is a path of this machine."""
    trained(build_embedder(tiny_llm, pooling="mean", peft_config="paper"), 1).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def trained(model: SentenceTransformer, seed: int) -> SentenceTransformer:
    """Moves every weight that would be trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_every_push_loads_in_another_process_with_an_empty_cache(hub, elsewhere, tiny_llm, adapter):
    models = [trained(build_embedder(tiny_llm), seed) for seed in range(3)]
    first, second, third = models
    expected = {}
    first.push_to_hub("alice/plain")
    expected["alice/plain", None] = first
    hub.lfs_threshold = 10_000
    expected["alice/ours", push(first, "ours").commit] = first
    push(second, "alice/ours")
    expected["alice/ours", None] = second
    push(third, "alice/ours", revision="a/branch")
    expected["alice/ours", "a/branch"] = third
    assert push(first, "alice/ours", create_pr=True).revision == "refs/pr/1"
    expected["alice/ours", "refs/pr/1"] = first
    first.push_to_hub("alice/ours", create_pr=True)
    expected["alice/ours", "refs/pr/2"] = first
    assert push(second, "secret", private=True).private
    expected["alice/secret", None] = second
    native = push(adapter, merge=True, native=True)
    assert native.how_to_load().startswith('SentenceTransformer("alice/adapter")  # native')
    assert not [path for path in hub.files("alice/adapter") if path.endswith(".py") or "adapter" in path]
    expected["alice/adapter", None] = SentenceTransformer(str(adapter), trust_remote_code=True)
    assert any("PUT /lfs/" in request for request in hub.requests)

    answers = elsewhere(f"""
        from sentence_transformers import SentenceTransformer
        answer = []
        for repo, revision in {list(expected)!r}:
            token = "hf_alice" if repo == "alice/secret" else None
            flag = {{}} if repo == "alice/adapter" else {{"trust_remote_code": True}}
            model = SentenceTransformer(repo, revision=revision, token=token, device="cpu", **flag)
            answer.append(model.encode({TEXTS!r}).tolist())
        try:
            SentenceTransformer("alice/secret", trust_remote_code=True)
        except Exception as error:
            answer.append(f"{{type(error).__name__}}: {{error}}")
    """)
    for (place, model), vectors in zip(expected.items(), answers[:-1], strict=True):
        np.testing.assert_allclose(vectors, model.encode(TEXTS), atol=1e-6, err_msg=str(place))
    assert "alice/secret" in answers[-1]
    assert "private" in answers[-1]


def test_a_design_with_a_native_form_is_pushed_as_native_unasked(hub, tiny_llm, tmp_path, monkeypatch):
    build_embedder(tiny_llm, attention="causal", pooling="eos").save_pretrained(str(tmp_path / "plain"))
    assert push(tmp_path / "plain").native
    assert not push(tmp_path / "plain", "portable", native=False).native
    told = []

    def other_vectors(*args, **kwargs):
        raise InputError("other vectors")

    monkeypatch.setattr("st_llmpool.hub.push.export", other_vectors)
    assert not push(tmp_path / "plain", "refused", progress=told.append).native
    assert "Pushing the portable form. other vectors" in told


def test_a_push_is_one_commit_of_exactly_the_folder(hub, folder):
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "checkpoint-9").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "checkpoint-9")
    pushed = push(folder, commit_message="Ready")
    sent = contents(folder)
    del sent["optimizer.pt"], sent["checkpoint-9/model.safetensors"]
    there = hub.files("alice/embedder")
    assert b'SentenceTransformer("alice/embedder"' in there.pop("README.md")
    del sent["README.md"]
    assert there == sent
    assert hub.titles("alice/embedder") == ["initial commit", "Ready"]
    assert hub.repositories["alice/embedder"].refs["main"] == pushed.commit
    assert pushed.url == f"{hub.url}/alice/embedder"


def test_a_push_removes_only_what_the_manifest_of_the_earlier_push_lists(hub, folder, tiny_llm, tmp_path):
    push(folder, "mine")
    listed = json.loads(hub.files("alice/mine")["st_llmpool.json"])
    listed = {*listed.get("files", ()), *listed["code" if "code" in listed else "files"]}
    owners = {"LICENSE", "handler.py", "train.py", "app.py", "eval_results.json", "scripts/train.py", "onnx/model.onnx"}
    repository = hub.repositories["alice/mine"]
    repository.add("main", "by hand", repository.at("main").files | {name: File(b"x") for name in owners})
    build_embedder(tiny_llm, pooling="mean").save_pretrained(str(tmp_path / "mean"))
    told = []
    pushed = push(tmp_path / "mean", "mine", native=False, progress=told.append)
    assert "multi_layer_pooling.py" in pushed.removed
    assert set(pushed.removed) == listed - set(contents(tmp_path / "mean"))
    assert owners <= set(hub.files("alice/mine"))
    assert [line for line in told if "onnx/model.onnx" in line and "Kept in alice/mine" in line]


@pytest.mark.parametrize("manifest", [None, b"{", b"[]", b'{"files": 3, "code": null}', b'{"code": {"../x": 1}}'])
def test_a_repository_without_a_readable_manifest_loses_nothing(hub, folder, manifest):
    push(folder, "mine")
    repository = hub.repositories["alice/mine"]
    files = {**repository.at("main").files, "old_pooling.py": File(b"x")}
    files = {name: file for name, file in files.items() if name != "st_llmpool.json"}
    repository.add("main", "by hand", files | ({} if manifest is None else {"st_llmpool.json": File(manifest)}))
    assert push(folder, "mine").removed == ()
    assert "old_pooling.py" in hub.files("alice/mine")


def test_a_repository_is_named_after_the_run_and_never_after_its_folder_model(hub, folder, tmp_path):
    run = tmp_path / "runs" / "my first run"
    shutil.copytree(folder, run / "model")
    with pytest.raises(ConfigurationError, match="gives no usable repository name"):
        push(run / "model")
    (run / "training.json").write_text("{}")
    assert push(run / "model").repo_id == "alice/my-first-run"
    assert "alice/model" not in hub.repositories


def test_nothing_is_sent_twice(hub, folder):
    hub.lfs_threshold = 10_000
    push(folder)
    sent = [request for request in hub.requests if "PUT /lfs/" in request]
    push(folder)
    push(folder, "copy")
    assert sent
    assert [request for request in hub.requests if "PUT /lfs/" in request] == sent
    assert len(hub.titles("alice/embedder")) == 2  # an equal state makes no commit


@pytest.mark.parametrize("where", ["/commit/", "/lfs/"])
def test_an_upload_that_breaks_off_leaves_the_repository_as_it_was(hub, folder, tiny_llm, where):
    hub.lfs_threshold = 10_000
    other = trained(build_embedder(tiny_llm), 1)
    hub.drop(where, times=99)
    with pytest.raises(PushError, match=r"alice/embedder failed .*Push again"):
        push(folder)
    assert hub.files("alice/embedder") == {}
    hub.drop(where, times=0)
    push(folder)
    whole = hub.files("alice/embedder")
    assert len(whole) > 10
    hub.drop(where, times=99)
    with pytest.raises(PushError):
        push(other, "embedder")
    assert hub.files("alice/embedder") == whole
    hub.drop(where, times=0)
    push(other, "embedder")
    changed = {path for path, content in hub.files("alice/embedder").items() if content != whole.get(path)}
    assert {"model.safetensors", "1_MultiLayerPooling/model.safetensors"} <= changed


def test_one_broken_connection_in_a_large_file_is_survived(hub, folder):
    hub.lfs_threshold = 10_000
    hub.drop("/lfs/")
    push(folder)
    assert hub.files("alice/embedder")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_push_that_meets_another_one_is_not_mixed_with_it(hub, folder):
    push(folder)

    def somebody_else(line: str) -> None:
        if line.startswith("Uploading"):
            hub.repositories["alice/embedder"].add("main", "theirs", {"config.json": File(b"theirs")})

    with pytest.raises(PushError, match="Somebody else pushed"):
        push(folder, progress=somebody_else)
    assert hub.files("alice/embedder") == {"config.json": b"theirs"}


def test_a_pull_request_may_go_to_a_repository_of_somebody_else(hub, folder, monkeypatch):
    push(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    assert push(folder, "alice/embedder", create_pr=True).revision == "main"  # nothing to propose
    (folder / "new.json").write_text("{}")
    pushed = push(folder, "alice/embedder", create_pr=True, commit_message="A better one")
    assert pushed.url.endswith("/alice/embedder/discussions/1")
    assert 'revision="refs/pr/1"' in pushed.how_to_load()
    (folder / "newer.json").write_text("{}")
    assert push(folder, "alice/embedder", revision="refs/pr/1").url.endswith("/alice/embedder/tree/refs%2Fpr%2F1")
    assert "newer.json" in hub.files("alice/embedder", "refs/pr/1")
    assert "new.json" not in hub.files("alice/embedder")
    refused(
        hub,
        ConfigurationError,
        r"'alice/embedder' is not in a namespace of .*\(bob\).*--create-pr",
        folder,
        "alice/embedder",
    )


def refused(hub: HubServer, error: type[Exception], message: str, *arguments: object, **options: object) -> None:
    """The push fails with the message, and the Hub was asked for nothing but whose token it is."""
    hub.requests.clear()
    with pytest.raises(error, match=message):
        push(*arguments, **options)
    assert {request for request in hub.requests if "harnesses" not in request} <= {"GET /api/whoami-v2"}


def test_a_model_that_the_doctor_finds_faulty_is_pushed_on_demand_only(hub, folder):
    (folder / "multi_layer_pooling.py").unlink()
    refused(hub, InputError, r"(?s)fails these checks.*multi_layer_pooling.py.*--no-check", folder)
    push(folder, check=False)
    assert hub.files("alice/embedder")["model.safetensors"]


def test_code_of_others_is_examined_on_demand_only(hub, folder, tmp_path):
    witness = tmp_path / "it_ran"
    code = (folder / "errors.py").read_text()
    (folder / "errors.py").write_text(code + f"\nimport pathlib\npathlib.Path({str(witness)!r}).touch()\n")
    unseal(folder)  # whoever puts other code there can put other hashes there too
    refused(hub, InputError, "could not be checked.*errors.py.*--trust-remote-code", folder)
    assert not witness.exists()
    lines: list[str] = []
    push(folder, trust_remote_code=True, progress=lines.append)
    assert any("errors.py" in line for line in lines)


def test_an_adapter_on_a_local_base_is_refused_with_the_way_out(hub, adapter, tiny_llm):
    refused(hub, ConfigurationError, f"{tiny_llm}.*--merge", adapter)
    refused(hub, ConfigurationError, "--merge", adapter, check=False)


def test_a_missing_or_wrong_token_is_said_at_once(hub, folder, monkeypatch, caplog):
    monkeypatch.delenv("HF_TOKEN")
    refused(hub, ConfigurationError, "hf auth login", folder)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    refused(hub, PushError, "Invalid user token.*settings/tokens", folder)
    monkeypatch.setenv("HF_TOKEN", "hf_alice_reads")
    with pytest.raises(PushError, match=r"Opening alice/embedder failed .*The token has no write access there"):
        push(folder)


def test_a_hub_that_cannot_be_reached_is_one_sentence_and_nothing_was_sent(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    with pytest.raises(PushError, match=r"whose token this is failed.*Nothing was sent\. Check the network") as error:
        push(folder)
    huggingface_hub.close_session()
    assert str(error.value).count("refused") == 1


def test_names_and_settings_that_cannot_hold_are_refused(hub, folder, tmp_path):
    refused(hub, ConfigurationError, "'alice/a--b' is not a valid repository name", folder, "a--b")
    refused(hub, ConfigurationError, "no modules.json", tmp_path)
    refused(hub, ConfigurationError, "cannot be combined with revision=.dev.", folder, revision="dev", create_pr=True)
    model = SentenceTransformer(str(folder), trust_remote_code=True)
    refused(hub, ConfigurationError, "repo_id='user/name'", model)


def test_a_public_repository_does_not_pass_for_a_private_one(hub, folder, monkeypatch):
    push(folder)
    before = hub.files("alice/embedder")
    monkeypatch.setattr("st_llmpool.hub.push.doctor", None)  # said before anything is computed
    with pytest.raises(ConfigurationError, match="alice/embedder exists and is public"):
        push(folder, private=True)
    assert hub.files("alice/embedder") == before


def test_the_command_says_what_it_does_and_how_to_load(hub, folder, caplog):
    caplog.set_level(logging.DEBUG)
    renamed = folder.rename(folder.parent / "my model")
    result = CliRunner().invoke(app, ["push", str(renamed), "--private", "--revision", "dev"])
    assert result.exit_code == 0, result.output
    assert "Checking" in result.output
    assert f"{hub.url}/alice/my-model/tree/dev" in result.output
    assert 'SentenceTransformer("alice/my-model", revision="dev", trust_remote_code=True)' in result.output
    assert "private: needs a token" in result.output
    assert "hf_alice" not in result.output + caplog.text


def test_the_plain_call_pushes_the_same_through_either_pipeline_of_the_client(hub, folder, monkeypatch):
    """With hf_xet the client has another one, by default; small files go by the same routes."""
    model = SentenceTransformer(str(folder), trust_remote_code=True)
    for disable_xet in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", disable_xet)
        model.push_to_hub(f"alice/{disable_xet}")
        assert hub.files(f"alice/{disable_xet}").keys() == contents(folder).keys()


def test_a_trainer_that_pushes_leaves_a_model_that_loads(hub, elsewhere, tiny_llm, tmp_path):
    model = build_embedder(tiny_llm)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        push_to_hub=True,
        hub_model_id="alice/trained",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    pairs = Dataset.from_dict({"anchor": ["a cat", "a dog"] * 4, "positive": ["it meows", "it barks"] * 4})
    trainer = SentenceTransformerTrainer(model, arguments, pairs, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    trainer.push_to_hub()
    assert "assets/design.png" in hub.files("alice/trained")
    vectors, pictures = elsewhere(f"""
        import os
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer("alice/trained", trust_remote_code=True, device="cpu")
        model.save_pretrained("again")
        answer = [model.encode({TEXTS!r}).tolist(), sorted(os.listdir("again/assets"))]
    """)
    np.testing.assert_allclose(vectors, model.eval().encode(TEXTS), atol=1e-6)
    assert "design.png" in pictures  # the card's pictures come along from the Hub too


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_no_row_of_the_training_data_and_no_folder_is_saved_or_pushed(hub, tiny_llm, tmp_path, tune):
    secret = tmp_path / "secret-project"
    shutil.copytree(tiny_llm, secret / "base")
    rows = [{"query": f"xylophone question {row}", "positive": f"xylophone answer {row}"} for row in range(8)]
    (secret / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "output_dir": str(secret / "run"),
        "model": {"base": str(secret / "base"), "max_seq_length": 16, "tune": tune},
        "data": [{"source": str(secret / "pairs.jsonl")}],
        "evaluation": {"data": [{"source": str(secret / "pairs.jsonl"), "limit": 4}], "eval_steps": 1},
        "training": {"max_steps": 1, "batch_size": 4, "warmup_steps": 0},
    }
    train(Recipe.from_dict(values))
    saved = contents(secret / "run" / "model")
    if tune == "lora":  # a saved adapter cannot load without its base's place; a push refuses that
        for name in ("adapter_config.json", "st_llmpool.json"):  # the seal records the fields of the first
            assert b"secret-project" in saved.pop(name)
    push(secret / "run" / "model", "mine", merge=tune == "lora")
    assert {"README.md", "config_sentence_transformers.json"} < set(hub.files("alice/mine"))
    for where, files in {"saved": saved, "pushed": hub.files("alice/mine")}.items():
        told = [
            name for name, content in files.items() for word in (b"xylophone", b"secret-project") if word in content
        ]
        assert told == [], where


def test_rows_of_the_training_data_are_shown_on_request(tiny_llm, tmp_path):
    rows = [{"query": f"xylophone question {row}", "positive": f"xylophone answer {row}"} for row in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "output_dir": str(tmp_path / "run"),
        "model": {"base": tiny_llm, "max_seq_length": 16, "tune": "pooling"},
        "data": [{"source": str(tmp_path / "train.jsonl")}],
        "training": {"max_steps": 1, "batch_size": 4, "warmup_steps": 0},
        "card_examples": True,
    }
    train(Recipe.from_dict(values))
    assert "xylophone" in (tmp_path / "run" / "model" / "README.md").read_text()
