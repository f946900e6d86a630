"""The trainer of embedders: the best weights at the end, and the pooling's effect in the log."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.base.evaluation import BaseEvaluator

from st_llmpool.modules.errors import InputError
from st_llmpool.training import Recipe, train
from st_llmpool.training import run as run_file
from st_llmpool.training.mntp.adaptation import adapt
from st_llmpool.training.mntp.masked_next_token import MaskedTokenTrainer
from st_llmpool.training.report import PoolingChange
from st_llmpool.training.trainer import EmbedderTrainer, TrainingError
from st_llmpool.utils.files import WriteError

from .mntp.test_adaptation import make as make_adaptation


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


KINDS = {
    "contrastive": [],
    "full": ["model.tune=full"],
    "cached": ["loss.mini_batch_size=2"],
    "hard": ["loss.focal_gamma=0.5"],
    "without clipping": ["training.max_grad_norm=0"],
}


def spoil(monkeypatch, trainer_class, step, what):
    """Makes the loss NaN or infinite, or only the gradients, in one optimizer step."""
    compute_loss = trainer_class.compute_loss

    def spoilt(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        if self.state.global_step + 1 == step and self.model.training:
            if what == "gradients":
                loss.register_hook(lambda gradient: gradient * float("inf"))
            else:
                loss = loss * float(what)
        return loss

    monkeypatch.setattr(trainer_class, "compute_loss", spoilt)


def batches_seen(monkeypatch, trainer_class):
    """Returns a list that fills with the decoded first column of each batch."""
    seen = []
    training_step = trainer_class.training_step

    def spy(self, model, inputs, *args, **kwargs):
        name = "query_input_ids" if "query_input_ids" in inputs else "labels"
        tokenizer = self.processing_class
        seen.append(inputs[name] if tokenizer is None else tokenizer.batch_decode(inputs[name], True))
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer_class, "training_step", spy)
    return seen


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("contrastive", "nan"),
        ("full", "inf"),
        ("contrastive", "gradients"),
        ("without clipping", "gradients"),
        ("cached", "nan"),
        ("hard", "inf"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_at_its_step(make_recipe, monkeypatch, kind, what):
    spoil(monkeypatch, EmbedderTrainer, 3, what)
    seen = batches_seen(monkeypatch, EmbedderTrainer)
    training = {"max_steps": 5, "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-3}
    recipe = make_recipe({"training": training}, *KINDS[kind])
    with pytest.raises(TrainingError) as raised:
        train(recipe)
    message = str(raised.value)
    wrong = {"nan": "the loss is nan", "inf": "the loss is inf", "gradients": "the gradients are not finite"}[what]
    assert message.startswith(f"Step 3: {wrong}.")
    assert "\n" not in message
    rows = [int(text[1:].split()[0]) + 1 for text in seen[-1]]  # query texts start with q and their row
    assert f"Its batch: rows {', '.join(map(str, sorted(rows)))} of pairs." in message
    folder = Path(recipe.output_dir)
    assert f"The last good checkpoint is {folder / 'checkpoints' / 'checkpoint-2'}" in message
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    for file in (folder / "checkpoints" / "checkpoint-2").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert not (folder / "model").exists()
    assert not (folder / "training.json").exists()


def test_the_command_gives_one_line_and_status_1(make_recipe, monkeypatch, tmp_path, refusal):
    spoil(monkeypatch, EmbedderTrainer, 1, "nan")
    make_recipe().to_yaml(tmp_path / "recipe.yaml")
    message = refusal("train", str(tmp_path / "recipe.yaml"))
    assert "TrainingError: Step 1: the loss is nan" in message
    assert "No checkpoint was written before" in message
    assert "Traceback" not in message


def test_weights_that_a_step_makes_infinite_are_not_saved(make_recipe):
    recipe = make_recipe({"training": {"max_steps": 3, "save_steps": 1}})
    recipe.training.learning_rate = 1e30  # which a file may not ask for
    with pytest.raises(TrainingError, match=r"Step \d: the (weights|loss|gradients)"):
        train(recipe)
    for file in Path(recipe.output_dir).rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file
    assert not (Path(recipe.output_dir) / "model").exists()


def test_an_adaptation_stops_as_well_and_names_its_texts(tmp_path, tiny_lm, words_file, monkeypatch):
    spoil(monkeypatch, MaskedTokenTrainer, 3, "nan")
    recipe = make_adaptation(tmp_path / "run", tiny_lm, words_file)
    with pytest.raises(TrainingError, match=r"^Step 3: the loss is nan\. Its batch: rows [\d, ]+ of the tr"):
        adapt(recipe)
    assert (tmp_path / "run/checkpoints/checkpoint-2").is_dir()
    assert not (tmp_path / "run/model").exists()


def test_a_stage_of_two_views_stops_as_well(make_recipe, monkeypatch, pairs):
    spoil(monkeypatch, EmbedderTrainer, 2, "nan")
    stage = {"kind": "simcse", "texts": [{"source": pairs, "column": "query"}]}
    recipe = make_recipe({"stages": [stage], "model": {"lora": {"r": 4, "lora_dropout": 0.2}}})
    with pytest.raises(TrainingError, match="Step 2: the loss is nan"):
        train(recipe)
    assert not (Path(recipe.output_dir) / "stages/1-simcse/model").exists()


def test_every_part_of_a_step_that_is_accumulated_is_looked_at(make_recipe, monkeypatch):
    """A recipe asks for one batch a step; the trainer itself can add up several."""
    calls = []
    compute_loss = EmbedderTrainer.compute_loss

    def spoilt(self, *args, **kwargs):
        calls.append(self.state.global_step + 1)
        return compute_loss(self, *args, **kwargs) * (float("nan") if len(calls) == 2 else 1.0)

    init = EmbedderTrainer.__init__

    def accumulate(self, *args, **kwargs):
        kwargs["args"].gradient_accumulation_steps = 2
        init(self, *args, **kwargs)

    monkeypatch.setattr(EmbedderTrainer, "__init__", accumulate)
    monkeypatch.setattr(EmbedderTrainer, "compute_loss", spoilt)
    with pytest.raises(TrainingError, match=r"Step 1: the loss is nan\. Its batch: rows (\d+, ){7}\d+ of pairs"):
        train(make_recipe())
    assert calls == [1, 1]


class Scaler:
    """An fp16 loss scaler, as far as it is asked."""

    def __init__(self, scale):
        self.get_scale = lambda: scale


@pytest.mark.parametrize(("scale", "stops"), [(65536.0, False), (1e-4, True)])
def test_under_a_loss_scaler_only_a_loss_or_a_scale_that_vanishes_stops(scale, stops):
    """Infinite gradients are how it finds its scale; it skips those steps itself."""
    trainer = EmbedderTrainer.__new__(EmbedderTrainer)
    trainer.__dict__.update(
        accelerator=SimpleNamespace(scaler=Scaler(scale)),
        args=SimpleNamespace(world_size=1, output_dir="none"),
        state=SimpleNamespace(global_step=7),
        train_dataset=[],
    )
    trainer._start_watching()
    trainer._current.losses.append(torch.tensor(1.0))
    if stops:
        with pytest.raises(TrainingError, match="Step 8: the gradients are not finite"):
            trainer._check_step(torch.tensor(float("inf")))
    else:
        trainer._check_step(torch.tensor(float("inf")))
    trainer._current.losses.append(torch.tensor(float("nan")))
    with pytest.raises(TrainingError, match="the loss is nan"):
        trainer._check_step(torch.tensor(1.0))


@pytest.mark.parametrize("kind", ["system", "library"])
def test_a_full_disk_at_a_checkpoint_gives_one_line_and_keeps_the_one_before(make_recipe, monkeypatch, kind):
    save = EmbedderTrainer._save_optimizer_and_scheduler

    def full(self, folder):
        if folder.endswith("-2"):
            Path(folder, "half").write_text("half")
            if kind == "system":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file")
        save(self, folder)

    monkeypatch.setattr(EmbedderTrainer, "_save_optimizer_and_scheduler", full)
    recipe = make_recipe({"training": {"max_steps": 3, "save_steps": 1, "learning_rate": 1e-3}})
    with pytest.raises(WriteError, match=r"checkpoint-2 cannot be written: .*what was there is intact"):
        train(recipe)
    checkpoints = Path(recipe.output_dir) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-1"]

    monkeypatch.setattr(EmbedderTrainer, "_save_optimizer_and_scheduler", save)
    resumed = train(recipe, resume=True)
    unbroken = train(Recipe.from_dict(recipe.to_dict(), [f"output_dir={recipe.output_dir}-2"]))
    assert resumed.report["losses"] == unbroken.report["losses"]


def test_reports_of_finite_runs_are_as_before(make_recipe):
    report = train(make_recipe()).report
    assert json.dumps(report, allow_nan=False)
