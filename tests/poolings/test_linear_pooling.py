"""The linear map of the readout: the formula, and what it may learn."""

import pytest
import torch

from st_llmpool import build_embedder
from st_llmpool.poolings.linear_pooling import LinearPooling


def test_embedding_is_the_readout_and_its_linear_map():
    torch.manual_seed(0)
    pooling, readout = LinearPooling(3), torch.randn(2, 3)
    with torch.no_grad():
        pooling.to_embedding.weight.normal_()
    embedding = pooling({"readout": readout})["sentence_embedding"].detach()
    matrix = pooling.to_embedding.weight.tolist()
    for text in range(2):
        row = readout[text].tolist()
        expected = [row[i] + sum(matrix[i][j] * row[j] for j in range(3)) for i in range(3)]
        assert embedding[text].tolist() == pytest.approx(expected, rel=1e-5)


def test_untrained_it_is_the_plain_design_of_its_readout(tiny_llm):
    texts = ["a quick brown fox", "two dogs"]
    for attention, readout in (("causal", "eos"), ("bidirectional", "mean"), ("causal", "mean")):
        linear = build_embedder(tiny_llm, attention=attention, pooling="linear", layer_readout=readout)
        plain = build_embedder(tiny_llm, attention=attention, pooling=readout)
        torch.testing.assert_close(
            linear.encode(texts, convert_to_tensor=True), plain.encode(texts, convert_to_tensor=True)
        )
