"""Which loss a recipe gets, what it refuses, and what guide, teacher and Matryoshka sizes do to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    DistillKLDivLoss,
    GISTEmbedLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

from st_llmpool import build_embedder
from st_llmpool.data.training_data import DatasetSettings, load_pairs
from st_llmpool.losses import build as losses
from st_llmpool.losses.build import LossParts, build_loss, check_loss, teacher_scores
from st_llmpool.losses.focal_ranking_loss import CachedFocalRankingLoss, FocalRankingLoss
from st_llmpool.losses.hard_negative_mixing import HardNegativeMixing
from st_llmpool.losses.settings import LossSettings, MixingSettings
from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.training import train

QUERIES = ["fox", "dog", "cat"]
POSITIVES = ["quick brown fox", "the lazy dog", "a cat"]
NEGATIVES = ["lazy", "jumps", "over"]


@pytest.fixture(scope="module")
def model(tiny_llm: str) -> SentenceTransformer:
    return build_embedder(tiny_llm, pooling="mean", device="cpu", verify=False)


@pytest.fixture(scope="module")
def other(tiny_llm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of another model, which serves as guide and teacher."""
    folder = tmp_path_factory.mktemp("other") / "model"
    build_embedder(tiny_llm, attention="causal", pooling="max", device="cpu", verify=False).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "plain", "cached"),
    [
        ({}, MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss),
        ({"focal_gamma": 0.5}, FocalRankingLoss, CachedFocalRankingLoss),
        ({"name": "gist"}, GISTEmbedLoss, CachedGISTEmbedLoss),
    ],
)
def test_mini_batches_turn_a_loss_into_its_cached_form(model, other, changes, plain, cached):
    parts = LossParts(guide=SentenceTransformer(other, trust_remote_code=True, device="cpu"))
    assert type(build_loss(model, LossSettings(scale=40.0, **changes), parts)) is plain
    built = build_loss(model, LossSettings(scale=40.0, mini_batch_size=2, **changes), parts)
    assert type(built) is cached
    assert built.mini_batch_size == 2
    assert built.temperature == 1 / 40


def test_the_settings_reach_the_focal_loss(model):
    mixing = HardNegativeMixing(MixingSettings())
    settings = LossSettings(scale=7.0, focal_gamma=0.3, focal_detach=False)
    built = build_loss(model, settings, LossParts(gather=True, mixing=mixing))
    objective = built.objective
    assert (built.scale, built.gather_across_devices) == (7.0, True)
    assert (objective.focal_gamma, objective.detach_focal, objective.mixing) == (0.3, False, mixing)
    assert type(build_loss(model, LossSettings(), LossParts(mixing=mixing))) is FocalRankingLoss


def test_matryoshka_trains_the_named_sizes_and_the_whole(model):
    built = build_loss(model, LossSettings(matryoshka_dims=[16, 8]))
    assert isinstance(built, MatryoshkaLoss)
    assert sorted(built.matryoshka_dims) == [8, 16, 32]
    assert type(built.loss) is MultipleNegativesRankingLoss
    with pytest.raises(ConfigurationError, match=r"matryoshka_dims=\[64\] go beyond the 32 dimensions"):
        build_loss(model, LossSettings(matryoshka_dims=[64]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "infonse"}, "loss.name='infonse' is unknown.*Did you mean 'infonce'"),
        ({"name": "gist"}, "loss.name=gist needs loss.guide"),
        ({"name": "distill"}, "loss.name=distill needs loss.teacher"),
        ({"guide": "x"}, r"loss.guide='x' does not apply to loss.name=infonce.*\['gist'\]"),
        ({"name": "gist", "guide": "x", "focal_gamma": 0.5}, r"loss.focal_gamma=0.5 does not apply.*\['infonce'\]"),
        ({"name": "gist", "guide": "x", "mixing": MixingSettings()}, r"loss.mixing=.* does not apply"),
        ({"name": "distill", "teacher": "x", "mini_batch_size": 2}, r"mini_batch_size=2 .*\['infonce', 'gist'\]"),
    ],
)
def test_options_that_a_loss_lacks_or_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        check_loss(LossSettings(**settings))


