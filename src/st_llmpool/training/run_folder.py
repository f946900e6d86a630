"""Guard a run directory: refuse mixed runs, one run at a time, resume from the last complete, undamaged checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from ..adapters import has_adapter
from ..modules.errors import ConfigurationError, InputError, StLlmpoolError
from ..modules.seal import MANIFEST, read_manifest, record_of, write_manifest
from ..modules.seal import differences as sealed_differences
from ..utils.files import locked_folder, write_atomically
from ..utils.reading import read_json, read_json_object
from ..utils.settings import differences
from .recipe import SavedRecipe

logger = logging.getLogger(__name__)

#: The file in a run's folder that records which rows it trains on.
DATA = "data.json"
#: What may differ between a run and its resumption: nothing that changes the weights.
_FREE_TO_CHANGE = {
    "output_dir",
    "evaluation.eval_steps",
    "evaluation.batch_size",
    "evaluation.eval_on_start",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.report_to",
    "training.dataloader_num_workers",
    "training.run_name",
    "training.cache",
}


def check_output(recipe: SavedRecipe, folder: Path, *, resume: bool) -> None:
    """Check that a folder is free, or holds an interrupted run of the same recipe.

    A folder without a checkpoint or a finished stage holds no run yet: a first start that was refused or stopped may
    be started again with a corrected recipe.
    """
    if not (folder / "recipe.yaml").is_file():
        if (folder / "model").exists():
            raise ConfigurationError(f"output_dir={str(folder)!r} already holds a model: choose another output_dir.")
        return
    if not _has_begun(folder):
        return
    if not resume:
        raise ConfigurationError(
            f"output_dir={str(folder)!r} already holds a run. Resume it (--resume), delete it, or name another."
        )
    try:
        earlier, now = type(recipe).from_yaml(folder / "recipe.yaml").to_dict(), recipe.to_dict()
    except ConfigurationError as error:
        raise ConfigurationError(f"{folder / 'recipe.yaml'} cannot be resumed: {error}") from error
    changes = [name for name in differences(earlier, now) if name not in _FREE_TO_CHANGE - _bound(now)]
    if changes:
        raise ConfigurationError(
            f"The recipe is not the one that {str(folder)!r} was started with: {', '.join(changes)} changed. Restore "
            f"it ({folder / 'recipe.yaml'} has every value), or choose another output_dir."
        )


def _has_begun(folder: Path) -> bool:
    """Return whether a run, or one of its stages, has come to a checkpoint or its end."""
    return any(
        (place / "model").is_dir() or any(place.glob("checkpoints/checkpoint-*/trainer_state.json"))
        for place in (folder, *folder.glob("stages/*"))
    )


def _bound(settings: dict[str, Any]) -> set[str]:
    """Return what is free to change in general, but changes the weights of this run."""
    bound = set()
    if settings["evaluation"].get("load_best_model_at_end"):
        bound.add("evaluation.eval_steps")  # which checkpoints there are to choose from
    if settings.get("loss", {}).get("teacher"):
        bound.add("evaluation.batch_size")  # of the teacher too, whose scores differ in the last bits by it
    return bound


def train_in_folder(
    folder: Path, recipe: SavedRecipe, trainer: Any, check_reload: Callable[[], object], *, resume: bool
) -> None:
    """Train from the last complete checkpoint of a run if `resume` is set, else from the start.

    The recipe is written into `folder` first, and later checkpoints, half or damaged, are removed. The first process
    calls `check_reload` before the first step of a model that is not sharded.
    """
    is_first, checkpoint = trainer.args.process_index == 0, None
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        recipe.to_yaml(folder / "recipe.yaml")
    if resume:
        checkpoint = _checkpoint_of(folder / "checkpoints", trainer.args.world_size)
    check_on_first_process(is_first, partial(_check_rows, folder / DATA, trainer.train_dataset, checkpoint))
    if is_first:
        _remove_checkpoints_after(checkpoint, folder / "checkpoints")
    if checkpoint is None:
        if not trainer.is_sharded:
            check_on_first_process(is_first, check_reload)
        trainer.train()
    elif not trainer.restore_finished(checkpoint):
        trainer.args.eval_on_start = False  # else it would count twice
        trainer.train(resume_from_checkpoint=str(checkpoint))


def _check_rows(file: Path, data: Any, checkpoint: Path | None) -> None:
    """Record the rows of a run at its start; refuse to resume it on others."""
    sets = data if isinstance(data, Mapping) else {"the training texts": getattr(data, "pieces", data)}
    now = {name: {"rows": len(rows), "sha256": _digest(rows)} for name, rows in sets.items()}
    before = read_json_object(file) if checkpoint is not None and file.is_file() else now
    changed = [
        f"{name} ({(before.get(name) or {}).get('rows', 0):,} rows then, {len(rows):,} different ones now)"
        for name, rows in sets.items()
        if before.get(name) != now[name]
    ]
    if changed:
        raise ConfigurationError(
            f"{str(file.parent)!r} was started on other data: {', '.join(changed)}. Restore them, or choose another "
            f"output_dir."
        )
    write_atomically(file, json.dumps(now, indent=1))


def _digest(rows: Any) -> str:
    """Hash texts and tokens; a teacher's scores may differ in their last bits."""
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(batch_size=10_000):
        for name, column in zip(batch.column_names, batch.columns, strict=True):
            digest.update(name.encode())
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                digest.update("\0".join(column.to_pylist()).encode("utf-8", "surrogatepass"))
            elif pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type):
                digest.update(pc.list_flatten(column).to_numpy().tobytes())
    return digest.hexdigest()


