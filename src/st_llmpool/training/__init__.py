"""Training: a recipe, and the run that it describes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..utils.extras import needs

if TYPE_CHECKING:
    from .adapt_recipe import AdaptRecipe
    from .adaptation import AdaptResult, adapt
    from .batch_search import BatchTrial, largest_batch
    from .recipe import Recipe
    from .run import TrainingResult, train

__all__ = ["AdaptRecipe", "AdaptResult", "BatchTrial", "Recipe", "TrainingResult", "adapt", "largest_batch", "train"]

_FILES = {
    "AdaptRecipe": ".adapt_recipe",
    "AdaptResult": ".adaptation",
    "BatchTrial": ".batch_search",
    "Recipe": ".recipe",
    "TrainingResult": ".run",
    "adapt": ".adaptation",
    "largest_batch": ".batch_search",
    "train": ".run",
}


def __getattr__(name: str) -> object:
    if name in _FILES:  # on first use: importing torch and sentence-transformers takes seconds
        with needs("train", "Training"):
            return getattr(importlib.import_module(_FILES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
