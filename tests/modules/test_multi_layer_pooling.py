"""Multi-layer pooling: layer weights, cross-attention over layers, the skip around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.modules.multi_layer_pooling import MultiLayerPooling
from tests.modules.cross_attention_reference import paper_weights, slow_cross_attention


def trained_pooling(**settings) -> MultiLayerPooling:
    torch.manual_seed(0)
    pooling = MultiLayerPooling(8, num_layers=4, num_latents=3, num_heads=2, **settings)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return pooling


@pytest.fixture
def features() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"layer_summaries": torch.randn(3, 4, 8) * 5, "readout": torch.randn(3, 8)}


def slow_pool(pooling: MultiLayerPooling, rows: Tensor) -> Tensor:
    return torch.tensor(slow_cross_attention(paper_weights(pooling), rows, pooling.num_heads, pooling.queries))


@pytest.mark.parametrize("queries", ["latents", "inputs"])
@pytest.mark.parametrize("layer_weights", [True, False])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("readout_skip", [True, False])
def test_embedding_is_the_formula(features, queries, layer_weights, layer_norm, readout_skip):
    settings = {"layer_weights": layer_weights, "layer_norm": layer_norm, "readout_skip": readout_skip}
    pooling = trained_pooling(queries=queries, **settings)
    embedding = pooling(dict(features))["sentence_embedding"]
    for index, summaries in enumerate(features["layer_summaries"]):
        if layer_norm:
            centered = summaries - summaries.mean(dim=1, keepdim=True)
            summaries = centered / (centered.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        expected = slow_pool(pooling, summaries + (pooling.layer_table.detach() if layer_weights else 0))
        if readout_skip:
            expected = features["readout"][index] + pooling.to_embedding.weight.detach() @ expected
        torch.testing.assert_close(embedding[index].detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_pooling_is_exactly_the_readout(features, dtype):
    features = {name: tensor.to(dtype) for name, tensor in features.items()}
    assert torch.equal(MultiLayerPooling(8, 4)(dict(features))["sentence_embedding"], features["readout"])


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_layer_weights_act_alike_at_any_scale_of_the_summaries_only_with_the_layer_norm(features, scale):
    features["layer_summaries"] *= scale
    effects = {}
    for layer_norm in (True, False):
        pooling = trained_pooling(layer_norm=layer_norm, readout_skip=False)
        before = pooling(dict(features))["sentence_embedding"]
        with torch.no_grad():
            pooling.layer_table.zero_()
        effects[layer_norm] = float((pooling(dict(features))["sentence_embedding"] - before).norm() / before.norm())
    assert effects[True] > 0.1
    assert effects[False] < 0.1 or scale < 100


@pytest.mark.parametrize(("settings", "spread"), [({}, 0.02), ({"init_std": 1.0}, 1.0), ({"layer_norm": True}, 1.0)])
def test_layer_weights_start_small_or_at_the_scale_of_what_they_are_added_to(settings, spread):
    torch.manual_seed(0)
    pooling = MultiLayerPooling(64, num_layers=32, num_latents=64, num_heads=2, **settings)
    assert float(pooling.layer_table.std()) == pytest.approx(spread, rel=0.1)
    assert float(pooling.cross_attention.latents.std()) == pytest.approx(settings.get("init_std", 0.02), rel=0.1)


@pytest.mark.parametrize(("heads", "head_dim", "rate"), [(2, 4, 1e-3), (4, 128, 5e-4), (32, 2048, 1e-3 / 256)])
def test_the_default_learning_rate_falls_with_the_width(heads, head_dim, rate):
    with torch.device("meta"):
        pooling = MultiLayerPooling(8, num_layers=2, num_heads=heads, head_dim=head_dim)
    assert pooling.default_learning_rate == pytest.approx(rate)


def test_first_step_of_training_moves_the_skip_and_the_second_everything(features):
    pooling = MultiLayerPooling(8, 4)
    optimizer = torch.optim.SGD(pooling.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        pooling(dict(features))["sentence_embedding"].square().sum().backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in pooling.parameters())


def test_order_of_layers_matters_only_through_the_layer_weights(features):
    shuffled = {**features, "layer_summaries": features["layer_summaries"][:, [2, 0, 3, 1]]}
    for layer_weights in (True, False):
        pooling = trained_pooling(layer_weights=layer_weights)
        outputs = [pooling(dict(part))["sentence_embedding"] for part in (features, shuffled)]
        assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5) != layer_weights


def test_other_number_of_layers_is_refused_with_both_numbers(features):
    with pytest.raises(ConfigurationError, match=r"num_layers=5, but the backbone gives 4 .*num_layers=4"):
        MultiLayerPooling(8, num_layers=5)(features)


def test_other_hidden_size_is_refused_with_both_sizes(features):
    with pytest.raises(ConfigurationError, match="embedding_dimension=16, but the backbone gives 8"):
        MultiLayerPooling(16, num_layers=4)(features)


@pytest.mark.parametrize("feature", ["layer_summaries", "readout"])
def test_missing_feature_is_named_with_the_module_that_gives_it(features, feature):
    del features[feature]
    with pytest.raises(ConfigurationError, match=f"'{feature}'.*LLMTransformer"):
        MultiLayerPooling(8, num_layers=4)(features)
