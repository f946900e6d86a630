"""What holds for every pooling over a set: only real vectors count, wherever they lie, and layers can be compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from st_llmpool import build_embedder
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.modules.trainable_pooling import TrainablePooling
from st_llmpool.poolings.attsets_pooling import AttSetsPooling
from st_llmpool.poolings.generalized_mean_pooling import GeneralizedMeanPooling
from st_llmpool.poolings.hopfield_pooling import HopfieldPooling
from st_llmpool.poolings.ponet_pooling import PoNetPooling
from st_llmpool.poolings.pyramid_pooling import PyramidPooling
from st_llmpool.poolings.set_pooling import SetPooling
from tests.modules.token_batches import embed, flat, padded

Build = Callable[..., TrainablePooling]
OVER_TOKENS = [
    HopfieldPooling,
    lambda *args, **options: HopfieldPooling(*args, update_steps=3, **options),
    AttSetsPooling,
    GeneralizedMeanPooling,
    PyramidPooling,
    lambda *args, **options: PoNetPooling(*args, segment_length=2, **options),
]
NAMES = ["hopfield", "hopfield, 3 updates", "attsets", "gem", "pyramid", "ponet"]
every_pooling = pytest.mark.parametrize("build", OVER_TOKENS, ids=NAMES)
every_set_pooling = pytest.mark.parametrize("build", OVER_TOKENS[:-1], ids=NAMES[:-1])


def trained(build: Build, *args: int, **options: object) -> TrainablePooling:
    torch.manual_seed(0)
    pooling = build(*args, **options)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return pooling


@every_pooling
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_embedding_does_not_depend_on_padding_neighbours_or_flattening(build, data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    width = max(lengths) + data.draw(st.integers(0, 3))
    left = [data.draw(st.integers(0, width - length)) for length in lengths]
    texts = [torch.randn(length, 8) for length in lengths]
    pooling = trained(build, 8, readout_skip=False)
    alone = torch.cat([embed(pooling, **padded([text], [0], len(text))) for text in texts])
    torch.testing.assert_close(embed(pooling, **padded(texts, left, width)), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(embed(pooling, **flat(texts)), alone, rtol=0, atol=1e-5)


@every_pooling
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_padding_has_no_effect_and_no_gradient_whatever_it_holds(build, junk):
    texts, pooling = [torch.randn(3, 8), torch.randn(5, 8)], trained(build, 8, readout_skip=False)
    expected = embed(pooling, **padded(texts, [2, 0], 6))
    features = padded(texts, [2, 0], 6)
    real = features["attention_mask"].bool()
    features["token_embeddings"][~real] = junk
    features["token_embeddings"].requires_grad_()
    embedding = embed(pooling, **features)
    assert torch.equal(embedding, expected)
    embedding.square().sum().backward()
    gradient = features["token_embeddings"].grad
    assert gradient[~real].abs().max() == 0
    assert gradient[real].abs().sum(dim=1).min() > 0
    assert all(parameter.grad.isfinite().all() for parameter in pooling.parameters())


@every_pooling
def test_untrained_pooling_is_exactly_the_readout_and_trains_whole_from_there(build):
    features, readout = padded([torch.randn(3, 8), torch.randn(5, 8)], [2, 0], 6), torch.randn(2, 8)
    pooling = build(8)
    assert torch.equal(embed(pooling, **features, readout=readout), readout)
    optimizer = torch.optim.SGD(pooling.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves the projection, the second all that lies before it
        optimizer.zero_grad()
        embed(pooling, **features, readout=readout).square().sum().backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in pooling.parameters())


@pytest.mark.parametrize("build", [AttSetsPooling, PyramidPooling], ids=["attsets", "pyramid"])
def test_without_the_skip_an_untrained_pooling_is_the_mean_of_its_values(build):
    text = torch.randn(8, 4)  # 8 tokens fill bins of equal size, so their mean is the text's
    pooled = embed(build(4, readout_skip=False), **padded([text], [1], 10))
    torch.testing.assert_close(pooled.detach(), text.mean(dim=0, keepdim=True))


@every_set_pooling
def test_layers_are_pooled_as_tokens_are_once_they_are_normalised(build):
    summaries = torch.randn(2, 5, 8) * torch.tensor([1.0, 100.0, 0.01, 7.0, 3.0]).view(1, 5, 1) + 2
    over_layers = trained(build, 8, reads="layers", num_layers=5, readout_skip=False)
    over_tokens = trained(build, 8, readout_skip=False)
    mean, deviation = summaries.mean(dim=2, keepdim=True), summaries.var(dim=2, keepdim=True, unbiased=False)
    normalised = (summaries - mean) / (deviation + 1e-5).sqrt()
    expected = embed(over_tokens, **padded(list(normalised), [0, 0], 5))
    torch.testing.assert_close(embed(over_layers, layer_summaries=summaries), expected, rtol=1e-4, atol=1e-5)


@every_set_pooling
def test_a_model_over_layers_survives_saving_with_what_it_reads(build):
    config = build(8, reads="layers", num_layers=5).get_config_dict()
    assert (config["reads"], config["num_layers"], config["readout_skip"]) == ("layers", 5, True)


def test_a_model_over_chosen_layers_reads_those(tiny_llm):
    arguments = {"pooling": "attsets", "layers": [1, -1], "verify": False}
    model = build_embedder(tiny_llm, pooling_kwargs={"reads": "layers"}, **arguments)
    assert (model[0].layers, model[1].num_layers) == ([1, 4], 2)
    assert build_embedder(tiny_llm, **arguments)[0].layers == []


def test_a_pooling_that_reads_one_thing_only_refuses_to_be_told(tiny_llm):
    with pytest.raises(ConfigurationError, match="reads"):
        build_embedder(tiny_llm, pooling="ponet", pooling_kwargs={"reads": "layers"}, verify=False)


class MeanPooling(SetPooling):
    def pool_set(self, vectors: Tensor, mask: Tensor) -> Tensor:
        return vectors.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def test_a_projection_of_another_size_stays_without_the_skip():
    class Twice(MeanPooling):
        def __init__(self) -> None:
            super().__init__(3, readout_skip=False)

            self.project_from(6)

        def pool_set(self, vectors: Tensor, mask: Tensor) -> Tensor:
            return super().pool_set(vectors, mask).repeat(1, 2)

    pooling, text = Twice(), torch.randn(2, 3)
    expected = F.linear(text.mean(dim=0).repeat(2), pooling.to_embedding.weight)
    torch.testing.assert_close(embed(pooling, **padded([text], [0], 2))[0], expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reads": "layer"}, "reads='layer' is unknown.*Did you mean 'layers'"),
        ({"reads": "layers"}, "num_layers=None must be a positive integer"),
        ({"num_layers": 3}, "num_layers=3 does not apply to reads='tokens'"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        MeanPooling(8, **settings)


@pytest.mark.parametrize(
    ("options", "features", "message"),
    [
        ({}, {}, "'token_embeddings'.*LLMTransformer"),
        ({}, {"token_embeddings": torch.ones(1, 2, 8)}, "'attention_mask'.*LLMTransformer"),
        ({}, padded([torch.ones(1, 4)], [0], 1), "embedding_dimension=8, but the backbone gives 4"),
        ({}, padded([torch.ones(1, 8)], [0], 1), "'readout'.*readout_skip=False"),
        ({"reads": "layers", "num_layers": 3}, {}, "'layer_summaries'.*LLMTransformer"),
        ({"reads": "layers", "num_layers": 3}, {"layer_summaries": torch.ones(1, 2, 8)}, "num_layers=3.*gives 2"),
    ],
)
def test_features_that_do_not_fit_are_refused_by_name(options, features, message):
    with pytest.raises(ConfigurationError, match=message):
        MeanPooling(8, **options)(dict(features))
