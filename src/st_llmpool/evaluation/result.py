"""Result of an evaluation: one row per task, as a table for the screen, Markdown or JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table


@dataclass(frozen=True)
class TaskScore:
    """The main score of a model on a task, averaged over the task's splits and subsets.

    NaN if it is undefined, as a correlation is when all embeddings are equal.
    """

    task: str
    type: str
    metric: str
    score: float


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model.

    Args:
        model: Name of the model in mteb's result files.
        revision: Its revision there.
        rows: One for each task, in the order of the suite.
        folder: Folder of mteb's result files, with every metric, split and subset (and nDCG@10 by query for retrieval
            from a local suite); None if none were written.
        inference: Fast paths that were used, see `optimize_inference`.

    Example:
        >>> result = EvaluationResult("local/m", "1", (TaskScore("LocalSts", "STS", "cosine_spearman", 0.5),))
        >>> print(result.to_markdown())
        | Task | Type | Metric | Score |
        | --- | --- | --- | ---: |
        | LocalSts | STS | cosine_spearman | 0.5000 |
        >>> result.scores
        {'LocalSts': 0.5}
    """

    model: str
    revision: str
    rows: tuple[TaskScore, ...]
    folder: Path | None = None
    inference: str = ""

    @property
    def scores(self) -> dict[str, float]:
        """Task name to main score."""
        return {row.task: row.score for row in self.rows}

    def to_rich(self) -> Table:
        """Return a table for `rich.print`."""
        table = Table(
            "Task", "Type", "Metric", title=f"{self.model} @ {self.revision[:8]}", caption=self.inference or None
        )
        table.add_column("Score", justify="right")
        for row in self.rows:
            table.add_row(row.task, row.type, row.metric, f"{row.score:.4f}")
        return table

    def to_markdown(self) -> str:
        """Return a table in Markdown."""
        lines = ["| Task | Type | Metric | Score |", "| --- | --- | --- | ---: |"]
        lines += [f"| {row.task} | {row.type} | {row.metric} | {row.score:.4f} |" for row in self.rows]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return model, revision and rows as JSON; a score that is not defined is null."""
        rows = [asdict(row) | {"score": row.score if math.isfinite(row.score) else None} for row in self.rows]
        return json.dumps({"model": self.model, "revision": self.revision, "rows": rows}, indent=2)
