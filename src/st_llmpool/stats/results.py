"""The table of scores that everything else here reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

MAIN_SCORE = "main_score"  # mteb's name for the score that a task is judged by
#: Text columns of a table of results and their values where they are missing; `diverged` (boolean: validation ended
#: below its start; False where missing) and `score` follow them.
DEFAULTS = {
    "base": "",
    "design": "",
    "option": "",
    "attention": "",
    "readout": "",
    "pooling": "",
    "seed": "0",
    "step": "",
    "corpus": "",
    "task": "",
    "task_type": "",
    "split": "test",
    "subset": "default",
    "metric": MAIN_SCORE,
    "item": "",
    "dataset_revision": "",
    "mteb_version": "",
    "languages": "",
    "file": "",
}
COLUMNS = [*DEFAULTS, "diverged", "score"]
KEY = ["base", "design", "option", "seed", "step", "task", "split", "subset", "metric", "item"]  # of one score
MAX_CONTRASTS = 6
MAX_MODELS = 30


@dataclass(frozen=True)
class Results:
    """Scores of several designs. A model from elsewhere is a design of its own, without base and option.

    Args:
        table: One row per score, with the columns of `COLUMNS`. `item` is empty for the score of a task, else the
            query, pair or text that is scored. A score that is not defined is NaN.
        notes: What a reader must know about how they were read, in sentences.
    """

    table: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def scores(self) -> pd.DataFrame:
        """Scores of tasks."""
        return self.table[self.table["item"] == ""]

    @property
    def items(self) -> pd.DataFrame:
        """Scores of single queries, pairs and texts."""
        return self.table[self.table["item"] != ""]


def complete(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with all `COLUMNS` in order; missing values and empty texts have their defaults.

    Example:
        >>> import pandas as pd
        >>> complete(pd.DataFrame({"design": ["a"], "seed": [None], "score": [0.5]}))[["design", "seed", "split"]]
          design seed split
        0      a    0  test
    """
    texts = {
        column: table[column].astype("object").fillna(default).astype(str).replace("", default)
        if column in table
        else default
        for column, default in DEFAULTS.items()
    }
    diverged = table["diverged"].fillna(False).astype(bool) if "diverged" in table else False
    return table.assign(**texts, diverged=diverged)[COLUMNS].astype({"score": float})


def label(design: str, option: str = "") -> str:
    """Return what a design with an option is called in tables and contrasts.

    Example:
        >>> label("5"), label("5", "last 4 layers")
        ('5', '5 (last 4 layers)')
    """
    return f"{design} ({option})" if option else design


def counted_corpora(number: int) -> str:
    """Return a number of corpora in words.

    Example:
        >>> counted_corpora(1), counted_corpora(12)
        ('1 corpus', '12 corpora')
    """
    return f"{number} {'corpus' if number == 1 else 'corpora'}"


def design_names(designs: pd.DataFrame) -> list[str]:
    """Return a name for each design, from its factors if they are known: attention, readout and pooling.

    Args:
        designs: Rows with ``design``, ``option``, ``attention``, ``readout`` and ``pooling``. Where factors do not
            distinguish two designs, the option or the design is added.

    Example:
        >>> import pandas as pd
        >>> names = {"attention": "causal", "readout": "eos", "pooling": "plain"}
        >>> rows = [{"design": "1", **names}, {"design": "1", "option": "adapted", **names}, {"design": "bm25"}]
        >>> design_names(pd.DataFrame(rows).fillna(""))
        ['causal · EOS · plain', 'causal · EOS · plain (adapted)', 'bm25']
    """
    names = [
        label(" · ".join([row["attention"], "EOS" if row["readout"] == "eos" else row["readout"], row["pooling"]]),
              row["option"])
        if row["attention"] else label(row["design"], row["option"])
        for row in designs.to_dict("records")
    ]  # fmt: skip
    several = Counter(name for name, _ in dict.fromkeys(zip(names, designs["design"], strict=True)))
    pairs = zip(names, designs["design"], strict=True)
    return [f"{name} [{design}]" if several[name] > 1 else name for name, design in pairs]
