"""Seal checkpoints, find the last complete one, and load it into the model that is being trained."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from ..adapters import has_adapter
from ..modules.errors import InputError
from ..modules.seal import MANIFEST, differences, read_manifest, record_of, write_manifest
from ..utils.reading import read_json

logger = logging.getLogger(__name__)


def seal_checkpoint(checkpoint: Path) -> None:
    """Add what the trainer wrote, on every process, to the seal that the model's save left in a checkpoint."""
    manifest = read_manifest(checkpoint)
    ignored = {MANIFEST, "README.md", *manifest.get("files", ())}
    state = [file for file in sorted(checkpoint.iterdir()) if file.is_file() and file.name not in ignored]
    write_manifest(checkpoint, {**manifest, "state": {file.name: record_of(file) for file in state}})


def fault_of(checkpoint: Path) -> str | None:
    """Return why training cannot resume from a checkpoint, None if it can.

    All processes have written their random state before the trainer's. Without a seal (of an older version, or a run
    that was killed just before it) only complete files are checked.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json, which is written last, is missing or damaged"
    states = sorted(file.name for file in checkpoint.glob("rng_state*.pth")) or ["rng_state.pth"]
    for name in (*states, "scheduler.pt"):
        if not zipfile.is_zipfile(checkpoint / name):  # a zip file's directory is at its end
            return f"{name} is missing or cut"
    if not any(checkpoint.glob("optimizer*")):
        return "the optimizer's state is missing"
    manifest = read_manifest(checkpoint)
    if not manifest and (checkpoint / MANIFEST).is_file():
        return f"{MANIFEST} is damaged"
    found = differences(checkpoint, {**manifest.get("files", {}), **manifest.get("state", {})})
    return "; ".join(map(str, found)) or None


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that is complete and undamaged, or None; log which are skipped and why.

    A run that is killed while it writes leaves half a checkpoint.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    checkpoints.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in checkpoints:
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is skipped: %s.", checkpoint, fault)
    return None


def load_trained_weights(model: SentenceTransformer, checkpoint: Path) -> None:
    """Load what trains on a frozen backbone: the adapter, if there is one, and the modules after the backbone.

    The backbone itself stays as it is, quantised or not: a checkpoint does not hold it, and reading the base a second
    time would give other shapes if it is quantised.
    """
    if has_adapter(model):
        _load_adapter(model[0].model, checkpoint)
    for entry in read_json(checkpoint / "modules.json")[1:]:
        module = model[entry["idx"]]
        if any(True for _ in module.parameters()):
            weights = load_file(checkpoint / entry["path"] / "model.safetensors")
            _check_fit(module.state_dict(), weights, checkpoint)
            module.load_state_dict(weights)


def processes_of(checkpoint: Path) -> int:
    """Return how many processes wrote a checkpoint, each of which keeps its random state there."""
    return len(list(checkpoint.glob("rng_state*.pth")))


def _load_adapter(backbone: Any, checkpoint: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = load_file(checkpoint / "adapter_model.safetensors")
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}
    # peft's in-memory name of a DoRA magnitude; files have the full name.
    weights = {name.replace("magnitude_vector.weight", "magnitude_vector"): weights[name] for name in weights}
    expected = get_peft_model_state_dict(backbone, adapter_name=backbone.active_adapters()[0])
    _check_fit(expected, weights, checkpoint)
    set_peft_model_state_dict(backbone, weights, adapter_name=backbone.active_adapters()[0])


def _check_fit(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (expected, found)]
    different = sorted(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
    if different:
        raise InputError(
            f"The checkpoint {str(checkpoint)!r} is of another model: {len(different)} weights are missing, new or of "
            f"another shape, such as {different[0]!r}. Resume with the recipe that it was trained with, or choose "
            f"another output_dir."
        )
