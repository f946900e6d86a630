"""Guard a run directory: refuse mixed runs, one process at a time, find the checkpoint to resume from."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from ..modules.errors import ConfigurationError, StLlmpoolError
from ..utils.locks import locked_folder
from ..utils.settings import differences
from .checkpoints import last_checkpoint, processes_of

logger = logging.getLogger(__name__)

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
}


class SavedRecipe(Protocol):
    """A recipe that is written to, and read from, the folder of its run."""

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Reads it."""

    def to_dict(self) -> dict[str, Any]:
        """Returns every setting."""


def check_output(recipe: SavedRecipe, folder: Path, *, resume: bool) -> None:
    """Checks that a folder is free, or holds an interrupted run of the same recipe.

    A folder without a checkpoint or a finished stage holds no run yet: a first start that was refused or stopped may
    be started again with a corrected recipe.

    Args:
        recipe: The recipe of the run.
        folder: Its folder.
        resume: Whether to resume a run that is there.

    Raises:
        ConfigurationError: If the folder holds a run that is not resumed, another run, or something else's model.
    """
    if not (folder / "recipe.yaml").is_file():
        if (folder / "model").exists():
            raise ConfigurationError(f"output_dir={str(folder)!r} already holds a model: choose another output_dir.")
        return
    if not _has_begun(folder):
        return
    if not resume:
        raise ConfigurationError(
            f"output_dir={str(folder)!r} already holds a run. Resume it (--resume), choose another output_dir, or "
            f"delete it."
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
    """Returns whether a run, or one of its stages, has come to a checkpoint or its end."""
    return any(
        (place / "model").is_dir() or any(place.glob("checkpoints/checkpoint-*/trainer_state.json"))
        for place in (folder, *folder.glob("stages/*"))
    )


def _bound(settings: dict[str, Any]) -> set[str]:
    """Returns what is free to change in general, but changes the weights of this run."""
    bound = set()
    if settings["evaluation"].get("load_best_model_at_end"):
        bound.add("evaluation.eval_steps")  # which checkpoints there are to choose from
    if settings.get("loss", {}).get("teacher"):
        bound.add("evaluation.batch_size")  # of the teacher too, whose scores differ in the last bits by it
    return bound


def checkpoint_of(folder: Path, world_size: int) -> Path | None:
    """Returns the checkpoint to resume from; None if there is none yet.

    Args:
        folder: The run's folder.
        world_size: Number of processes now; logs what differs if the checkpoint is of another number.
    """
    checkpoint = last_checkpoint(folder / "checkpoints")
    left = [path.name for path in (folder / "checkpoints").glob("checkpoint-*")]
    if checkpoint is None and left:
        logger.warning("No checkpoint in %s is complete (%s): step 1 is next.", folder, ", ".join(sorted(left)))
    if checkpoint is not None and processes_of(checkpoint) != world_size:
        logger.warning(
            "%s is of %d processes and goes on with %d: batches stay the same, dropout differs.",
            checkpoint,
            processes_of(checkpoint),
            world_size,
        )
    return checkpoint


@contextmanager
def locked_run(folder: Path, arguments: TrainingArguments) -> Iterator[None]:
    """Locks `folder` for the processes of one run; the first of them holds the lock, and all raise what it finds.

    Raises:
        ConfigurationError: If another run is active there.
    """
    with ExitStack() as stack:
        lock = locked_folder(folder)
        check_on_first_process(arguments.process_index == 0, lambda: stack.enter_context(lock))
        yield


def check_on_first_process(is_first: bool, check: Callable[[], object]) -> None:
    """Runs a check on the first process; all raise what it finds."""
    found: list[StLlmpoolError | None] = [None]
    if is_first:
        try:
            check()
        except StLlmpoolError as error:
            found = [error]
    broadcast_object_list(found)
    if found[0] is not None:
        raise found[0]


def remove_checkpoints_after(folder: Path, resumed: Path | None) -> None:
    """Removes the checkpoints that a resumed run makes again: half or damaged ones, which the new would be mixed with.

    Args:
        folder: The run's folder.
        resumed: The checkpoint that it resumes from; None if it starts from the beginning.
    """
    last = -1 if resumed is None else int(resumed.name.rpartition("-")[2])
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        if checkpoint.name.rpartition("-")[2].isdigit() and int(checkpoint.name.rpartition("-")[2]) > last:
            shutil.rmtree(checkpoint, ignore_errors=True)
