from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from st_llmpool import build_embedder
from st_llmpool.analysis.layers import (
    LayerAnalysis,
    Probes,
    analyze_layers,
    layer_embeddings,
    linear_cka,
    sample_probes,
    search_score,
    similarity_correlation,
    similarity_score,
)
from st_llmpool.modules.errors import ConfigurationError, DataError

TEXTS = ["the quick fox", "a lazy dog jumps", "over", "brown foxes and dogs", "it jumps"]


@pytest.fixture(scope="module")
def model(tiny_llm):
    torch.manual_seed(0)
    model = build_embedder(tiny_llm, pooling="multi_layer", verify=False)
    torch.nn.init.normal_(model[1].to_embedding.weight, std=0.1)
    torch.nn.init.normal_(model[1].cross_attention.latents)
    return model


@pytest.fixture(scope="module")
def embeddings():
    return torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1)) + 2


def test_linear_cka_is_hsic_of_the_centred_gram_matrices(embeddings):
    texts = len(embeddings)
    centring = np.eye(texts) - 1 / texts

    def hsic(first, second):
        return np.trace(first @ centring @ second @ centring) / (texts - 1) ** 2

    x = embeddings.double().numpy()
    found = linear_cka(embeddings, embeddings)
    for i in range(3):
        for j in range(3):
            k, l = x[:, i] @ x[:, i].T, x[:, j] @ x[:, j].T  # noqa: E741
            assert found[i, j] == pytest.approx(hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l)), abs=1e-10)


def test_correlation_between_layers_is_that_of_their_cosines(embeddings):
    def cosines(layer):
        rows = embeddings[:, layer].double().numpy()
        return [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for n, a in enumerate(rows) for b in rows[n + 1 :]]

    found = similarity_correlation(embeddings)
    for i in range(3):
        for j in range(3):
            assert found[i, j] == pytest.approx(spearmanr(cosines(i), cosines(j)).statistic, abs=1e-10)


@pytest.mark.parametrize("pooling", ["mean", "multi_layer"])
def test_every_layer_is_read_whatever_the_design_reads(tiny_llm, pooling):
    model = build_embedder(tiny_llm, pooling=pooling, verify=False).eval()
    features = model.preprocess(TEXTS)
    with torch.no_grad():
        states = (
            model[0]
            .model(
                input_ids=features["input_ids"], attention_mask=features["attention_mask"], output_hidden_states=True
            )
            .hidden_states[1:]
        )
    mask = features["attention_mask"].unsqueeze(-1)
    expected = torch.stack([(state * mask).sum(1) / mask.sum(1) for state in states], dim=1)
    found = layer_embeddings(model, TEXTS, batch_size=2)
    assert model[0].layer_readout == "mean"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_attention_to_layers_is_that_of_the_formula(model):
    block = model[1].cross_attention
    with torch.no_grad():
        summaries = layer_embeddings(model, TEXTS) + model[1].layer_table
        queries = block.to_query(block.norm_latents(block.latents))
        keys = block.to_key_value(block.norm_inputs(summaries)).chunk(2, dim=-1)[0]
    shares = torch.zeros(summaries.shape[1])
    for keys_of_text in keys:
        for head in range(block.sizes.num_heads):
            part = slice(head * block.sizes.head_dim, (head + 1) * block.sizes.head_dim)
            for query in queries:
                shares += torch.softmax(keys_of_text[:, part] @ query[part] / math.sqrt(block.sizes.head_dim), dim=0)
    shares /= shares.sum()
    report = analyze_layers(None, model, TEXTS)
    assert report.attention == pytest.approx(shares.tolist(), abs=1e-5)
    assert max(report.attention) - min(report.attention) > 1e-3
    assert report.weight_norms == pytest.approx(np.linalg.norm(model[1].layer_table.detach().numpy(), axis=1))


def test_the_same_model_before_and_after_has_not_changed(model):
    report = analyze_layers(model, model, TEXTS)
    assert report.change == pytest.approx([1.0] * 4)
    assert report.before == report.after
    assert LayerAnalysis.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def test_design_that_reads_no_layers_has_no_shares(tiny_llm):
    report = analyze_layers(None, build_embedder(tiny_llm, pooling="mean", verify=False))
    assert (report.read, report.attention, report.weight_norms, report.moved) == ([], None, None, None)
    assert len(report.after.similarity) == len(report.after.search) == 4


def test_too_few_texts_are_refused(model):
    with pytest.raises(ConfigurationError, match="at least 3"):
        analyze_layers(None, model, TEXTS[:2])


def test_search_score_of_one_answer_is_the_discount_of_its_rank():
    documents = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    queries = torch.tensor([[0.7, 0.7], [0.6, 0.8]])  # to the first the second document is nearest, then both others
    assert search_score(queries, documents) == pytest.approx((1 / math.log2(4) + 1) / 2)
    far = torch.cat([torch.tensor([[-1.0, 0.0]]), torch.tensor([[1.0, 0.0]]).repeat(10, 1)])
    assert search_score(torch.tensor([[1.0, 0.0]]), far) == 0


def test_similarity_score_is_spearman_of_cosines():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(8, 3, generator=generator) for _ in range(2))
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(first, second, strict=True)]
    scores = [3.0, 1.0, 2.0, 5.0, 4.0, 0.0, 1.5, 2.5]
    assert similarity_score(first, second, scores) == pytest.approx(spearmanr(cosines, scores).statistic)
    assert math.isnan(similarity_score(torch.ones(3, 2), torch.ones(3, 2), [1.0, 2.0, 3.0]))


def test_fewer_documents_than_queries_are_refused():
    with pytest.raises(DataError, match="a document for each query"):
        Probes(sample_probes().pairs, ("a", "b"), ("a",))
