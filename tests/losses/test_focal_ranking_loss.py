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
from st_llmpool.losses.focal_ranking_loss import (
    CachedFocalRankingLoss,
    FocalRankingLoss,
    RankingObjective,
    gather_documents,
)
from st_llmpool.losses.hard_negative_mixing import HardNegativeMixing
from st_llmpool.losses.settings import MixingSettings
from st_llmpool.modules.errors import ConfigurationError, InputError
from tests.losses.slow_ranking_loss import random_columns, slow_loss

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


def loss_of(objective: RankingObjective, columns: list[Tensor], scale: float) -> Tensor:
    documents, positives, batch_size = gather_documents(columns[1:], gather_across_devices=False)
    return objective.losses(columns[0], documents, positives, scale=scale, batch_size=batch_size).mean()


def gradients_of(loss: Tensor, columns: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, columns))


MIXINGS = {
    "none": None,
    "pairs": MixingSettings(hardest=3, pairwise=4, listwise=False),
    "list": MixingSettings(hardest=4, pairwise=0),
    "both": MixingSettings(hardest=100, pairwise=2),
    "both, with gradient": MixingSettings(hardest=3, pairwise=2, detach=False),
}


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("gamma", "detach_focal"), [(0.0, True), (0.5, True), (0.5, False), (2.0, False)])
@pytest.mark.parametrize("negatives", [0, 2])
def test_loss_and_gradients_are_the_formula(mixing, gamma, detach_focal, negatives):
    columns = random_columns(rows=5, negatives=negatives)
    made = None if MIXINGS[mixing] is None else HardNegativeMixing(MIXINGS[mixing], seed=3)
    expected = slow_loss(columns, scale=8.0, gamma=gamma, detach_focal=detach_focal, mixing=made)
    loss = loss_of(RankingObjective(gamma, detach_focal, made), columns, scale=8.0)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for found, wanted in zip(gradients_of(loss, columns), gradients_of(expected, columns), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("detach_focal", [True, False])
@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_the_gradient_is_finite_where_a_query_is_sure_in_float32(gamma, detach_focal):
    queries = torch.eye(3, requires_grad=True)
    documents = torch.cat([torch.eye(3), -torch.eye(3)]).requires_grad_()  # at scale 100, 1 - P is about 1e-43
    columns = [queries, *documents.chunk(2)]
    naive = torch.softmax(100 * queries @ documents.T, dim=1).diagonal()
    assert (naive == 1).all()
    naive_loss = ((1 - naive) ** gamma * -naive.log()).mean()
    assert gamma == 1.0 or torch.autograd.grad(naive_loss, queries)[0].isnan().any()
    loss = loss_of(RankingObjective(gamma, detach_focal), columns, scale=100.0)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, [queries, documents]))


@pytest.mark.parametrize("detach_focal", [True, False])
def test_float32_keeps_the_weight_of_a_nearly_sure_query(detach_focal):
    columns = [torch.eye(2), torch.eye(2)]  # 1 - P is about 2e-9, which 1 - P in float32 cannot say
    objective = RankingObjective(0.5, detach_focal)
    expected = slow_loss([column.double() for column in columns], scale=20.0, gamma=0.5)
    torch.testing.assert_close(loss_of(objective, columns, 20.0).double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("detach_focal", [True, False])
def test_a_query_that_finds_nothing_counts_in_full(detach_focal):
    columns = [torch.eye(2, requires_grad=True), torch.eye(2).flip(0)]
    loss = loss_of(RankingObjective(0.5, detach_focal), columns, scale=1000.0)
    torch.testing.assert_close(loss, torch.tensor(1000.0))
    assert torch.autograd.grad(loss, columns[0])[0].isfinite().all()


def test_a_single_query_without_negatives_has_nothing_to_learn():
    columns = random_columns(rows=1, negatives=0)
    for mixing in (None, HardNegativeMixing(MixingSettings())):
        loss = loss_of(RankingObjective(0.5, mixing=mixing), columns, scale=20.0)
        assert loss.item() == 0
        assert all((gradient == 0).all() for gradient in gradients_of(loss, columns))


@pytest.mark.parametrize("detach", [True, False])
def test_under_autocast_the_loss_is_that_of_float32_up_to_its_rounding(detach):
    columns = random_columns(rows=6, negatives=1, dtype=torch.float32)
    mixing = HardNegativeMixing(MixingSettings(hardest=3, detach=detach))
    expected = loss_of(RankingObjective(0.5, detach, mixing), columns, scale=20.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(RankingObjective(0.5, detach, mixing), columns, scale=20.0)
    torch.testing.assert_close(loss.float(), expected, rtol=0.1, atol=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients_of(loss, columns))


def test_gathered_documents_are_the_positives_first_then_each_column():
    columns = random_columns(rows=3, negatives=2)
    documents, positives, batch_size = gather_documents(columns[1:], gather_across_devices=False)
    assert torch.equal(documents, torch.cat(columns[1:]))
    assert (positives.tolist(), batch_size) == ([0, 1, 2], 3)


@pytest.mark.parametrize("gamma", [-0.1, float("nan"), float("inf")])
def test_a_gamma_that_cannot_weigh_is_refused(gamma):
    with pytest.raises(ConfigurationError, match=f"focal_gamma={gamma} must be 0 or more"):
        RankingObjective(gamma)
