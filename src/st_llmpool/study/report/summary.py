"""The short form of a report, which is what is kept of a study beside its results."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ...stats.compare import Comparison
from ...utils.words import counted
from ..records import RunRecord
from ..settings import Study
from .findings import COMPARISON, scores_sheets, verdict
from .set_up import command

_PICTURES = {  # at most four are kept: file of the report, and what it shows
    f"{COMPARISON}/*_critical_difference.png": "Mean ranks",
    "figures/runs*.png": "Mean score of every run",
    "figures/validation*.png": "Validation",
    "figures/quality_against_cost*.png": "Quality against cost",
}


def write_summary(study: Study, records: Sequence[RunRecord], comparison: Comparison | None, folder: Path) -> None:
    """Write ``summary/summary.md`` and its pictures, one of each kind, into the folder of a report.

    Args:
        study: The study.
        records: Its finished runs.
        comparison: Its results, compared; None if there is nothing to compare yet.
        folder: Of the report, whose pictures are drawn.
    """
    place = folder / "summary"
    place.mkdir()
    pictures = []
    for pattern, words in _PICTURES.items():
        for file in sorted(folder.glob(pattern))[:1]:
            shutil.copy(file, place / file.name)
            pictures += [f"![{words}]({file.name})", ""]
    text = "\n".join([*_text(study, records, comparison), *pictures])
    (place / "summary.md").write_text(text, encoding="utf-8")


def _text(study: Study, records: Sequence[RunRecord], comparison: Comparison | None) -> list[str]:
    runs = f"{len(records)} of {counted(len(study.runs()), 'run')}"
    seeds = len({record.seed for record in records})
    lines = [f"# {study.name}", "", *([study.description, ""] if study.description else [])]
    if comparison is None:
        return [*lines, f"No verdict yet: {runs} finished.", ""]
    for sheet in scores_sheets(comparison):
        lines += [sheet.to_markdown(), ""]
    return [
        *lines,
        "`> c`: better than design c after Holm's correction and beyond the noise of seeds; `> (c)`: the same, but in "
        "a test not named beforehand.",
        "",
        *(f"- **{kind.title}**: {verdict(kind)}" for kind in comparison.types),
        "",
        f"From {runs} with {counted(seeds, 'seed')}, by `{command(study)}`. The full report, with what "
        f"limits these verdicts, is made from `results.parquet` by adding `--report`.",
        "",
    ]
