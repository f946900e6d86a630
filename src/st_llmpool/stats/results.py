"""The tidy table of scores that everything else here reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["base", "design", "option", "seed", "task", "task_type", "split", "subset", "metric", "score"]
ITEM_COLUMNS = [*COLUMNS[:-1], "item", "score"]
SOURCE_COLUMNS = ["dataset_revision", "mteb_version", "languages", "file"]  # of each score, empty where not known
MAIN_SCORE = "main_score"  # mteb's name for the score that a task is judged by
MAX_CONTRASTS = 6
MAX_MODELS = 30


@dataclass(frozen=True)
class Results:
    """Scores of several designs. A foreign model is a design of its own, without base and option.

    Args:
        scores: One row for each base, design, option, seed, task, split, subset and metric; columns as in `COLUMNS`.
            A score that is not defined is NaN. `SOURCE_COLUMNS` may follow.
        items: One row for each score of an item (a query, a pair, a text) where there are such; columns as in
            `ITEM_COLUMNS`.
        notes: What a reader must know about how they were read, in sentences.
    """

    scores: pd.DataFrame
    items: pd.DataFrame
    notes: tuple[str, ...] = ()


def label(design: str, option: str = "") -> str:
    """Returns what a design with an option is called in tables and contrasts.

    Example:
        >>> label("5"), label("5", "last 4 layers")
        ('5', '5 (last 4 layers)')
    """
    return f"{design} ({option})" if option else design