def test_teacher_scores_are_its_scaled_similarities_with_its_own_prompts(tmp_path, other, monkeypatch):
    monkeypatch.setattr(losses, "ROWS_AT_A_TIME", 2)
    rows = zip(QUERIES, POSITIVES, NEGATIVES, strict=True)
    lines = [json.dumps(dict(zip(("query", "positive", "negative"), row, strict=True))) for row in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    teacher = SentenceTransformer(other, trust_remote_code=True, device="cpu")
    teacher.prompts["query"] = "find:"
    scored = teacher_scores(
        load_pairs(DatasetSettings(str(tmp_path / "pairs.jsonl"))), teacher, scale=5.0, batch_size=2
    )
    queries = teacher.encode([f"find:{query}" for query in QUERIES])
    documents = [teacher.encode(texts) for texts in (POSITIVES, NEGATIVES)]
    expected = [
        [5 * float(q @ d / np.linalg.norm(q) / np.linalg.norm(d)) for d in pair]
        for q, *pair in zip(queries, *documents, strict=True)
    ]
    np.testing.assert_allclose(scored["label"], expected, rtol=1e-5)
    assert scored.column_names == ["query", "positive", "negative", "label"]


def test_distillation_is_the_divergence_from_the_teachers_distribution(model):
    built = build_loss(model, LossSettings(name="distill", teacher="x", scale=5.0))
    assert type(built) is DistillKLDivLoss
    labels = torch.tensor([[3.0, 1.0], [0.5, 2.0], [1.0, 1.0]])
    loss = built([model.preprocess(texts) for texts in (QUERIES, POSITIVES, NEGATIVES)], labels)
    rows = [model.encode(texts).astype(float) for texts in (QUERIES, POSITIVES, NEGATIVES)]
    expected = 0.0
    for query, positive, negative, label in zip(*rows, labels.double().numpy(), strict=True):
        scores = np.array([5 * query @ positive, 5 * query @ negative])
        student, wanted = (np.exp(part) / np.exp(part).sum() for part in (scores, label))
        expected += (wanted * np.log(wanted / student)).sum() / len(labels)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_a_guide_leaves_out_what_it_holds_for_a_positive_and_does_not_train(model, other):
    guide = SentenceTransformer(other, trust_remote_code=True, device="cpu")
    built = build_loss(model, LossSettings(name="gist", guide=other, scale=50.0), LossParts(guide=guide))
    assert not any(weight.requires_grad for weight in built.guide.parameters())
    assert all(weight.requires_grad for weight in built.model.parameters())
    # To the guide a text is closest to itself, so a query's own text is left out where it stands as a negative.
    with_own = built([model.preprocess(texts) for texts in (QUERIES, POSITIVES, QUERIES)], None)
    columns = (QUERIES, POSITIVES, QUERIES)
    ours, guides = ([normalised(who.encode(texts).astype(float)) for texts in columns] for who in (model, guide))
    assert with_own.item() == pytest.approx(gist_by_hand(ours, guides, scale=50.0), rel=1e-4)
    assert with_own.item() != pytest.approx(gist_by_hand(ours, ours, scale=50.0), rel=1e-3)
    unguided = build_loss(model, LossSettings(scale=50.0))
    assert with_own < unguided([model.preprocess(texts) for texts in (QUERIES, POSITIVES, QUERIES)], None)


def gist_by_hand(ours, guides, *, scale: float) -> float:
    """Solatorio 2024, 2402.16829, equation by equation: a text that the guide finds closer than the positive is out."""
    losses = []
    for row in range(len(ours[0])):
        candidates = [
            (scale * own[of][row] @ own[among][other], guide[of][row] @ guide[among][other], (of, among, other))
            for own, guide in [(ours, guides)]
            for of, among in ((0, 1), (0, 0), (1, 1), (0, 2))
            for other in range(len(ours[0]))
        ]
        limit = guides[0][row] @ guides[1][row]
        kept = [score for score, held, place in candidates if held <= limit or place == (0, 1, row)]
        losses.append(np.log(np.exp(kept).sum()) - scale * ours[0][row] @ ours[1][row])
    return float(np.mean(losses))


def test_a_recipe_trains_with_a_guide(make_recipe, tmp_path, other):
    changes = {"model": {"trust_remote_code": True, "lora": {"lora_dropout": 0.0}}, "loss": {"scale": 100.0}}
    alone = train(make_recipe(changes, f"output_dir={tmp_path / 'alone'}")).report["losses"]
    guided = train(make_recipe(changes, "loss.name=gist", f"loss.guide={other}")).report["losses"]
    assert len(guided) == len(alone) == 2
    assert guided[0] != alone[0]


def test_a_recipe_trains_towards_its_teacher(make_recipe, other):
    training = {"max_steps": 30, "batch_size": 12, "learning_rate": 3e-3, "logging_steps": 1}
    loss = {"name": "distill", "teacher": other}
    recipe = make_recipe({"loss": loss, "model": {"trust_remote_code": True, "tune": "full"}, "training": training})
    curve = [value for _, value in train(recipe).report["losses"]]
    assert curve[-1] < 0.5 * curve[0]


def normalised(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_recipe_with_matryoshka_sizes_reports_each_and_saves_the_one_asked_for(make_recipe, pairs):
    evaluation = {"data": [{"source": pairs, "name": "held"}], "eval_steps": 2}
    changes = {"loss": {"matryoshka_dims": [8, 16]}, "model": {"truncate_dim": 16}, "evaluation": evaluation}
    result = train(make_recipe(changes))
    metrics = result.report["evaluations"][-1][1]
    assert {f"held{size}_cosine_ndcg@10" for size in ("", "_8", "_16")} <= set(metrics)
    assert metrics["held_cosine_ndcg@10"] == metrics["held_16_cosine_ndcg@10"]
    loaded = SentenceTransformer(str(result.model_dir), trust_remote_code=True, device="cpu")
    rows = load_pairs(DatasetSettings(pairs))
    queries, *documents = (loaded.encode(list(rows[name]), truncate_dim=8) for name in rows.column_names)
    scores = normalised(queries) @ normalised(np.concatenate(documents)).T
    ranks = (scores > scores.diagonal()[:, None]).sum(axis=1)
    expected = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean()
    assert metrics["held_8_cosine_ndcg@10"] == pytest.approx(expected)
    assert metrics["held_16_cosine_ndcg@10"] != pytest.approx(expected)
    assert loaded.truncate_dim == 16
    assert loaded.encode(QUERIES).shape == (3, 16)


def rows_of(folder: Path, negatives: int) -> list[dict[str, str]]:
    rows = [{"query": f"q{row}", "positive": f"p{row}", "negative": [f"n{row}"] * negatives} for row in range(8)]
    for row in rows if negatives == 0 else []:
        del row["negative"]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [{"source": str(folder / "rows.jsonl")}]


@pytest.mark.parametrize(
    ("loss", "negatives", "message"),
    [
        ({"name": "distill", "teacher": "x"}, 0, "no hard negatives"),
        ({"name": "gist", "guide": "x"}, 2, "has 2 hard negatives.*loss.num_negatives=1"),
    ],
)
def test_sets_with_too_few_or_too_many_negatives_are_refused(make_recipe, tmp_path, loss, negatives, message):
    with pytest.raises(DataError, match=message):
        train(make_recipe({"data": rows_of(tmp_path, negatives), "loss": loss}))


def test_a_guide_that_is_not_there_is_named(make_recipe):
    with pytest.raises(ConfigurationError, match="'no/such-model' of the loss cannot be loaded"):
        train(make_recipe({"loss": {"name": "gist", "guide": "no/such-model"}}))
