"""Run a recipe: check it, build the model, train with checkpoints, save the final model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator
from transformers import TrainerCallback, set_seed

from ..adapters import has_adapter
from ..data.training_data import load_pairs, load_views
from ..designs import build_embedder, prove_embedder, resolve_base
from ..hub.loading import load_model
from ..losses.build import LossParts, build_loss, teacher_scores
from ..losses.hard_negative_mixing import HardNegativeMixing
from ..model_card.card import card_without_forwards, training_facts
from ..modules.errors import ConfigurationError
from ..saved_embedder import is_saved_embedder
from ..summary_cache import SummaryStore, cached_summaries, identity_of
from ..utils.files import atomic_folder
from ..utils.parameters import count_weights
from ..utils.random_state import preserve_rng_state
from ..utils.reading import read_json_object
from .arguments import dtype_of, enable_gradient_checkpointing, shared_arguments, trainer_arguments
from .checks import base_width, check_data, check_recipe, check_views, design_arguments
from .freezing import freeze_lowest_layers, freeze_pooling
from .held_out import held_out_evaluator
from .optimizers import OPTIMIZERS, check_optimization
from .recipe import DEFAULT_LENGTH, Recipe, StageSettings
from .reload_check import check_reload
from .report import NEGLIGIBLE, trainable_poolings, write_report
from .run_folder import check_output, locked_run, train_in_folder
from .sparse_tuning import SparseTuning
from .stages import merge_stage, run_stages
from .trainer import EmbedderTrainer
from .weighted_batch_sampler import WeightedBatchSampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    Attributes:
        model: The trained model.
        model_dir: Folder that holds it, for ``SentenceTransformer(model_dir, trust_remote_code=True)``.
        report: What is in ``training.json``; empty on processes other than the first.
    """

    model: SentenceTransformer
    model_dir: Path
    report: dict[str, Any]


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    measure_card: bool = True,
) -> TrainingResult:
    """Train an embedding model as the recipe describes.

    In ``recipe.output_dir`` it leaves ``model``, ``training.json``, ``loss.png``, ``recipe.yaml`` and ``checkpoints``.
    A recipe with stages runs them first, each in a folder below ``stages``; an adapter that is trained on what they
    left is merged at the end, since nobody else has its base. The recipe and its stages are validated
    before any weights are loaded. Under ``accelerate launch`` it runs on several processes; each batch is split over
    them, so that losses are those of one process.

    Args:
        recipe: The recipe.
        resume: Resume from the last complete checkpoint in ``output_dir``, or start if there is none. Losses and
            weights are those of an uninterrupted run. With another number of processes the batches
            are the same, but dropout differs.
        callbacks: Additional trainer callbacks.
        measure_card: False leaves out of the model's card what takes forwards: attention proof, layer use, figures.

    Raises:
        ConfigurationError: If the recipe does not fit the base, this machine, or what is in ``output_dir``, or another
            process trains there.
        TrainingError: If the loss, the gradients or the weights are not finite; the checkpoints before are kept.
        WriteError: If the disk is full; the earlier checkpoint is intact.
        DataError: If a training set cannot be trained on.

    Example:
        >>> recipe = Recipe.from_yaml("recipe.yaml", ["training.max_steps=10"])  # doctest: +SKIP
        >>> train(recipe).model.encode(["a text"]).shape  # doctest: +SKIP
        (1, 256)
    """
    folder = Path(recipe.output_dir)
    check_output(recipe, folder, resume=resume)
    if (folder / "model").is_dir():
        logger.info("%s is finished; nothing to train.", folder)
        model = load_model(folder / "model", trust_remote_code=recipe.model.trust_remote_code)
        return TrainingResult(model, folder / "model", read_json_object(folder / "training.json"))
    with locked_run(folder) as raise_refusal:
        prepared, start = _prepare(recipe), None
        raise_refusal()
        if recipe.stages:
            if prepared.arguments.process_index == 0:
                recipe.to_yaml(folder / "recipe.yaml")  # before the first stage, so that all of it can be resumed
            start = run_stages(recipe, check=_prepare, train=_train_stage)
        return _train(recipe, prepared, start, resume=resume, callbacks=callbacks, measure_card=measure_card)


