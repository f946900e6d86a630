from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, layer_norm

from st_llmpool import build_embedder
from st_llmpool.model_card.layer_use import SAMPLE_TEXTS, layer_use
from st_llmpool.modules.errors import ConfigurationError


@pytest.fixture
def model(tiny_llm):
    """A scalar mix without the readout skip: the embedding is the weighted sum of the summaries."""
    model = build_embedder(tiny_llm, pooling="scalar_mix", verify=False)
    torch.nn.init.normal_(model[1].layer_scores, generator=torch.Generator().manual_seed(0))
    return model


def test_a_scalar_mix_moves_as_its_formula_says(model):
    weights = torch.softmax(model[1].layer_scores.detach(), 0)
    with torch.no_grad():
        features = model[0](model.preprocess(list(SAMPLE_TEXTS)))
    summaries = features["layer_summaries"].float()
    size = summaries.shape[-1]
    mean = summaries.mean(0)

    def embed(silenced: list[int]) -> torch.Tensor:
        rows = []
        for text in range(len(SAMPLE_TEXTS)):
            features_of_one = [mean[i] if i in silenced else summaries[text, i] for i in range(len(weights))]
            rows.append(
                sum(weight * layer_norm(row, (size,)) for weight, row in zip(weights, features_of_one, strict=True))
            )
        return torch.stack(rows)

    use = layer_use(model)
    for index, moved in enumerate(use.moved):
        expected = (1 - cosine_similarity(embed([]), embed([index]))).mean().item()
        assert moved == pytest.approx(expected, abs=1e-6)
    everything = (1 - cosine_similarity(embed([]), embed(list(range(len(weights)))))).mean().item()
    assert use.total == pytest.approx(everything, abs=1e-6)
    assert use.layers == tuple(model[0].layers)


def test_a_pooling_that_ignores_a_layer_shows_nothing_for_it(model):
    with torch.no_grad():
        model[1].layer_scores[:] = torch.tensor([-1e9] + [0.0] * (len(model[1].layer_scores) - 1))
    use = layer_use(model)
    assert use.moved[0] == pytest.approx(0, abs=1e-6)
    assert min(use.moved[1:]) > 1e-5


def test_the_model_is_in_training_mode_again_afterwards(model):
    model.train()
    layer_use(model)
    assert model.training


def test_what_cannot_be_measured_is_refused(model, tiny_llm):
    with pytest.raises(ConfigurationError, match="at least 2"):
        layer_use(model, ["one"])
    with pytest.raises(ConfigurationError, match="reads only the last layer"):
        layer_use(build_embedder(tiny_llm, pooling="mean", verify=False))
