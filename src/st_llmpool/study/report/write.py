"""Turns a finished or half-finished study into one page that reads as a short paper, with its tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ...modules.errors import DataError, __version__
from ...stats import tables
from ...stats.compare import Comparison, compare, label
from ...stats.plots import require_libraries
from ...stats.results import Results
from ...stats.tables import to_json
from ...utils.files import atomic_folder
from ...utils.words import counted
from ..records import RunRecord
from ..settings import Study
from .convergence import convergence
from .cost import cost
from .document import Block, Section, Table, Text, write_page, write_tables
from .equality import equality
from .findings import COMPARISON, findings
from .layers import layers
from .set_up import limits, missing, missing_runs, runs_sheet, set_up
from .summary import write_summary


def write_report(study: Study, records: Sequence[RunRecord], results: Results, folder: Path) -> Path:
    """Writes the report of what is finished of a study; one that is there is replaced when the new one is whole.

    In the folder are ``index.html``, which needs no other file, ``summary`` with its pictures, ``tables`` (CSV and
    Markdown), ``comparison`` (every statistic, and the pictures of the tests) and ``figures``.

    Args:
        study: The study.
        records: Its finished runs; none is enough for a report of what is missing.
        results: Their scores.
        folder: Where the report goes.

    Returns:
        The page.

    Raises:
        ModuleNotFoundError: If the libraries that draw are not installed.

    Example:
        >>> records = finished(study.runs(), Path("out"))  # doctest: +SKIP
        >>> write_report(study, records, read_scores(records, Path("out")), Path("out/report"))  # doctest: +SKIP
        PosixPath('out/report/index.html')
    """
    require_libraries()
    comparison, reason = _compare(study, results)
    with atomic_folder(folder, replace=True) as scratch:
        found: list[Section] = []
        if comparison is not None:
            tables.write(comparison, scratch / COMPARISON)
            (scratch / COMPARISON / "comparison.json").write_text(to_json(comparison) + "\n", encoding="utf-8")
            found = findings(study, comparison, scratch)
        else:
            found = [Section("Verdicts", [Text(f"No verdict yet: {reason}", warning=True)])]
        sections = [
            Section("Set-up", set_up(study, records, results)),
            Section("Equal training", equality(study, records)),
            *found,
            Section("Convergence", convergence(records, scratch)),
            Section("Layers", layers(records, scratch)),
            Section("Cost", cost(records, comparison, scratch)),
            Section("Limits", limits(study, records, comparison)),
            Section("Runs, and how to make this report", [*missing(study, records), Table(runs_sheet(records))]),
        ]
        write_tables(sections, scratch / "tables")
        write_page(study.name, _subtitle(study, records), _head(study, records), sections, scratch / "index.html")
        write_summary(study, records, comparison, scratch)
    return folder / "index.html"


def _compare(study: Study, results: Results) -> tuple[Comparison | None, str]:
    """Returns the comparison of what is there, or why there is none."""
    scores = results.scores
    present = {label(*names) for names in zip(scores["design"], scores["option"], strict=True)}
    if len(present) < 2:
        return None, f"{len(present)} of {len(study.designs)} designs have results, and a comparison needs two."
    contrasts = [contrast for contrast in study.contrasts or [] if set(contrast.split(":")) <= present]
    try:
        return compare(results, contrasts), ""
    except DataError as error:
        return None, str(error)


def _subtitle(study: Study, records: Sequence[RunRecord]) -> str:
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    return (
        f"A study by st_llmpool {__version__}: {len(records)} of {counted(len(study.runs()), 'run')}, report of {today}"
    )


def _head(study: Study, records: Sequence[RunRecord]) -> list[Block]:
    blocks: list[Block] = [Text(study.description)] if study.description else []
    absent = len(missing_runs(study, records))
    if absent:
        text = (
            f"Not finished: {absent} of {counted(len(study.runs()), 'run')} missing, and all that follows may change."
        )
        blocks.append(Text(text, warning=True))
    rising = sum(record.rising is True for record in records)
    if rising:
        text = f"Under-trained: the validation of {rising} of {counted(len(records), 'run')} still rose at the end."
        blocks.append(Text(text, warning=True))
    return blocks
