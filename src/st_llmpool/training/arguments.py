"""Trainer arguments that all kinds of training have in common."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from ..modules.errors import ConfigurationError
from .optimizers import trainer_optimizer
from .recipe import TrainingSettings

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=TrainingArguments)

_WIDE_BASE = 512


def shared_arguments(
    training: TrainingSettings, folder: Path, *, learning_rate: float, seed: int, width: int
) -> dict[str, Any]:
    """Return keyword arguments of a ``TrainingArguments`` for a run in `folder`, on a base of that width."""
    precision = precision_of(training.precision, width)
    return {
        "output_dir": str(folder / "checkpoints"),
        "use_cpu": not torch.accelerator.is_available(),  # or accelerate starts several processes without a group
        "seed": seed,
        "full_determinism": training.full_determinism,
        "max_steps": training.max_steps or -1,
        "num_train_epochs": training.num_train_epochs,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        # One batch is split over the processes. By default each process would draw a batch of its own, from
        # another dataset than the others, and with their duplicates as its negatives.
        "accelerator_config": {"split_batches": True},
        "dataloader_drop_last": True,
        "dataloader_num_workers": training.dataloader_num_workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "learning_rate": learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps if training.warmup_steps < 1 else int(training.warmup_steps),
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": trainer_optimizer(training.optim),
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": training.report_to,
        "save_strategy": "steps",
        "save_total_limit": training.save_total_limit,
        **training.arguments,
    }


def trainer_arguments(kind: type[T], **values: Any) -> T:
    """Build the trainer's arguments, on one GPU per process."""
    try:
        arguments = kind(**values)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigurationError(f"The settings under training are refused: {reason}") from error
    if arguments.n_gpu > 1:  # else the trainer spreads one process over all GPUs with DataParallel
        logger.warning("One of %d GPUs is used; accelerate launch -m st_llmpool train uses all.", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def enable_gradient_checkpointing(backbone: Any) -> None:
    """Make a transformers model recompute activations in the backward pass instead of storing them."""
    if hasattr(backbone, "activation_checkpointing_enable"):  # transformers 5.23 renamed it
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def dtype_of(arguments: TrainingArguments) -> torch.dtype:
    """Return the dtype of frozen weights for the trainer's precision."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def precision_of(wanted: str, width: int) -> str:
    """Return ``bf16``, ``fp16`` or ``fp32`` for a recipe's precision.

    ``auto`` is ``bf16`` on a GPU that has it. On a CPU it is ``bf16`` for bases of at least 512 dimensions if it
    multiplies matrices in bf16 faster (AVX512-BF16, AMX, ARMv8.6); smaller bases gain little from it.
    """
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if width >= _WIDE_BASE and _is_bf16_faster() else "fp32"


def _is_bf16_faster() -> bool:
    """Whether this CPU multiplies matrices in bf16 at least 1.3 times as fast; 2.7 with AVX512-BF16."""
    matrices = {dtype: torch.ones(_WIDE_BASE, _WIDE_BASE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(matrices, math.inf)
    for _ in range(10):  # the fastest of alternating runs: other programs slow down single ones
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            matrix @ matrix
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] > 1.3 * seconds[torch.bfloat16]
