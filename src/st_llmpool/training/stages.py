"""Run the stages of a recipe in order; each starts from the model that the previous one left."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator

from ..adapters import has_adapter, load_again, merge_adapter
from ..data.training_data import load_texts
from ..losses.settings import LossSettings
from ..utils.random_state import preserve_rng_state
from .checks import design_arguments
from .interpolation import merge_with_base
from .mntp.adaptation import adapt, check_adapt
from .mntp.recipe import AdaptEvaluationSettings, AdaptRecipe
from .recipe import DEFAULT_LENGTH, EvaluationSettings, MaskingSettings, Recipe, StageSettings, merge_weights

#: Trains a stage: called with its recipe, the folder that it starts from if there is one, and its settings.
Train = Callable[[Recipe, Path | None, StageSettings], Any]


def run_stages(recipe: Recipe, check: Callable[[Recipe, StageSettings], Any], train: Train) -> Path:
    """Run the stages of `recipe` in order; finished ones are skipped, an interrupted one is resumed.

    All stages are checked before the first one starts; `check` and `train` do it for ``simcse`` and ``contrastive``.

    Returns:
        The folder that the last stage left, for the recipe's own training.
    """
    for stage in recipe.stages:
        if stage.kind == "mntp":
            check_adapt(adapt_recipe(recipe, stage, Path(recipe.output_dir), None))
            for settings in (*stage.texts, *stage.held_out):
                load_texts(settings)
        else:
            check(embedder_recipe(recipe, stage, Path(recipe.output_dir)), stage)

    start: Path | None = None
    for number, stage in enumerate(recipe.stages, start=1):
        folder = Path(recipe.output_dir) / "stages" / f"{number}-{stage.kind}"
        if stage.kind == "mntp":
            adapt(adapt_recipe(recipe, stage, folder, start), resume=True)
        else:
            train(embedder_recipe(recipe, stage, folder), start, stage)
        start = folder / "model"
    assert start is not None
    return start


def adapt_recipe(recipe: Recipe, stage: StageSettings, folder: Path, start: Path | None) -> AdaptRecipe:
    """Return the recipe of a stage of kind ``mntp`` that starts from the model in `start`, or the recipe's base."""
    model = recipe.model
    return AdaptRecipe(
        output_dir=str(folder),
        base=model.base if start is None else str(start),
        texts=stage.texts,
        attention=design_arguments(model)["attention"] or "bidirectional",
        masking=stage.masking or MaskingSettings(),
        tune="full" if (stage.tune or model.tune) == "full" else "lora",
        lora=stage.lora or model.lora,
        merge=stage.merge,
        max_seq_length=stage.max_seq_length or model.max_seq_length or DEFAULT_LENGTH,
        training=stage.training or recipe.training,
        evaluation=AdaptEvaluationSettings(texts=stage.held_out),
        allow_partial=model.allow_partial,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        revision=model.revision if start is None else None,
        seed=recipe.seed,
    )


def embedder_recipe(recipe: Recipe, stage: StageSettings, folder: Path) -> Recipe:
    """Return the recipe of a stage of kind ``simcse`` or ``contrastive``, which has no stages itself."""
    model = dataclasses.replace(
        recipe.model,
        tune=stage.tune or recipe.model.tune,
        lora=stage.lora or recipe.model.lora,
        max_seq_length=stage.max_seq_length or recipe.model.max_seq_length,
        truncate_dim=None,  # of the finished model only
    )
    unlabelled = stage.kind == "simcse"
    return Recipe(
        output_dir=str(folder),
        model=model,
        data=[settings.as_pairs() for settings in stage.texts] if unlabelled else stage.data,
        loss=stage.loss or (LossSettings() if unlabelled else recipe.loss),
        training=stage.training or recipe.training,
        evaluation=stage.evaluation or recipe.evaluation,
        seed=recipe.seed,
    )


def merge_stage(
    model: SentenceTransformer,
    base: str,
    merge: float | Sequence[float] | None,
    evaluation: EvaluationSettings,
    evaluator: BaseEvaluator | None,
) -> dict[str, Any]:
    """Merge the adapter of what a stage trained, or trained on one, then its backbone with the one it started from.

    `model` is changed in place; `evaluator` chooses where `merge` holds several weights. Returns, for
    ``training.json``, the weight of the trained model and the score of each weight that was tried.
    """
    device = model.device
    if has_adapter(model):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, create_model_card=False)
            merge_adapter(model, Path(folder))
        model.to(device)
    alphas = merge_weights(merge)
    if alphas == [1.0]:
        return {"merge": 1.0, "merge_scores": []}

    def score() -> float:
        assert evaluator is not None, "a recipe with a choice has held-out pairs"
        with preserve_rng_state():
            return float(evaluator(model)[evaluation.metric])

    weights = load_again(model[0].model, base, dtype=torch.float32).state_dict()
    chosen, scores = merge_with_base(model[0].model, weights, alphas, score)
    return {"merge": chosen, "merge_scores": [[alpha, found] for alpha, found in scores.items()]}
