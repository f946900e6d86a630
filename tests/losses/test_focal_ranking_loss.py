"""The losses on a model: plain, cached and Matryoshka forms against the formula, and against sentence-transformers."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from st_llmpool import build_embedder
from st_llmpool.losses.focal_ranking_loss import CachedFocalRankingLoss, FocalRankingLoss
from st_llmpool.losses.hard_negative_mixing import HardNegativeMixing
from st_llmpool.losses.settings import MixingSettings
from st_llmpool.modules.errors import InputError
from tests.losses.slow_ranking_loss import slow_loss

COLUMNS = [
    ["fox", "dog", "cat", "over the lazy"],
    ["quick brown fox", "the lazy dog", "a cat", "jumps over"],
    ["brown", "lazy", "the quick dog jumps", "fox"],
    ["dog over fox", "quick", "lazy cat", "the"],
]
OFF = MixingSettings(pairwise=0, listwise=False)


@pytest.fixture(scope="module")
def model(tiny_llm: str) -> SentenceTransformer:
    """In float64, so that differences are mistakes and not rounding."""
    return build_embedder(tiny_llm, pooling="mean", device="cpu", verify=False).double()


def gradients(model: SentenceTransformer, loss: nn.Module) -> dict[str, Tensor]:
    """Runs the loss forward and backward; its value stands among the gradients."""
    model.zero_grad()
    value = loss([model.preprocess(texts) for texts in COLUMNS], None)
    value.backward()
    return {"loss": value.detach()} | {name: weight.grad.clone() for name, weight in model.named_parameters()}


def slow_gradients(model: SentenceTransformer, dimensions: list[int], **options: object) -> dict[str, Tensor]:
    """The same by the formula, on embeddings of which only the first dimensions are left."""
    model.zero_grad()
    embeddings = [model(model.preprocess(texts))["sentence_embedding"] for texts in COLUMNS]
    value = sum(slow_loss([rows[:, :size] for rows in embeddings], scale=20.0, **options) for size in dimensions)
    value.backward()
    return {"loss": value.detach()} | {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-6, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def build(form: str, model: SentenceTransformer, **options: object) -> nn.Module:
    if form == "plain":
        return FocalRankingLoss(model, **options)
    return CachedFocalRankingLoss(model, mini_batch_size=3, **options)  # 3 leaves a last part of one query


@pytest.mark.parametrize("form", ["plain", "cached"])
@pytest.mark.parametrize("dimensions", [[32], [32, 8]], ids=["whole", "matryoshka"])
@pytest.mark.parametrize("detach", [True, False])
def test_gradients_are_those_of_the_formula_in_every_form(model, form, dimensions, detach):
    mixing = HardNegativeMixing(MixingSettings(hardest=3, detach=detach), seed=5)
    loss = build(form, model, focal_gamma=0.5, detach_focal=detach, mixing=mixing)
    if len(dimensions) > 1:
        loss = MatryoshkaLoss(model, loss, dimensions)
    expected = slow_gradients(model, dimensions, gamma=0.5, detach_focal=detach, mixing=mixing)
    assert_same(gradients(model, loss), expected)


@pytest.mark.parametrize("form", ["plain", "cached"])
@pytest.mark.parametrize("mixing", [None, OFF, MixingSettings(start_step=1)], ids=["none", "zero", "not yet"])
def test_gamma_zero_without_mixed_negatives_is_exactly_sentence_transformers_loss(model, form, mixing):
    mixing = None if mixing is None else HardNegativeMixing(mixing)
    loss = build(form, model, focal_gamma=0.0, mixing=mixing)
    if form == "plain":
        original: nn.Module = MultipleNegativesRankingLoss(model)
    else:
        original = CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    found, expected = gradients(model, loss), gradients(model, original)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_vanishing_gamma_leads_to_sentence_transformers_loss(model):
    found = gradients(model, FocalRankingLoss(model, focal_gamma=1e-12))
    assert_same(found, gradients(model, MultipleNegativesRankingLoss(model)))


def test_evaluation_without_gradients_gives_the_same_loss(model):
    mixing = HardNegativeMixing(MixingSettings(hardest=3))
    for form in ("plain", "cached"):
        loss = build(form, model, mixing=mixing)
        expected = gradients(model, loss)["loss"]
        with torch.no_grad():
            assert torch.equal(loss([model.preprocess(texts) for texts in COLUMNS], None), expected)


def test_queries_alone_are_refused(model):
    with pytest.raises(InputError, match="at least two columns"):
        FocalRankingLoss(model).compute_loss_from_embeddings([torch.randn(2, 3)], None)


@pytest.mark.parametrize("form", ["plain", "cached"])
def test_the_model_card_says_what_was_weighed_and_mixed(model, form):
    config = build(form, model, focal_gamma=0.7, mixing=HardNegativeMixing(MixingSettings(hardest=5))).get_config_dict()
    assert (config["scale"], config["focal_gamma"], config["mixing"]["hardest"]) == (20.0, 0.7, 5)
    assert ("mini_batch_size" in config) == (form == "cached")