def untrained_model(recipe: Recipe) -> SentenceTransformer:
    """Return the model of a recipe before the first step of its training and of its stages.

    Args:
        recipe: The recipe; its data are not read.

    Raises:
        ConfigurationError: If the model's settings do not fit the base.

    Example:
        >>> data = [{"source": "pairs.jsonl"}]
        >>> recipe = Recipe.from_dict({"model": {"base": "builtin"}, "data": data, "output_dir": "run"})
        >>> untrained_model(recipe).get_embedding_dimension()
        192
    """
    arguments = _training_arguments(recipe, Path(recipe.output_dir))
    set_seed(recipe.seed)
    model = _build_model(recipe, resolve_base(recipe.model.base), arguments)
    model.truncate_dim = recipe.model.truncate_dim
    if recipe.training.cache is not None:
        settings = recipe.training
        store = SummaryStore(Path(str(settings.cache)), identity_of(model[0]), dtype=settings.cache_dtype)
        _prove_once(recipe, model, store)
    return model


@dataclass(frozen=True)
class _Prepared:
    """A validated recipe, before weights are loaded."""

    arguments: SentenceTransformerTrainingArguments
    datasets: DatasetDict
    evaluator: BaseEvaluator | None


def _prepare(recipe: Recipe, stage: StageSettings | None = None) -> _Prepared:
    """Load the data and validate the recipe."""
    two_views = stage is not None and stage.kind == "simcse"
    check_recipe(recipe, two_views=two_views)
    arguments = _training_arguments(recipe, Path(recipe.output_dir))
    with arguments.main_process_first(desc="loading data"):
        if stage is not None and two_views:
            datasets = DatasetDict({item.label: load_views(item) for item in stage.texts})
        else:
            datasets = DatasetDict({item.label: load_pairs(item, recipe.loss.num_negatives) for item in recipe.data})
        evaluator = _evaluator(recipe)
    check_data(datasets, recipe, arguments.world_size)
    check_optimization(arguments, _number_of_steps(recipe, datasets))
    return _Prepared(arguments, datasets, evaluator)


