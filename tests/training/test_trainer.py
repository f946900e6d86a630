"""The trainer of embedders: the best weights at the end, and the pooling's effect in the log."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.base.evaluation import BaseEvaluator

from st_llmpool.modules.errors import InputError
from st_llmpool.training import run as run_file
from st_llmpool.training import train
from st_llmpool.training.pooling_change import PoolingChange
from st_llmpool.training.trainer import EmbedderTrainer


class FallingScore(BaseEvaluator):
    """Says that every step is worse than the one before."""

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        return {"pairs_cosine_ndcg@10": -steps}


def test_keep_best_ends_with_the_best_weights(make_recipe, monkeypatch, pairs):
    monkeypatch.setattr(run_file, "held_out_evaluator", lambda *args, **kwargs: FallingScore())
    recipe = make_recipe(
        {
            "evaluation": {"data": [{"source": pairs}], "eval_steps": 1, "load_best_model_at_end": True},
            "training": {"save_total_limit": 3, "learning_rate": 0.01},
        }
    )
    result = train(recipe)
    checkpoints = Path(recipe.output_dir) / "checkpoints"
    first = load_file(checkpoints / "checkpoint-1" / "1_MultiLayerPooling" / "model.safetensors")
    second = load_file(checkpoints / "checkpoint-2" / "1_MultiLayerPooling" / "model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert result.report["best_step"] == 1
    for name, tensor in result.model[1].state_dict().items():
        assert torch.equal(tensor, first[name]), name
    saved = load_file(result.model_dir / "1_MultiLayerPooling" / "model.safetensors")
    assert all(torch.equal(saved[name], first[name]) for name in first)


def test_best_weights_that_cannot_be_loaded_are_an_error(make_recipe, monkeypatch, pairs):
    def broken(*args):
        raise InputError("unreadable")

    monkeypatch.setattr(run_file, "held_out_evaluator", lambda *args, **kwargs: FallingScore())
    monkeypatch.setattr(EmbedderTrainer, "_load_from_checkpoint", broken)
    recipe = make_recipe({"evaluation": {"data": [{"source": pairs}], "eval_steps": 1, "load_best_model_at_end": True}})
    with pytest.raises(InputError, match="unreadable"):
        train(recipe)
    assert not (Path(recipe.output_dir) / "model").exists()


@pytest.mark.parametrize(("damage", "message"), [("gone", "best checkpoint, of step 1, is gone"), ("cut", "damaged")])
def test_a_best_checkpoint_that_is_gone_or_damaged_is_named(make_recipe, monkeypatch, pairs, damage, message):
    """transformers logs it and ends with the last weights."""
    monkeypatch.setattr(run_file, "held_out_evaluator", lambda *args, **kwargs: FallingScore())
    load = EmbedderTrainer._load_best_model

    def damaged(self):
        if damage == "gone":
            self.state.best_model_checkpoint = None
        else:
            (Path(self.state.best_model_checkpoint) / "scheduler.pt").write_bytes(b"PK")
        load(self)

    monkeypatch.setattr(EmbedderTrainer, "_load_best_model", damaged)
    recipe = make_recipe({"evaluation": {"data": [{"source": pairs}], "eval_steps": 1, "load_best_model_at_end": True}})
    with pytest.raises(InputError, match=message):
        train(recipe)


def test_the_effect_of_the_pooling_is_logged_with_each_loss(make_recipe, monkeypatch):
    means = []
    pop_mean = PoolingChange.pop_mean

    def noted(self):
        means.append(pop_mean(self))
        return means[-1]

    monkeypatch.setattr(PoolingChange, "pop_mean", noted)
    report = train(make_recipe({"training": {"max_steps": 3, "pooling_learning_rate": 0.1}})).report
    assert [step for step, _ in report["pooling_share"]] == [1, 2, 3]
    assert [found for _, found in report["pooling_share"]] == pytest.approx(means)
    assert report["pooling_share"][0][1] == 0  # the skip connection alone, before the first step
    assert report["pooling_share"][2][1] > 0.01
    assert all(math.isfinite(loss) for _, loss in report["losses"])
