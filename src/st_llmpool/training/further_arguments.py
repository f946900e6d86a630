"""Arguments of sentence-transformers' trainer that a recipe passes through by their own names."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ..modules.errors import ConfigurationError, nearest
from ..utils.extras import require
from ..utils.settings import converted

_EVALUATION = "set evaluation.{name}"
_TRAINING_ONLY = "it is for the command line of transformers' own scripts"
_HUB = "publish with st-llmpool push, which checks the model first"
_RESUME = "a run must be resumable to the last bit"
_MEMORY = "use training.gradient_checkpointing"
# Integration -> its package, where that has another name.
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
#: Argument -> why a recipe cannot set it, and what to use instead.
MANAGED: dict[str, str] = {
    "output_dir": "set output_dir at the top of the recipe",
    "seed": "set seed at the top of the recipe",
    "data_seed": "set seed at the top of the recipe",
    "per_device_train_batch_size": "set training.batch_size, which is over all devices",
    "per_device_eval_batch_size": "set evaluation.batch_size",
    "auto_find_batch_size": "use st-llmpool batch-size, and set training.batch_size",
    "warmup_ratio": "set training.warmup_steps, where a number below 1 is a fraction of all steps",
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), "set training.precision"),
    **{name: _EVALUATION.format(name=name) for name in ("eval_steps", "eval_on_start", "load_best_model_at_end")},
    "eval_strategy": "evaluation runs every evaluation.eval_steps where evaluation.data or .suite is given",
    "metric_for_best_model": "the first set of evaluation.data decides, else the suite",
    "greater_is_better": "the first set of evaluation.data decides, else the suite",
    "prompts": "set the instruction of each set of data",
    "multi_dataset_batch_sampler": "set the weight of each set of data",
    "learning_rate_mapping": "set training.pooling_learning_rate",
    "router_mapping": "these models have no router",
    "train_sampling_strategy": "set training.batch_sampler",
    "accelerator_config": "each batch is split over the processes",
    "dataloader_drop_last": "incomplete batches are dropped",
    "remove_unused_columns": "name the columns to use with data.0.columns",
    "label_names": "name the columns to use with data.0.columns",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "disable_tqdm": "progress is one live line on a terminal, and one line per training.logging_steps elsewhere",
    "use_cpu": "set CUDA_VISIBLE_DEVICES to an empty value",
    "local_rank": "start the processes with accelerate launch",
    "resume_from_checkpoint": "use --resume",
    "save_strategy": "set training.save_steps",
    "activation_checkpointing": _MEMORY,
    "activation_checkpointing_kwargs": _MEMORY,
    "gradient_checkpointing_kwargs": _MEMORY,
    **dict.fromkeys(("save_only_model", "ignore_data_skip", "restore_callback_states_from_checkpoint"), _RESUME),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _TRAINING_ONLY),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _HUB),
}


def checked_arguments(values: Mapping[str, Any], where: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return trainer arguments (name to value) with each value converted to the type that the trainer declares.

    Example:
        >>> checked_arguments({"adam_beta2": "0.95"}, "training", {})
        {'adam_beta2': 0.95}
    """
    checked = {}
    for name, value in values.items():
        if name in MANAGED:
            raise ConfigurationError(f"{where}.{name} is not for a recipe: {MANAGED[name]}.")
        kinds = _kinds()
        if name not in kinds:
            hint = nearest(name, [*known, *kinds]) or " Neither has SentenceTransformerTrainingArguments such a field."
            raise ConfigurationError(f"{where}.{name} is not a key here.{hint}")
        found = converted(kinds[name], value, f"{where}.{name}")
        is_plain = found is None or isinstance(found, bool | int | float | str | list | dict)
        checked[name] = found if is_plain and type(found).__module__ == "builtins" else value
    return checked


def check_reports(report_to: str | Sequence[str]) -> None:
    """Refuse integrations that transformers does not have, or whose package is missing."""
    from transformers.integrations import integration_utils

    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("none", "all", *integration_utils.get_available_reporting_integrations()):
            continue
        known = ["none", "all", *integration_utils.INTEGRATION_TO_CALLBACK]
        if name not in known:
            raise ConfigurationError(f"training.report_to={name} is unknown; known: {known}.{nearest(name, known)}")
        if name == "tensorboard":
            require("train", name, purpose="training.report_to")
        raise ConfigurationError(
            f"training.report_to={name} needs a package that is not installed: pip install "
            f"{_PACKAGES.get(name, name)}, or set training.report_to=none."
        )


@cache
def _kinds() -> dict[str, Any]:
    """Return the trainer's arguments with their types; imported on first use, since it takes seconds."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    kinds = typing.get_type_hints(SentenceTransformerTrainingArguments)
    return {field.name: kinds[field.name] for field in dataclasses.fields(SentenceTransformerTrainingArguments)}