def _number_of_steps(recipe: Recipe, datasets: DatasetDict) -> int:
    training = recipe.training
    batches = sum(len(dataset) // training.batch_size for dataset in datasets.values())
    per_epoch = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    return training.max_steps or math.ceil(training.num_train_epochs * per_epoch)


def _train_stage(recipe: Recipe, start: Path | None, stage: StageSettings) -> None:
    folder = Path(recipe.output_dir)
    if not (folder / "model").is_dir():
        check_output(recipe, folder, resume=True)
        _train(recipe, _prepare(recipe, stage), start, resume=True, stage=stage)


def _train(
    recipe: Recipe,
    prepared: _Prepared,
    start: Path | None,
    *,
    resume: bool,
    stage: StageSettings | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    measure_card: bool = True,
) -> TrainingResult:
    folder, arguments, datasets = Path(recipe.output_dir), prepared.arguments, prepared.datasets
    base = resolve_base(recipe.model.base) if start is None else str(start.resolve())
    set_seed(recipe.seed)
    model = _build_model(recipe, base, arguments)
    if stage is not None and stage.kind == "simcse":
        check_views(model, recipe.model)
    arguments.learning_rate_mapping = _learning_rates(model, recipe)
    if recipe.loss.teacher is not None:
        datasets = _with_teacher_scores(recipe.loss.teacher, datasets, recipe, arguments)
    vars(model.model_card_data)["training_examples"] = recipe.card_examples  # before the trainer picks them
    with _cached(recipe, model, datasets) as store:
        trainer = _trainer(recipe, model, arguments, datasets, prepared.evaluator, callbacks)
        model.truncate_dim = recipe.model.truncate_dim  # after the loss was built, which trains all dimensions
        full, trusted = recipe.model.tune == "full", recipe.model.trust_remote_code
        check = partial(check_reload, model, folder, full=full, trust_remote_code=trusted)
        if store is not None:  # one of these modules on this backbone is saved as another is
            check = partial(store.once, f"reload-{_settings_digest(model)}", check)
        train_in_folder(folder, recipe, trainer, check, resume=resume)
    rows = {name: len(dataset) for name, dataset in datasets.items()}
    at_end = None
    if start is not None or stage is not None:  # an adapter's base, a stage's model, is nowhere but in this run
        merge = None if stage is None else stage.merge
        at_end = partial(merge_stage, model, base, merge, recipe.evaluation, prepared.evaluator)
    measures = measure_card and not trainer.is_sharded  # one rank cannot run its part
    return _finish(trainer, recipe, folder, rows, at_end, measure_card=measures)


@contextmanager
def _cached(recipe: Recipe, model: SentenceTransformer, datasets: DatasetDict) -> Iterator[SummaryStore | None]:
    """With ``training.cache``: prove the backbone once, encode the training texts, and train on them."""
    if recipe.training.cache is None:
        yield None
        return
    with cached_summaries(model, recipe.training.cache, dtype=recipe.training.cache_dtype) as cache:
        _prove_once(recipe, model, cache.store)
        for item in recipe.data:
            rows = datasets[item.label]
            for column in [name for name in rows.column_names if name != "label"]:  # a teacher's scores
                cache.fill(rows[column], item.instruction if column == "query" else None)
        yield cache.store


def _prove_once(recipe: Recipe, model: SentenceTransformer, store: SummaryStore) -> None:
    """Prove the backbone unless a run on this cache has; with ``allow_partial`` each build does and records layers."""
    if not recipe.model.allow_partial:
        store.once("attention", partial(prove_embedder, model))


def _settings_digest(model: SentenceTransformer) -> str:
    settings = [[type(module).__name__, module.get_config_dict()] for module in model]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _training_arguments(recipe: Recipe, folder: Path) -> SentenceTransformerTrainingArguments:
    training, evaluation = recipe.training, recipe.evaluation
    weights = [item.weight for item in recipe.data if item.weight is not None]
    return trainer_arguments(
        SentenceTransformerTrainingArguments,
        **shared_arguments(
            training, folder, learning_rate=recipe.learning_rate, seed=recipe.seed, width=base_width(recipe.model)
        ),
        per_device_eval_batch_size=evaluation.batch_size,
        batch_sampler=training.batch_sampler,
        multi_dataset_batch_sampler=partial(WeightedBatchSampler, weights=weights) if weights else "proportional",
        prompts={item.label: {"query": item.instruction} for item in recipe.data if item.instruction} or None,
        eval_strategy="steps" if evaluation.is_on else "no",
        eval_steps=evaluation.eval_steps,
        eval_on_start=evaluation.is_on and evaluation.eval_on_start,
        save_steps=evaluation.eval_steps if evaluation.load_best_model_at_end else training.save_steps,
        load_best_model_at_end=evaluation.load_best_model_at_end,
        metric_for_best_model=evaluation.metric if evaluation.load_best_model_at_end else None,
        greater_is_better=True,
    )


def _evaluator(recipe: Recipe) -> BaseEvaluator | None:
    evaluation = recipe.evaluation
    evaluators: list[BaseEvaluator] = []
    for item in evaluation.data:
        pairs = load_pairs(item)
        options: dict[str, Any] = {"query_prompt": item.instruction, "batch_size": evaluation.batch_size}
        evaluators.append(held_out_evaluator(item.label, pairs, **options))
        for size in recipe.loss.matryoshka_dims or []:
            evaluators.append(held_out_evaluator(f"{item.label}_{size}", pairs, truncate_dim=size, **options))
    if evaluation.suite is not None:
        from ..evaluation import SuiteEvaluator

        evaluators.append(SuiteEvaluator(evaluation.suite, evaluation.data_dir, batch_size=evaluation.batch_size))
    return SequentialEvaluator(evaluators) if len(evaluators) > 1 else next(iter(evaluators), None)


def _build_model(recipe: Recipe, base: str, arguments: SentenceTransformerTrainingArguments) -> SentenceTransformer:
    settings = recipe.model
    is_first = base == resolve_base(settings.base)  # else what the stage before this left
    continued = is_saved_embedder(base, revision=settings.revision if is_first else None)
    placement = {"device_map": {"": arguments.device}} if settings.quantization and torch.cuda.is_available() else {}
    model = build_embedder(
        base,
        **design_arguments(settings),
        pooling_init=settings.pooling_init if is_first else None,
        layers=settings.layers,
        layer_readout=settings.layer_readout,
        include_prompt=settings.include_prompt,
        max_seq_length=settings.max_seq_length or (None if continued else DEFAULT_LENGTH),
        peft_config=settings.lora if settings.tune == "lora" else None,
        quantization_config=settings.quantization,
        prompts=_prompts(recipe),
        allow_partial=settings.allow_partial,
        verify=recipe.training.cache is None or settings.allow_partial,  # else once for all runs on the cache
        dtype=torch.float32 if settings.tune == "full" else dtype_of(arguments),
        device=str(arguments.device),
        attn_implementation=settings.attn_implementation,
        model_kwargs=placement,
        trust_remote_code=settings.trust_remote_code,
        revision=settings.revision if is_first else None,
    )
    for prompt in model.prompts.values():
        model[0].check_prompt(prompt)
    if settings.tune == "full" and has_adapter(model):
        raise ConfigurationError(
            f"model.base={base!r} carries an adapter, and model.tune=full trains the backbone under it. Use "
            f"model.tune=lora with the adapter's settings as model.lora, or merge it with st-llmpool export --merge."
        )
    if settings.tune == "pooling":
        model[0].requires_grad_(False)
    freeze_lowest_layers(model[0].model, settings.freeze_layers)
    for pooling in trainable_poolings(model):
        freeze_pooling(pooling, settings.freeze_pooling)
    for parameter in model.parameters():
        if parameter.requires_grad:  # small steps round to nothing on 16-bit weights; autocast computes in 16 bits
            parameter.data = parameter.data.float()
    if recipe.training.gradient_checkpointing:
        enable_gradient_checkpointing(model.transformers_model)
    return model


def _with_teacher_scores(
    name: str, datasets: DatasetDict, recipe: Recipe, arguments: SentenceTransformerTrainingArguments
) -> DatasetDict:
    score = partial(
        teacher_scores,
        teacher=_load_other(name, recipe, arguments),
        scale=recipe.loss.scale,
        batch_size=recipe.evaluation.batch_size,
    )
    with preserve_rng_state():
        return DatasetDict({label: score(rows) for label, rows in datasets.items()})


def _load_other(name: str, recipe: Recipe, arguments: SentenceTransformerTrainingArguments) -> SentenceTransformer:
    """Load a guide or teacher; what is drawn afterwards is as if it had not happened."""
    try:
        with preserve_rng_state():
            trusted = recipe.model.trust_remote_code
            return load_model(name, device=str(arguments.device), trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The model {name!r} of the loss cannot be loaded: {error}") from error


def _prompts(recipe: Recipe) -> dict[str, str]:
    """Return the first instruction as ``query``; where sets have different ones, each by its set's name too."""
    instructions = {item.label: item.instruction for item in recipe.data if item.instruction}
    if not instructions:
        return {}
    by_set = instructions if len(set(instructions.values())) > 1 else {}
    return {"query": next(iter(instructions.values())), **by_set}


def _learning_rates(model: SentenceTransformer, recipe: Recipe) -> dict[str, float]:
    """Return patterns of parameter names, as a loss names them, with their learning rates."""
    poolings, given = trainable_poolings(model), recipe.training.pooling_learning_rate
    return {
        rf"^model\.{place}\.": module.default_learning_rate if given is None else given
        for place, module in enumerate(model)
        if any(module is pooling for pooling in poolings)
    }


def _trainer(
    recipe: Recipe,
    model: SentenceTransformer,
    arguments: SentenceTransformerTrainingArguments,
    datasets: DatasetDict,
    evaluator: BaseEvaluator | None,
    callbacks: Sequence[TrainerCallback],
) -> EmbedderTrainer:
    gather = recipe.loss.gather_across_devices and arguments.world_size > 1
    mixing = None if recipe.loss.mixing is None else HardNegativeMixing(recipe.loss.mixing, seed=recipe.seed)
    guide = None if recipe.loss.guide is None else _load_other(recipe.loss.guide, recipe, arguments)
    loss = build_loss(model, recipe.loss, LossParts(gather, mixing, guide))
    settings = recipe.training.sparse_tuning
    sparse = None if settings is None else SparseTuning(settings, model, loss, seed=recipe.seed)
    return EmbedderTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets,
        loss=loss,
        evaluator=evaluator,
        callbacks=[*(made for made in (mixing, sparse) if made is not None), *callbacks],
        optimizer_class=OPTIMIZERS.get(recipe.training.optim),
    )


def _finish(
    trainer: EmbedderTrainer,
    recipe: Recipe,
    folder: Path,
    rows: dict[str, int],
    at_end: Callable[[], dict[str, Any]] | None,
    *,
    measure_card: bool,
) -> TrainingResult:
    trainer.pooling_change.remove()
    model, state = trainer.model, trainer.state
    change = next((entry["pooling_share"] for entry in reversed(state.log_history) if "pooling_share" in entry), None)
    if change is not None and change < NEGLIGIBLE:
        logger.warning(
            "The pooling has no effect: it changes the embedding by %.2f %% (‖e - r‖/‖r‖). Train longer, raise "
            "training.pooling_learning_rate, or use the plain readout, which is cheaper.",
            100 * change,
        )
    facts = {
        "rows": rows,
        "licenses": {item.label: item.license for item in recipe.data},
        "parameters": count_weights(model.parameters()),
        "trained_parameters": count_weights(parameter for parameter in model.parameters() if parameter.requires_grad),
        "backbone_frozen": recipe.model.tune == "pooling",
        "pooling_did_nothing": None if change is None else change < NEGLIGIBLE,
        "best_step": state.best_global_step,
    }
    report: dict[str, Any] = {}
    if trainer.args.process_index == 0:
        if at_end is not None:
            facts |= at_end()
        report = write_report(folder, trainer, facts)
        vars(model.model_card_data).update(training_facts(folder))
        with nullcontext() if measure_card else card_without_forwards(model), atomic_folder(folder / "model") as target:
            model.save_pretrained(str(target))
    trainer.accelerator.wait_for_everyone()
    return TrainingResult(model, folder / "model", report)
