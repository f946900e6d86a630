"""The recipes under examples/ are complete: each trains, on its own architecture built small."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer
from transformers import MistralConfig, Qwen3Config

from st_llmpool.training import Recipe, train
from st_llmpool.training.trainer import EmbedderTrainer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
CONFIGS = {"qwen3_0.6b_lora": Qwen3Config, "mistral_7b_qlora_paper": MistralConfig}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_for_a_large_model_trains_on_its_architecture_built_small(name, make_llm, pairs, tmp_path):
    recipe = Recipe.from_yaml(EXAMPLES / "recipes" / f"{name}.yaml")
    values = recipe.to_dict()
    # Only what is too large for a test changes: the base, the data, the sizes of batch, steps and paper pooling.
    values |= {
        "output_dir": str(tmp_path / "run"),
        "data": [dict(item, source=pairs, limit=None) for item in values["data"]],
    }
    values["data"] = [
        dict(item, name=f"set{place}", subset=None, columns={}) for place, item in enumerate(values["data"])
    ]
    values["model"] |= {"base": make_llm(CONFIGS[name](**SMALL))}
    values["training"] |= {"max_steps": 2, "batch_size": 4, "report_to": "none"}
    values["loss"] |= {"mini_batch_size": 2}
    if values["model"]["design"] is not None:
        values["model"]["pooling_kwargs"] = {"num_latents": 4, "num_heads": 2, "head_dim": 8}
    result = train(Recipe.from_dict(values))
    assert result.report["steps"] == 2
    assert result.model.prompts["query"].startswith("Instruct: ")
    assert result.model.encode(["a text"]).shape == (1, 32)


@pytest.mark.parametrize("name", ["squad_focal_mixing", "squad_matryoshka", "squad_gist", "squad_distill"])
def test_a_recipe_for_a_loss_trains_on_other_data(name, tiny_llm, pairs, tmp_path):
    values = Recipe.from_yaml(EXAMPLES / "recipes" / f"{name}.yaml").to_dict()
    values["output_dir"] = str(tmp_path / "run")
    values["model"] |= {"base": tiny_llm, "truncate_dim": values["model"]["truncate_dim"] and 16}
    values["data"][0]["source"] = pairs
    values["evaluation"]["data"] = [item | {"source": pairs} for item in values["evaluation"]["data"]]
    values["training"] |= {"max_steps": 2, "batch_size": 4}
    values["loss"]["matryoshka_dims"] = values["loss"]["matryoshka_dims"] and [16, 8]
    values["loss"] |= {part: tiny_llm for part in ("guide", "teacher") if values["loss"][part]}
    assert train(Recipe.from_dict(values)).report["steps"] == 2


def test_the_recipe_with_a_masked_stage_trains_on_other_data(tiny_lm, words_file, pairs, tmp_path):
    values = Recipe.from_yaml(EXAMPLES / "recipes" / "builtin_mntp_squad.yaml").to_dict()
    values["output_dir"] = str(tmp_path / "run")
    values["model"] |= {"base": tiny_lm}
    values["data"][0]["source"] = pairs
    values["stages"][0]["texts"][0]["source"] = words_file
    values["training"] |= {"max_steps": 2, "batch_size": 4}
    values["stages"][0]["training"] |= {"max_steps": 2, "batch_size": 4}
    assert train(Recipe.from_dict(values)).report["steps"] == 2
    assert json.loads((tmp_path / "run/stages/1-mntp/training.json").read_text())["merge"] == 0.5


@pytest.fixture(scope="module")
def tune(tiny_llm, write_pairs, tmp_path_factory):
    """`tune("squad_dora")` runs a recipe of what trains and how, on other data and a smaller base."""
    folder = tmp_path_factory.mktemp("tune")
    pairs = write_pairs(folder / "pairs.jsonl", rows=12)

    def run(name):
        values = Recipe.from_yaml(EXAMPLES / "recipes" / f"{name}.yaml").to_dict()
        values["output_dir"] = str(folder / name)
        values["model"] |= {"base": tiny_llm, "max_seq_length": 24}
        values["data"] = [{"source": pairs}]
        values["training"] |= {"max_steps": 3, "batch_size": 4, "logging_steps": 1, "save_steps": 2}
        return train(Recipe.from_dict(values))

    return run


@pytest.mark.parametrize("name", ["squad_rslora", "squad_dora", "squad_loftq"])
def test_a_recipe_for_an_adapter_gives_a_model_that_loads_as_it_was_trained(name, tune):
    result = tune(name)
    config = result.model.transformers_model.peft_config["default"]
    assert (config.use_rslora, config.use_dora) == (name == "squad_rslora", name == "squad_dora")
    loaded = SentenceTransformer(str(result.model_dir), trust_remote_code=True)
    texts = ["q1 quick fox", "a longer text about the lazy dog"]
    np.testing.assert_allclose(loaded.encode(texts), result.model.encode(texts), atol=1e-5)
    layer = next(module for module in result.model.modules() if isinstance(module, LoraLayer))
    assert layer.scaling["default"] == pytest.approx({"squad_rslora": 4, "squad_dora": 1, "squad_loftq": 2}[name])
    assert ("lora_magnitude_vector" in str(list(result.model.state_dict()))) == config.use_dora


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("squad_adamw_8bit", "AdamW"), ("squad_paged_adamw_8bit", "AdamW"), ("squad_lamb", "PaperLamb")],
)
def test_a_recipe_for_an_optimizer_steps_with_it(name, optimizer, tune, monkeypatch):
    pytest.importorskip("pytorch_optimizer" if name == "squad_lamb" else "bitsandbytes")
    seen = []

    def spy(self, *args, **kwargs):
        created = create(self, *args, **kwargs)
        seen.append(created)
        return created

    create = EmbedderTrainer.create_optimizer
    monkeypatch.setattr(EmbedderTrainer, "create_optimizer", spy)
    result = tune(name)
    assert all(np.isfinite(loss) for _, loss in result.report["losses"])
    (used,) = {id(found): found for found in seen}.values()
    assert type(used).__name__ == optimizer
    # 8-bit state where a tensor is large enough for it; a page is memory that a GPU can swap out.
    if optimizer == "AdamW":
        assert used.args.optim_bits == 8
        assert used.is_paged == ("paged" in name)
    rates = {group["initial_lr"] for group in used.param_groups if group["params"]}
    recipe = Recipe.from_yaml(EXAMPLES / "recipes" / f"{name}.yaml")
    assert rates == {recipe.learning_rate, recipe.training.pooling_learning_rate or 1e-3}


@pytest.mark.parametrize("name", ["squad_sparse_tuning", "squad_frozen_layers"])
def test_a_recipe_for_some_layers_trains(name, tune):
    assert tune(name).report["steps"] == 3


def test_the_paper_recipe_is_the_paper_preset_with_four_bits():
    recipe = Recipe.from_yaml(EXAMPLES / "recipes" / "mistral_7b_qlora_paper.yaml")
    assert (recipe.model.design, recipe.model.quantization) == ("paper-5", "nf4")
    assert (recipe.training.batch_size, recipe.training.max_steps, recipe.learning_rate) == (2048, 1000, 1e-5)


def test_training_on_your_own_pairs_ends_with_a_search(tmp_path, tiny_llm, monkeypatch, capsys):
    rows = [json.dumps({"question": f"What is {row}?", "answer": f"It is number {row}."}) for row in range(8)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    overrides = [
        f"model.base={tiny_llm}",
        f"output_dir={tmp_path / 'run'}",
        "training.max_steps=2",
        "training.batch_size=4",
    ]
    monkeypatch.setattr(sys, "argv", ["train_on_your_pairs.py", str(tmp_path / "mine.jsonl"), *overrides])
    runpy.run_path(str(EXAMPLES / "train_on_your_pairs.py"), run_name="__main__")
    assert f"The model is in {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
