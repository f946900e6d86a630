"""Latent-attention pooling: the last layer's real tokens, padded on any side or flat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.modules.latent_attention_pooling import LatentAttentionPooling
from tests.modules.cross_attention_reference import paper_weights, slow_cross_attention
from tests.modules.token_batches import embed, padded

QUERIES = ["latents", "inputs"]


def trained_pooling(**settings) -> LatentAttentionPooling:
    torch.manual_seed(0)
    pooling = LatentAttentionPooling(8, num_latents=3, num_heads=2, **settings)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return pooling


@pytest.mark.parametrize("queries", QUERIES)
def test_embedding_is_the_formula(queries):
    pooling, text, readout = trained_pooling(queries=queries), torch.randn(5, 8), torch.randn(1, 8)
    pooled = torch.tensor(slow_cross_attention(paper_weights(pooling), text, pooling.num_heads, queries))
    expected = readout[0] + pooling.to_embedding.weight.detach() @ pooled
    embedding = embed(pooling, **padded([text], [2], 9), readout=readout)[0]
    torch.testing.assert_close(embedding.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", QUERIES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_embedding_does_not_depend_on_padding_or_flattening(queries, data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    width = max(lengths) + data.draw(st.integers(0, 3))
    left = [data.draw(st.integers(0, width - length)) for length in lengths]
    texts = [torch.randn(length, 8) for length in lengths]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    pooling = trained_pooling(queries=queries, readout_skip=False)
    alone = torch.cat([embed(pooling, **padded([text], [0], len(text))) for text in texts])
    for mode in (pooling.train(), pooling.eval()):
        with torch.no_grad():
            in_batch = embed(mode, **padded(texts, left, width))
            flat = embed(mode, token_embeddings=torch.cat(texts)[None], cu_seq_lens_q=offsets)
        torch.testing.assert_close(in_batch, alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(flat, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries", QUERIES)
def test_padding_gets_no_gradient(queries):
    features = padded([torch.randn(3, 8), torch.randn(5, 8)], [2, 0], 6)
    features["token_embeddings"].requires_grad_()
    embed(trained_pooling(queries=queries, readout_skip=False), **features).square().sum().backward()
    gradient, real = features["token_embeddings"].grad, features["attention_mask"].bool()
    assert gradient[~real].abs().max() == 0
    assert gradient[real].abs().min() > 0


def test_untrained_pooling_is_exactly_the_readout():
    features = padded([torch.randn(3, 8), torch.randn(5, 8)], [2, 0], 6)
    readout = torch.randn(2, 8)
    assert torch.equal(embed(LatentAttentionPooling(8), **features, readout=readout), readout)


@pytest.mark.parametrize("feature", ["token_embeddings", "attention_mask", "readout"])
def test_missing_feature_is_named_with_the_module_that_gives_it(feature):
    features = padded([torch.randn(3, 8)], [0], 3) | {"readout": torch.randn(1, 8)}
    del features[feature]
    with pytest.raises(ConfigurationError, match=f"'{feature}'.*LLMTransformer"):
        embed(LatentAttentionPooling(8), **features)


def test_other_hidden_size_is_refused_with_both_sizes():
    with pytest.raises(ConfigurationError, match="embedding_dimension=16, but the backbone gives 8"):
        embed(LatentAttentionPooling(16), **padded([torch.randn(3, 8)], [0], 3))
