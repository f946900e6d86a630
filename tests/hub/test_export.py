"""An export gives the vectors of its source in a fresh process, or is not written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import GPT2Config, StableLmConfig

from st_llmpool import build_embedder
from st_llmpool.hub.doctor import doctor
from st_llmpool.hub.export import export
from st_llmpool.modules.errors import ConfigurationError, InputError

TEXTS = ["fox", "the quick brown fox jumps over the lazy dog"]


def trained(model: SentenceTransformer) -> SentenceTransformer:
    """Gives adapter and pooling weights that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def save(model: SentenceTransformer, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    return folder


def test_a_native_export_loads_without_flag_and_gives_the_same_vectors(tiny_llm, tmp_path, monkeypatch):
    prompts = {"query": "the dog: ", "document": "a fox: ", "STS": "Find: "}
    model = build_embedder(tiny_llm, attention="bidirectional", pooling="mean", prompts=prompts)
    processes, start = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: [processes.append(args), start(*args, **kwargs)][1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise RuntimeError('the fresh process imports from the current folder')")
    export(save(model, Path("ours")), Path("native"), native=True, trust_remote_code=True)
    assert len(processes) == 1, "one for all prompts: each takes seconds to import"
    native = SentenceTransformer(str(tmp_path / "native"))
    np.testing.assert_allclose(native.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    np.testing.assert_allclose(native.encode_query(TEXTS), model.encode_query(TEXTS), atol=1e-6)
    assert not list((tmp_path / "native").rglob("*.py"))
    assert doctor(tmp_path / "native").ok
    types = [entry["type"] for entry in json.loads((tmp_path / "native" / "modules.json").read_text())]
    assert all(name.startswith("sentence_transformers.") for name in types)


@pytest.mark.usefixtures("forked_exports")
def test_in_a_native_export_no_file_can_switch_normalisation_off(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm, pooling="mean", verify=False)
    folder = export(save(model, tmp_path / "ours"), tmp_path / "native", native=True)
    assert not list(folder.glob("2_Normalize/*"))
    (folder / "2_Normalize").rmdir()  # git, and so the Hub, keeps no empty folder
    assert doctor(folder).ok
    np.testing.assert_allclose(SentenceTransformer(str(folder)).encode(TEXTS), model.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        # Drops the attention flags between model and layer: one text alone would be causal.
        StableLmConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
        ),
        # Absolute positions: left padding shifts them unless they are passed.
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.usefixtures("forked_exports")
def test_a_native_export_that_plain_loading_gets_wrong_is_refused(make_llm, tmp_path, config):
    model = build_embedder(make_llm(config), attention="bidirectional", pooling="mean")
    source = save(model, tmp_path / "source")
    with pytest.raises(InputError, match=r"other vectors.*portable"):
        export(source, tmp_path / "native", native=True, trust_remote_code=True)
    assert not (tmp_path / "native").exists()
    assert not list(tmp_path.glob(".native-*"))


def test_a_trainable_pooling_has_no_native_form(tiny_llm, tmp_path):
    source = save(build_embedder(tiny_llm), tmp_path / "source")
    with pytest.raises(ConfigurationError, match="MultiLayerPooling has no native form"):
        export(source, tmp_path / "native", native=True, trust_remote_code=True)


@pytest.mark.parametrize("pooling", ["mean", "multi_layer"])
@pytest.mark.usefixtures("forked_exports")
def test_a_merged_export_needs_no_adapter_and_gives_the_same_vectors(tiny_llm, tmp_path, pooling):
    model = trained(build_embedder(tiny_llm, pooling=pooling, peft_config="paper"))
    source = save(model, tmp_path / "adapter")
    export(source, tmp_path / "merged", merge=True, trust_remote_code=True)
    merged = SentenceTransformer(str(tmp_path / "merged"), trust_remote_code=True)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    np.testing.assert_allclose(merged.encode(TEXTS), model.encode(TEXTS), atol=1e-5)
    untouched = build_embedder(tiny_llm, pooling=pooling).encode(TEXTS)
    assert np.abs(merged.encode(TEXTS) - untouched).max() > 1e-3


@pytest.mark.usefixtures("forked_exports")
def test_an_adapter_becomes_native_when_it_is_merged(tiny_llm, tmp_path):
    model = trained(build_embedder(tiny_llm, pooling="mean", peft_config="paper"))
    source = save(model, tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="--merge"):
        export(source, tmp_path / "native", native=True, trust_remote_code=True)
    export(source, tmp_path / "native", native=True, merge=True, trust_remote_code=True)
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "native")).encode(TEXTS), model.encode(TEXTS), atol=1e-5
    )


def test_an_adapter_of_a_local_base_is_exported_merged_alone(tiny_llm, tmp_path):
    source = save(build_embedder(tiny_llm, pooling="mean", peft_config="paper"), tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=rf"local path, '{tiny_llm}'.*--merge"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_merge_and_a_taken_target_are_said_at_once(tiny_llm, tmp_path):
    source = save(build_embedder(tiny_llm), tmp_path / "source")
    with pytest.raises(ConfigurationError, match="nothing to merge"):
        export(source, tmp_path / "out", merge=True, trust_remote_code=True)
    with pytest.raises(ConfigurationError, match="exists"):
        export(source, source, trust_remote_code=True)


@pytest.mark.parametrize(("bits", "tolerance"), [("nf4", 1e-5), ("int8", 2e-2)])
@pytest.mark.usefixtures("forked_exports")
def test_an_adapter_keeps_its_quantised_base_and_merges_into_what_that_stands_for(bits, tolerance, tiny_llm, tmp_path):
    model = trained(build_embedder(tiny_llm, pooling="mean", quantization_config=bits, peft_config="paper"))
    saved = save(model, tmp_path / "adapter")
    reloaded = SentenceTransformer(str(saved), trust_remote_code=True)
    np.testing.assert_allclose(reloaded.encode(TEXTS), model.encode(TEXTS), atol=1e-6)
    merged = export(saved, tmp_path / "merged", merge=True, trust_remote_code=True)
    vectors = SentenceTransformer(str(merged), trust_remote_code=True).encode(TEXTS)
    np.testing.assert_allclose(vectors, model.encode(TEXTS), atol=tolerance)
    if bits == "nf4":  # beside the base in full it would give others, or this would show nothing
        whole = SentenceTransformer(str(saved), trust_remote_code=True, model_kwargs={"quantization_config": None})
        assert np.abs(whole.encode(TEXTS) - vectors).max() > 1e-4
    assert "quantization_config" not in (merged / "config.json").read_text()
    assert "model_kwargs" not in json.loads((merged / "sentence_bert_config.json").read_text())


def test_an_adapter_keeps_the_dtype_of_its_base(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm, pooling="mean", dtype=torch.bfloat16, peft_config="paper", verify=False)
    reloaded = SentenceTransformer(str(save(model, tmp_path / "adapter")), trust_remote_code=True)
    assert reloaded[0].model.get_input_embeddings().weight.dtype == torch.bfloat16
