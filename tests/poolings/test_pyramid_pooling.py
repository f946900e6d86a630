"""Pyramid pooling: which tokens are in which bin, and what an empty bin takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.poolings.pyramid_pooling import PyramidPooling
from tests.modules.token_batches import embed, padded


def slow_bins(rows: list[list[float]], level: int) -> list[list[float]]:
    """Cuts a text by hand: tokens and bins are spans of one line, a token belongs where its beginning lies."""
    bins: list[list[list[float]]] = [[] for _ in range(level)]
    width = len(rows) / level  # tokens to a bin
    for place, row in enumerate(rows):
        number = max(bin_ for bin_ in range(level) if bin_ * width <= place + 1e-9)
        bins[number].append(row)
    for number, members in enumerate(bins):
        if not members:
            centre = (number + 0.5) * width
            members.append(min((abs(place + 0.5 - centre), -place, row) for place, row in enumerate(rows))[2])
    return [[sum(column) / len(members) for column in zip(*members, strict=True)] for members in bins]


def values(pooling: PyramidPooling, text: Tensor) -> Tensor:
    """What the projection gets, (S, D)."""
    seen: list[Tensor] = []
    hook = pooling.to_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    embed(pooling, **padded([text], [2], len(text) + 3))
    hook.remove()
    return seen[0].view(-1, text.shape[1])


@pytest.mark.parametrize("length", [*range(1, 13), 100])
@pytest.mark.parametrize("levels", [[1, 2, 4], [3], [5, 1]])
def test_bins_are_those_cut_by_hand(length, levels):
    text = torch.randn(length, 3)
    expected = [row for level in levels for row in slow_bins(text.double().tolist(), level)]
    pooled = values(PyramidPooling(3, levels=levels, readout_skip=False), text)
    torch.testing.assert_close(pooled, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("readout_skip", [True, False])
def test_embedding_is_the_projection_of_the_bins(readout_skip):
    pooling, text, readout = PyramidPooling(3, readout_skip=readout_skip), torch.randn(9, 3), torch.randn(1, 3)
    torch.nn.init.normal_(pooling.to_embedding.weight)
    bins = [value for level in (1, 2, 4) for row in slow_bins(text.double().tolist(), level) for value in row]
    expected = torch.tensor(
        [sum(w * x for w, x in zip(line, bins, strict=True)) for line in pooling.to_embedding.weight.tolist()]
    )
    embedding = embed(pooling, **padded([text], [2], 12), readout=readout)[0]
    torch.testing.assert_close(embedding.detach(), expected + (readout[0] if readout_skip else 0), rtol=1e-5, atol=1e-5)


def test_one_token_fills_every_bin():
    token = torch.randn(1, 3)
    torch.testing.assert_close(values(PyramidPooling(3, readout_skip=False), token), token.expand(7, 3))


def test_an_empty_bin_takes_the_nearest_token():
    first, last = torch.tensor([1.0]), torch.tensor([2.0])
    bins = values(PyramidPooling(1, levels=[4], readout_skip=False), torch.stack([first, last]))
    assert bins.flatten().tolist() == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], r"levels=\[\] must be a list"),
        ("124", "levels='124' must be a list"),
        (4, "levels=4 must be a list"),
        ([1, 0], r"level=0 must be a positive integer"),
        ([1.5], r"level=1.5 must be a positive integer"),
    ],
)
def test_bad_levels_are_refused_by_name(levels, message):
    with pytest.raises(ConfigurationError, match=message):
        PyramidPooling(16, levels=levels)
