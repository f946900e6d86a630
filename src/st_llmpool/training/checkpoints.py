"""Finds the last complete checkpoint, and loads one into the model that is being trained."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import nn

from ..adapters import has_adapter
from ..modules.errors import InputError
from ..utils.reading import read_json
from .checkpoint_seal import fault_of

logger = logging.getLogger(__name__)


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint that is complete and undamaged, or None; logs which it skips and why.

    A run that is killed while it writes leaves half a checkpoint.

    Args:
        folder: The trainer's output folder.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    checkpoints.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in checkpoints:
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is skipped: %s.", checkpoint, fault)
    return None


def load_trained_weights(model: SentenceTransformer, checkpoint: Path) -> None:
    """Loads what trains beside a frozen backbone: the adapter, if there is one, and the modules after the backbone.

    The backbone itself stays as it is, quantised or not: a checkpoint does not hold it, and reading the base a second
    time would give other shapes if it is quantised.

    Args:
        model: Changed in place.
        checkpoint: Folder of the checkpoint.

    Raises:
        InputError: If the checkpoint is of another model.
    """
    if has_adapter(model):
        _load_adapter(model[0].model, checkpoint)
    load_poolings(model, checkpoint)


def load_poolings(model: SentenceTransformer, checkpoint: Path) -> None:
    """Loads the modules after the backbone.

    Args:
        model: Changed in place.
        checkpoint: Folder of a saved model.

    Raises:
        InputError: If the checkpoint is of another model.
    """
    for entry in read_json(checkpoint / "modules.json")[1:]:
        module = model[entry["idx"]]
        if any(True for _ in module.parameters()):
            _load_state(module, load_file(checkpoint / entry["path"] / "model.safetensors"), checkpoint)


def processes_of(checkpoint: Path) -> int:
    """Returns how many processes wrote a checkpoint, each of which keeps its random state there."""
    return len(list(checkpoint.glob("rng_state*.pth")))


def _load_adapter(backbone: Any, checkpoint: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = load_file(checkpoint / "adapter_model.safetensors")
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    # peft's own name for a magnitude of DoRA; a saved model has the whole one.
    weights = {name.replace("magnitude_vector.weight", "magnitude_vector"): weights[name] for name in weights}
    expected = get_peft_model_state_dict(backbone, adapter_name=backbone.active_adapters()[0])
    _check_fit({name: tensor.shape for name, tensor in expected.items()}, weights, checkpoint)
    set_peft_model_state_dict(backbone, weights, adapter_name=backbone.active_adapters()[0])


def _load_state(module: nn.Module, weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    _check_fit({name: tensor.shape for name, tensor in module.state_dict().items()}, weights, checkpoint)
    module.load_state_dict(weights)


def _check_fit(expected: dict[str, torch.Size], found: dict[str, torch.Tensor], checkpoint: Path) -> None:
    different = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or expected[name] != found[name].shape
    )
    if different:
        raise InputError(
            f"The checkpoint {str(checkpoint)!r} is of another model: {len(different)} weights are missing, new or of "
            f"another shape, such as {different[0]!r}. Resume with the recipe that it was trained with, or choose "
            f"another output_dir."
        )
