"""The folder of a run: what may enter it, where it goes on, and how its model gets there whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol, Self

from ..modules.errors import ConfigurationError
from .checkpoints import last_checkpoint
from .settings import differences

logger = logging.getLogger(__name__)

#: What may differ between a run and its resumption: nothing that changes the weights.
_FREE_TO_CHANGE = {
    "output_dir",
    "evaluation.steps",
    "evaluation.batch_size",
    "evaluation.at_start",
    "training.logging_steps",
    "training.save_steps",
    "training.keep_checkpoints",
    "training.report_to",
    "training.workers",
}


class SavedRecipe(Protocol):
    """A recipe that is written to, and read from, the folder of its run."""

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Reads it."""

    def to_dict(self) -> dict[str, Any]:
        """Returns every setting."""


def check_output(recipe: SavedRecipe, folder: Path, *, resume: bool) -> None:
    """Neither mixes two runs in one folder nor goes on with another recipe.

    Args:
        recipe: The recipe of the run.
        folder: Its folder.
        resume: Whether to go on with a run that is there.

    Raises:
        ConfigurationError: If the folder holds a run that is not resumed, another run, or something else's model.
    """
    if not (folder / "recipe.yaml").is_file():
        if (folder / "model").exists():
            raise ConfigurationError(f"output_dir={str(folder)!r} already holds a model: choose another output_dir.")
        return
    if not resume:
        raise ConfigurationError(
            f"output_dir={str(folder)!r} already holds a run. Resume it (--resume), choose another output_dir, or "
            f"delete it."
        )
    earlier, now = type(recipe).from_yaml(folder / "recipe.yaml").to_dict(), recipe.to_dict()
    changes = [name for name in differences(earlier, now) if name not in _FREE_TO_CHANGE - _bound(now)]
    if changes:
        raise ConfigurationError(
            f"The recipe is not the one that {str(folder)!r} was started with: {', '.join(changes)} changed. Restore "
            f"it ({folder / 'recipe.yaml'} has every value), or choose another output_dir."
        )


def _bound(settings: dict[str, Any]) -> set[str]:
    """Returns what is free to change in general, but changes the weights of this run."""
    bound = set()
    if settings["evaluation"].get("keep_best"):
        bound.add("evaluation.steps")  # which checkpoints there are to choose from
    if settings.get("loss", {}).get("teacher"):
        bound.add("evaluation.batch_size")  # of the teacher too, whose scores differ in the last bits by it
    return bound


def checkpoint_of(folder: Path, world_size: int) -> Path | None:
    """Returns the checkpoint to go on from; None, with a warning, if there is none yet."""
    checkpoint = last_checkpoint(folder / "checkpoints", world_size)
    if checkpoint is None:
        logger.warning("%s has no whole checkpoint yet: training starts from the beginning.", folder)
    return checkpoint
