"""A run saves and reloads its model once before it trains: what would be lost stops it."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_llmpool import build_embedder
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training import train
from st_llmpool.training.reload_check import check_reload

FILES = {"adapter": "adapter_model.safetensors", "pooling": "1_MultiLayerPooling/model.safetensors"}
ADAPTERS = {
    "lora": {"r": 4},
    "dora": {"r": 4, "use_dora": True},
}


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_model_that_reloads_passes_and_is_as_before(tiny_llm, tmp_path, adapter):
    model = build_embedder(tiny_llm, peft_config=ADAPTERS[adapter])
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    check_reload(model, tmp_path, full=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert list(tmp_path.iterdir()) == []
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_model_that_trains_in_full_passes(tiny_llm, tmp_path):
    check_reload(build_embedder(tiny_llm), tmp_path, full=True)


def test_a_base_that_the_recipe_quantises_is_reloaded_alike(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm, peft_config={"r": 4}, quantization_config="nf4")
    check_reload(model, tmp_path, full=False)


@pytest.mark.parametrize("lost", FILES)
def test_what_a_save_loses_stops_the_run_by_name_before_its_first_step(make_recipe, monkeypatch, lost):
    save = SentenceTransformer.save_pretrained

    def lossy(self, path, *args, **kwargs):
        from safetensors.torch import load_file, save_file

        save(self, path, *args, **kwargs)
        file = Path(path) / FILES[lost]
        kept = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        save_file(kept, file, metadata={"format": "pt"})

    monkeypatch.setattr(SentenceTransformer, "save_pretrained", lossy)
    recipe = make_recipe({"training": {"save_steps": 1}})
    with pytest.raises(ConfigurationError, match=r"other vectors once it is saved and loaded: they differ by [\d.]+"):
        train(recipe)
    assert not list(Path(recipe.output_dir).rglob("checkpoint-*"))
    monkeypatch.undo()
    train(recipe)  # nothing is left that refuses a start


def test_what_cannot_be_loaded_stops_it_as_well(make_recipe, monkeypatch):
    save = SentenceTransformer.save_pretrained

    def broken(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        (Path(path) / "adapter_model.safetensors").write_bytes(b"")

    monkeypatch.setattr(SentenceTransformer, "save_pretrained", broken)
    with pytest.raises(ConfigurationError, match="cannot be loaded once it is saved"):
        train(make_recipe())


def test_a_resumed_run_does_not_check_again(make_recipe, monkeypatch, tmp_path):
    recipe = make_recipe({"training": {"save_steps": 1}})
    train(recipe)
    (Path(recipe.output_dir) / "model").rename(tmp_path / "moved")
    monkeypatch.setattr("st_llmpool.training.run.check_reload", None)
    train(recipe, resume=True)
