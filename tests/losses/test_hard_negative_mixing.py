"""Mixed negatives: from the hardest, of length 1, drawn by seed and step alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from st_llmpool.losses.hard_negative_mixing import HardNegativeMixing
from st_llmpool.losses.settings import MixingSettings
from st_llmpool.modules.errors import ConfigurationError


def scores_of(queries: Tensor, documents: Tensor) -> Tensor:
    scores = 20 * F.normalize(queries, dim=1) @ F.normalize(documents, dim=1).T
    return scores.fill_diagonal_(-torch.inf)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    documents = 5 * torch.randn(12, 7)
    return documents, scores_of(torch.randn(6, 7), documents)


def test_every_pair_is_a_blend_of_two_of_the_hardest(batch):
    documents, scores = batch
    mixing = HardNegativeMixing(MixingSettings(hardest=3, pairwise=5, listwise=False))
    mixed = mixing.mix(documents, scores, rows=torch.arange(6), batch_size=6)
    assert mixed.shape == (6, 5, 7)
    torch.testing.assert_close(mixed.norm(dim=2), torch.ones(6, 5))
    hardest = scores.argsort(dim=1, descending=True)[:, :3]
    for query in range(6):
        assert query not in hardest[query]
        units = F.normalize(documents[hardest[query]], dim=1)
        for blend in mixed[query]:
            parts = torch.linalg.lstsq(units.T, blend.unsqueeze(1))
            shares = parts.solution.flatten()
            torch.testing.assert_close(units.T @ shares, blend, rtol=1e-4, atol=1e-5)
            assert (shares.abs() > 1e-4).sum() == 2
            assert shares.min() > -1e-4


def test_fewer_negatives_than_asked_for_are_all_mixed(batch):
    documents, scores = batch
    mixing = HardNegativeMixing(MixingSettings(hardest=50, pairwise=0))
    mixed = mixing.mix(documents, scores, rows=torch.arange(6), batch_size=6)
    expected = F.normalize(scores.softmax(dim=1) @ F.normalize(documents, dim=1), dim=1)
    torch.testing.assert_close(mixed[:, 0], expected)


def test_one_negative_cannot_be_mixed():
    documents = torch.randn(2, 7)
    mixing = HardNegativeMixing(MixingSettings())
    assert mixing.mix(documents, scores_of(documents, documents), rows=torch.arange(2), batch_size=2).shape == (2, 0, 7)


def test_a_query_gets_the_same_blends_whatever_part_of_the_batch_is_at_hand(batch):
    documents, scores = batch
    mixing = HardNegativeMixing(MixingSettings())
    whole = mixing.mix(documents, scores, rows=torch.arange(6), batch_size=6)
    parts = [mixing.mix(documents, scores[[row]], rows=torch.tensor([row]), batch_size=6) for row in range(6)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_draws_go_by_seed_and_step_and_leave_other_random_numbers_alone():
    before = torch.get_rng_state()
    mixing = HardNegativeMixing(MixingSettings(), seed=1)
    first = mixing.draw(8, 4)
    mixing.on_step_begin(None, SimpleNamespace(global_step=1), None)
    second = mixing.draw(8, 4)
    other = HardNegativeMixing(MixingSettings(), seed=2).draw(8, 4)
    again = HardNegativeMixing(MixingSettings(), seed=1).draw(8, 4)
    assert all(torch.equal(*parts) for parts in zip(first, again, strict=True))
    assert not torch.equal(first[2], second[2])
    assert not torch.equal(first[2], other[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_pairs_are_two_different_negatives_each_as_often_as_any_other_with_a_uniform_share():
    first, second, share = HardNegativeMixing(MixingSettings(pairwise=10)).draw(1000, 5)
    assert (first != second).all()
    counts = torch.bincount((first * 5 + second).flatten(), minlength=25).view(5, 5)
    assert stats.chisquare(counts[~torch.eye(5, dtype=torch.bool)]).pvalue > 1e-3
    assert stats.kstest(share.flatten(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("detach", [True, False])
def test_only_mixed_negatives_that_are_not_detached_move_what_they_are_made_of(batch, detach):
    documents, scores = (part.clone().requires_grad_() for part in batch)
    mixing = HardNegativeMixing(MixingSettings(hardest=3, pairwise=2, detach=detach))
    mixed = mixing.mix(documents, scores, rows=torch.arange(6), batch_size=6)
    assert mixed.requires_grad != detach
    if not detach:
        mixed.sum().backward()
        assert documents.grad.abs().sum() > 0
        assert scores.grad.isfinite().all()


def test_mixing_is_on_from_its_step_if_there_is_anything_to_mix():
    mixing = HardNegativeMixing(MixingSettings(start_step=3))
    for step, is_on in [(0, False), (2, False), (3, True), (4, True)]:
        mixing.on_step_begin(None, SimpleNamespace(global_step=step), None)
        assert mixing.is_on == is_on
    assert not HardNegativeMixing(MixingSettings(pairwise=0, listwise=False)).is_on


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hardest": 1}, "loss.mixing.hardest=1 must be at least 2"),
        ({"pairwise": -1}, "loss.mixing.pairwise=-1 must be at least 0"),
        ({"start_step": -5}, "loss.mixing.start_step=-5 must be at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        MixingSettings(**settings)
