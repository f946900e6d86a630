"""Training: a recipe, and the run that it describes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..utils.extras import needs

if TYPE_CHECKING:
    from .mntp.adaptation import AdaptResult, adapt
    from .mntp.recipe import AdaptRecipe
    from .recipe import Recipe
    from .run import TrainingResult, train, untrained_model

__all__ = ["AdaptRecipe", "AdaptResult", "Recipe", "TrainingResult", "adapt", "train", "untrained_model"]

_FILES = {
    "AdaptRecipe": ".mntp.recipe",
    "AdaptResult": ".mntp.adaptation",
    "Recipe": ".recipe",
    "TrainingResult": ".run",
    "adapt": ".mntp.adaptation",
    "train": ".run",
    "untrained_model": ".run",
}


def __getattr__(name: str) -> object:
    if name in _FILES:  # on first use: importing torch and sentence-transformers takes seconds
        with needs("train", "Training"):
            return getattr(importlib.import_module(_FILES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
