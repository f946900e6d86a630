"""PoNet: global, segment and local tokens, their fusion, and where segments lie."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from st_llmpool import build_embedder
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.poolings.ponet_pooling import PoNetPooling
from tests.modules.token_batches import embed, flat, padded


def trained_pooling(**settings) -> PoNetPooling:
    torch.manual_seed(0)
    pooling = PoNetPooling(6, num_heads=2, **settings)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return pooling


def slow_pool(pooling: PoNetPooling, rows: list[list[float]], segments: list[int]) -> list[float]:
    """One token and feature at a time, in Python floats."""
    size, count = len(rows[0]), len(rows)
    weight, bias = pooling.to_parts.weight.double().tolist(), pooling.to_parts.bias.double().tolist()
    projected = [
        [sum(w * x for w, x in zip(line, row, strict=True)) + b for line, b in zip(weight, bias, strict=True)]
        for row in rows
    ]
    q, k, v, s, l, o = ([row[part * size : (part + 1) * size] for row in projected] for part in range(6))  # noqa: E741
    mean_query = [sum(column) / count for column in zip(*q, strict=True)]
    width = size // pooling.num_heads
    whole: list[float] = []
    for head in range(pooling.num_heads):
        part = range(head * width, (head + 1) * width)
        powers = [math.exp(sum(mean_query[d] * k[t][d] for d in part) / math.sqrt(width)) for t in range(count)]
        whole += [sum(powers[t] * v[t][d] for t in range(count)) / sum(powers) for d in part]
    total = [0.0] * size
    for token in range(count):
        for d in range(size):
            segment = max(s[t][d] for t in range(count) if segments[t] == segments[token])
            local = max(l[t][d] for t in range(count) if abs(t - token) <= 1)
            total[d] += whole[d] * o[token][d] + segment * o[token][d] + local
    return [value / count for value in total]


@pytest.mark.parametrize(("length", "segment_length"), [(1, 16), (5, 2), (6, 3), (40, 16)])
@pytest.mark.parametrize("readout_skip", [True, False])
def test_embedding_is_the_formula(length, segment_length, readout_skip):
    pooling = trained_pooling(segment_length=segment_length, readout_skip=readout_skip)
    text, readout = torch.randn(length, 6), torch.randn(1, 6)
    segments = [place // segment_length for place in range(length)]
    expected = torch.tensor(slow_pool(pooling, text.double().tolist(), segments))
    if readout_skip:
        expected = readout[0] + pooling.to_embedding.weight.detach() @ expected
    embedding = embed(pooling, **padded([text], [3], length + 4), readout=readout)[0]
    torch.testing.assert_close(embedding.detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_segment_is_sixteen_tokens_unless_told_otherwise():
    assert PoNetPooling(8).segment_length == 16


def test_sentence_starts_make_the_segments():
    pooling = trained_pooling(readout_skip=False)
    texts = [torch.randn(7, 6), torch.randn(4, 6)]
    starts = [torch.tensor([1, 0, 0, 1, 1, 0, 0]), torch.tensor([0, 0, 1, 0])]  # the second begins within a sentence
    segments = [[0, 0, 0, 1, 2, 2, 2], [0, 0, 1, 1]]
    expected = torch.tensor(
        [slow_pool(pooling, text.double().tolist(), part) for text, part in zip(texts, segments, strict=True)]
    )
    features = padded(texts, [0, 3], 7)
    features["sentence_starts"] = torch.ones(2, 7, dtype=torch.long)  # junk on padding
    for row, (left, start) in enumerate(zip([0, 3], starts, strict=True)):
        features["sentence_starts"][row, left : left + len(start)] = start
    in_batch = embed(pooling, **features)
    torch.testing.assert_close(in_batch.detach(), expected, rtol=1e-5, atol=1e-5)
    in_line = embed(pooling, **flat(texts), sentence_starts=torch.cat(starts)[None])
    torch.testing.assert_close(in_line.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_sentence_starts_pass_the_backbone_untouched(tiny_llm, include_prompt):
    model = build_embedder(tiny_llm, pooling="ponet", verify=False, device="cpu").eval()
    model.set_pooling_include_prompt(include_prompt)
    torch.nn.init.normal_(model[1].to_embedding.weight)
    features = dict(model.preprocess(["fox over the lazy dog"])) | {"prompt_length": 2}
    length = features["input_ids"].shape[1]

    def embedding(**more: Tensor) -> Tensor:
        with torch.no_grad():
            return model({**features, **more})["sentence_embedding"]

    one, three = torch.zeros(1, length).long(), torch.zeros(1, length).long()
    one[0, 0] = 1
    three[0, [0, 3, 5]] = 1
    torch.testing.assert_close(embedding(sentence_starts=one), embedding())
    assert (embedding(sentence_starts=three) - embedding()).abs().max() > 1e-3
    offsets = torch.tensor([0, length]).int()
    in_line = {"cu_seq_lens_q": offsets, "position_ids": torch.arange(length)[None], "sentence_starts": three}
    torch.testing.assert_close(embedding(**in_line), embedding(sentence_starts=three))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide embedding_dimension=16"),
        ({"num_heads": 0}, "num_heads=0 must be a positive integer"),
        ({"segment_length": 0}, "segment_length=0 must be a positive integer"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        PoNetPooling(16, **settings)