def _checkpoint_of(folder: Path, world_size: int) -> Path | None:
    """Return the checkpoint to resume from, if there is one; log what differs if other processes wrote it."""
    checkpoint = last_checkpoint(folder)
    left = sorted(path.name for path in folder.glob("checkpoint-*"))
    if checkpoint is None and left:
        logger.warning("No checkpoint in %s is complete (%s): step 1 is next.", folder.parent, ", ".join(left))
    if checkpoint is not None and processes_of(checkpoint) != world_size:
        logger.warning(
            "%s is of %d processes and continues with %d: batches stay the same, dropout differs.",
            *(checkpoint, processes_of(checkpoint), world_size),
        )
    return checkpoint


def _remove_checkpoints_after(resumed: Path | None, folder: Path) -> None:
    """Remove the checkpoints that a resumed run makes again, which the new ones would be mixed with."""
    last = -1 if resumed is None else int(resumed.name.rpartition("-")[2])
    for checkpoint in folder.glob("checkpoint-*"):
        number = checkpoint.name.rpartition("-")[2]
        if number.isdecimal() and int(number) > last:
            shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def locked_run(folder: Path) -> Iterator[Callable[[], None]]:
    """Lock `folder` for the processes of one run; the first of them holds the lock.

    Yields:
        What each process calls once all can talk to each other: it raises on all what stopped the first.
    """
    with ExitStack() as stack:
        refusal = None
        if int(os.environ.get("RANK", 0)) == 0:
            try:
                stack.enter_context(locked_folder(folder))
            except StLlmpoolError as error:
                if int(os.environ.get("WORLD_SIZE", 1)) == 1:
                    raise
                refusal = error
        yield partial(_raise_on_all, refusal)


def check_on_first_process(is_first: bool, check: Callable[[], object]) -> None:
    """Run a check on the first process; all raise what it finds."""
    refusal = None
    if is_first:
        try:
            check()
        except StLlmpoolError as error:
            refusal = error
    _raise_on_all(refusal)


def _raise_on_all(refusal: StLlmpoolError | None) -> None:
    found = [refusal]  # the others would wait for the first, or meet its next run in their collective calls
    broadcast_object_list(found)
    if found[0] is not None:
        raise found[0]


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
    found = sealed_differences(checkpoint, {**manifest.get("files", {}), **manifest.get("state", {})})
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
            f"The checkpoint {str(checkpoint)!r} is of another model: {len(different)} weights differ in name or "
            f"shape, such as {different[0]!r}. Resume with its recipe, or choose another output_dir."
        )
