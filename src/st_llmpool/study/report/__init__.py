"""The report of a study, from its runs and their scores: Markdown with figures, and a page rendered from it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ...modules.errors import DataError, __version__
from ...stats import tables
from ...stats.comparison import Comparison, compare
from ...stats.plots import require_libraries
from ...stats.results import Results, label
from ...utils.files import atomic_folder
from ...utils.words import counted, markdown
from ..records import RunRecord
from ..settings import Study
from .document import Document
from .findings import COMPARISON, write_claims, write_findings, write_scores
from .models import write_convergence, write_cost, write_layers
from .runs import command, missing_runs, write_equality, write_limits, write_runs, write_set_up

_PICTURES = {  # at most four go into the summary: file of the report, and its alternative text
    f"{COMPARISON}/*_ranks.png": "Mean ranks",
    "figures/runs*.png": "Mean score of every run",
    "figures/validation*.png": "Validation",
    "figures/quality_against_cost*.png": "Quality against cost",
}


def write_report(study: Study, records: Sequence[RunRecord], results: Results, folder: Path) -> Path:
    """Write the report of a study's finished runs, in place of an earlier one.

    The folder gets ``report.md``, its page ``index.html``, which needs no other file, ``summary`` with its pictures,
    ``tables`` (CSV), ``comparison`` (every statistic, and figures of the tests) and ``figures``.

    Args:
        study: The study.
        records: Its finished runs; without any the report says what is missing.
        results: Their scores.
        folder: Folder of the report.

    Returns:
        The page.

    Raises:
        MissingExtraError: If the libraries that draw are not installed.

    Example:
        >>> records = finished(study.runs(), Path("out"))  # doctest: +SKIP
        >>> write_report(study, records, read_scores(records, Path("out")), Path("out/report"))  # doctest: +SKIP
        PosixPath('out/report/index.html')
    """
    require_libraries()
    comparison, reason = _compare(study, results)
    with atomic_folder(folder, replace=True) as scratch:
        document = Document(study.name, scratch)
        _write_head(document, study, records)
        document.section("Set-up")
        write_set_up(document, study, records, results)
        document.section("Equal training")
        write_equality(document, study, records)
        if comparison is None:
            document.section("Verdicts")
            document.text(f"No verdict yet: {reason}", warning=True)
        elif study.withdrawn:
            document.section("Scores")
            write_scores(document, comparison, marks=False)
        else:
            tables.write(comparison, scratch / COMPARISON)
            (scratch / COMPARISON / "comparison.json").write_text(tables.to_json(comparison) + "\n", encoding="utf-8")
            write_findings(document, study, comparison)
            document.section("The claims of the paper")
            write_claims(document, comparison)
        document.section("Convergence")
        write_convergence(document, records)
        document.section("Layers")
        write_layers(document, records)
        document.section("Cost")
        write_cost(document, records, comparison)
        document.section("Limits")
        write_limits(document, study, records, comparison)
        document.section("Runs and how to reproduce them")
        write_runs(document, study, records)
        document.write()
        write_summary(document, study, records)
    return folder / "index.html"


def _compare(study: Study, results: Results) -> tuple[Comparison | None, str]:
    """Return the comparison of what is there, or why there is none."""
    scores = results.scores
    present = {label(*names) for names in zip(scores["design"], scores["option"], strict=True)}
    if len(present) < 2:
        return None, f"{len(present)} of {len(study.designs)} designs have results, and a comparison needs two."
    try:
        return compare(results, [pair for pair in study.contrasts or [] if set(pair.split(":")) <= present]), ""
    except DataError as error:
        return None, str(error)


def _write_head(document: Document, study: Study, records: Sequence[RunRecord]) -> None:
    today, total = datetime.now(UTC).strftime("%Y-%m-%d"), counted(len(study.runs()), "run")
    document.text(f"A study by st_llmpool {__version__}: {len(records)} of {total}, report of {today}")
    if study.description:
        document.text(study.description)
    if study.withdrawn:
        document.text(f"Verdicts withdrawn. {study.withdrawn}", warning=True)
    absent = len(missing_runs(study, records))
    if absent:
        document.text(f"Not finished: {absent} of {total} missing, so all results may change.", warning=True)
    rising = sum(record.rising is True for record in records)
    if rising:
        number = f"{rising} of {counted(len(records), 'run')}"
        document.text(f"Under-trained: the validation of {number} still rose at the end.", warning=True)


def write_summary(document: Document, study: Study, records: Sequence[RunRecord]) -> None:
    """Write ``summary/summary.md``, sections of the report with one figure of each kind."""
    folder = document.folder / "summary"
    folder.mkdir()
    parts = [f"# {markdown(study.name)}\n"]
    parts += [f"{markdown(study.description, start=True)}\n"] if study.description else []
    parts += [f"> **Verdicts withdrawn.** {markdown(study.withdrawn)}\n"] if study.withdrawn else []
    parts.append(document.markdown("Scores", "Verdicts"))
    runs, seeds = counted(len(study.runs()), "run"), counted(len({record.seed for record in records}), "seed")
    parts.append(
        f"From {len(records)} of {runs} with {seeds}, by `{command(study)}`. Add `--report` to write the full report "
        f"from `results.parquet`.\n"
    )
    for pattern, words in _PICTURES.items():
        for file in sorted(document.folder.glob(pattern))[:1]:
            shutil.copy(file, folder / file.name)
            parts.append(f"![{words}]({file.name})\n")
    (folder / "summary.md").write_text("\n".join(parts), encoding="utf-8")
