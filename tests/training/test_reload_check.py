"""A run saves and reloads its model once before it trains: what would be lost stops it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel

from st_llmpool import build_embedder
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training import AdaptRecipe, adapt, train
from st_llmpool.training.reload_check import check_language_model, check_reload

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


@pytest.mark.logs_warning
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lost", FILES)
def test_what_a_save_loses_stops_the_run_by_name_before_its_first_step(make_recipe, monkeypatch, lost, precision):
    save = SentenceTransformer.save_pretrained

    def lossy(self, path, *args, **kwargs):
        from safetensors.torch import load_file, save_file

        save(self, path, *args, **kwargs)
        file = Path(path) / FILES[lost]
        kept = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        save_file(kept, file, metadata={"format": "pt"})

    monkeypatch.setattr(SentenceTransformer, "save_pretrained", lossy)
    recipe = make_recipe({"training": {"save_steps": 1, "precision": precision}})
    with pytest.raises(
        ConfigurationError,
        match=r"other vectors once it is saved and loaded: (they differ by [\d.]+|1\.\S+ comes back with other)",
    ):
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
    monkeypatch.setattr("st_llmpool.training.run.check_reload", lambda *args, **options: pytest.fail("checked again"))
    train(recipe, resume=True)


def adaptation(folder, base, words_file, **changes):
    training = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "warmup_steps": 0}
    texts = [{"source": words_file}]
    values = {"output_dir": str(folder), "base": base, "texts": texts, "max_seq_length": 24, "training": training}
    return AdaptRecipe.from_dict(values | changes)


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("lost", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_an_adaptation_whose_save_loses_weights_stops_before_its_first_step(
    tiny_lm, words_file, monkeypatch, tmp_path, tune, lost
):
    save = PreTrainedModel.save_pretrained

    def lossy(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        file = Path(path) / "model.safetensors"
        weights = load_file(file)
        weights[lost].zero_()
        save_file(weights, file, metadata={"format": "pt"})

    recipe = adaptation(tmp_path / "run", tiny_lm, words_file, tune=tune)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", lossy)
        with pytest.raises(
            ConfigurationError, match=r"other logits once it is saved and loaded: they differ by [\d.]+"
        ):
            adapt(recipe)
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    adapt(recipe)  # nothing is left that refuses a start


def test_an_adaptation_that_loses_its_adapter_stops_as_well(tiny_lm, words_file, monkeypatch, tmp_path):
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(ConfigurationError, match="other logits once"):
        adapt(adaptation(tmp_path / "run", tiny_lm, words_file))


def test_an_adaptation_that_does_not_load_stops_as_well(tiny_lm, words_file, monkeypatch, tmp_path):
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda self, path: Path(path).mkdir())
    with pytest.raises(ConfigurationError, match="cannot be loaded once it is saved"):
        adapt(adaptation(tmp_path / "run", tiny_lm, words_file))


def test_an_adapter_on_tied_embeddings_is_refused_since_its_head_would_be_lost(tiny_lm, words_file, tmp_path):
    lora = {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}
    with pytest.raises(ConfigurationError, match="gives other logits once it is saved and loaded"):
        adapt(adaptation(tmp_path / "run", tiny_lm, words_file, lora=lora))
    assert not (tmp_path / "run" / "model").exists()


LANGUAGE_ADAPTERS = {
    "dora": {"r": 4, "use_dora": True},
    "kept modules": {"r": 4, "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("adapter", LANGUAGE_ADAPTERS)
def test_what_an_adaptation_saves_has_the_logits_of_what_it_trained_or_it_stops(tiny_lm, words_file, tmp_path, adapter):
    """Whatever the adapter: no run ends in a model that is not the one that was trained."""
    states = []

    def spy(model, save, load, tokens, folder):
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        check_language_model(model, save, load, tokens, folder)
        states.append(all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("st_llmpool.training.mntp.adaptation.check_language_model", spy)
        adapt(adaptation(tmp_path / "run", tiny_lm, words_file, lora=LANGUAGE_ADAPTERS[adapter]))
    assert states == [True]
    assert not list((tmp_path / "run").glob(".*"))


def test_an_adapter_that_can_change_no_vector_stops_the_run(make_recipe):
    """It sits in the last of four layers, and the pooling reads the first alone."""
    lora = {"r": 4, "target_modules": r".*layers\.3\..*q_proj"}
    recipe = make_recipe({"model": {"layers": [1], "lora": lora, "pooling_kwargs": {"readout_skip": False}}})
    with pytest.raises(ConfigurationError, match=r"adapter of model\.lora changes no vector.*model\.layers"):
        train(recipe)
