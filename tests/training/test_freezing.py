"""What is frozen keeps its weights and gets no gradient; all above it trains."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, GPT2Config, OPTConfig

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.modules.multi_layer_pooling import MultiLayerPooling
from st_llmpool.training import train
from st_llmpool.training.freezing import freeze_lowest_layers, freeze_pooling

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 16}
OPT = OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=8)
ENDS = {  # architecture -> what trains when the lowest two of three layers are frozen, by the start of its name
    "gpt2": (GPT2Config(n_embd=8, n_head=2, n_layer=3, vocab_size=16), ("h.2.", "ln_f.")),
    "bert": (BertConfig(**SMALL, intermediate_size=8), ("encoder.layer.2.", "pooler.")),
    "opt": (OPT, ("decoder.layers.2.", "decoder.final_layer_norm.")),
}


@pytest.mark.parametrize("name", ENDS)
def test_embeddings_of_every_kind_are_frozen_with_the_layers_above_them(name):
    config, expected = ENDS[name]
    model = AutoModel.from_config(config)
    freeze_lowest_layers(model, 2)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert training == {name for name, _ in model.named_parameters() if name.startswith(expected)}


def test_an_embedding_inside_a_layer_goes_with_its_layer():
    model = AutoModel.from_config(OPT)
    for layer in model.decoder.layers:
        layer.distances = torch.nn.Embedding(3, 2)
    freeze_lowest_layers(model, 2)
    assert [layer.distances.weight.requires_grad for layer in model.decoder.layers] == [False, False, True]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_frozen_layers_keep_their_weights_and_the_others_do_not(tune, make_recipe, tiny_llm):
    recipe = make_recipe(
        {"model": {"tune": tune, "freeze_layers": 3, "lora": {"r": 4}}, "training": {"learning_rate": 0.01}}
    )
    result = train(recipe)
    if tune == "full":
        before = load_file(f"{tiny_llm}/model.safetensors")
        after = load_file(result.model_dir / "model.safetensors")
        moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert moved == {name for name in before if name.startswith(("layers.3.", "norm."))}
    else:
        after = load_file(result.model_dir / "adapter_model.safetensors")
        effect = {name for name, tensor in after.items() if "lora_B" in name and tensor.any()}
        assert effect == {name for name in after if "lora_B" in name and "layers.3." in name}


def test_more_layers_than_there_are_is_an_error_that_says_how_many():
    with pytest.raises(ConfigurationError, match=r"none of 3 layers.*at most 2"):
        freeze_lowest_layers(AutoModel.from_config(OPT), 3)


def test_frozen_parts_of_a_pooling_keep_their_first_values_and_the_others_train(tmp_path, make_recipe):
    weights = []
    for steps in (2, 3):
        model = {"freeze_pooling": ["latents", "to_query"]}
        recipe = make_recipe(
            {"output_dir": str(tmp_path / str(steps)), "model": model, "training": {"max_steps": steps}}
        )
        weights.append(load_file(train(recipe).model_dir / "1_MultiLayerPooling/model.safetensors"))
    kept = {name for name, weight in weights[0].items() if torch.equal(weight, weights[1][name])}
    assert kept == {"cross_attention.latents", "cross_attention.to_query.weight"}


def test_parts_that_a_pooling_lacks_and_freezing_all_are_refused():
    pooling = MultiLayerPooling(8, num_layers=2)
    with pytest.raises(ConfigurationError, match=r"no part 'latent'; there are .*Did you mean 'latents'"):
        freeze_pooling(pooling, ["latent"])
    with pytest.raises(ConfigurationError, match="leaves no weight"):
        freeze_pooling(pooling, ["cross_attention", "layer_table", "to_embedding"])
