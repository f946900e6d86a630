"""The report of a study, from its runs and their scores: Markdown with figures, and a page rendered from it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from ...modules.errors import DataError, __version__
from ...stats import tables
from ...stats.comparison import Comparison, compare
from ...stats.plots import require_libraries
from ...stats.results import COLUMNS, Results, label
from ...stats.tables import ONE_CORPUS
from ...utils.files import atomic_folder
from ...utils.words import counted, listed, markdown
from ..records import RunRecord, registration
from ..settings import Study, designs_of
from ..sweep import tunings
from .document import Document
from .findings import COMPARISON, answer, headline, mean_scores, write_results, write_tests
from .models import write_convergence, write_cost, write_layers
from .runs import (
    command,
    design_names,
    missing_runs,
    write_equality,
    write_limits,
    write_runs,
    write_set_up,
    write_sweep,
)

_PICTURES = {  # at most four go into the summary: file of the report, and its alternative text
    "figures/forest*.png": "Difference of each contrast",
    f"{COMPARISON}/*_ranks.png": "Mean ranks",
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
        results: Their scores, with those of untrained designs (step 0) and BM25 if they were evaluated.
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
    steps, lexical = results.table["step"], results.table["design"] == "bm25"
    comparison, reason = _compare(study, results, (steps == "") & ~lexical)
    untrained, _ = _compare(study, Results(results.table.assign(step="", diverged=False)), steps == "0")
    names = design_names(study) | (comparison.names if comparison else {})
    named = [replace(record, design=names[label(record.design, record.option)], option="") for record in records]
    tested = comparison is not None and not study.withdrawn
    title = headline(comparison) if comparison and tested else study.name
    with atomic_folder(folder, replace=True) as scratch:
        document = Document(title, scratch)
        _write_head(document, study, records, comparison, folder.parent)
        if comparison is None:
            document.section("Verdicts")
            document.text(f"No verdict yet: {reason}", warning=True)
        else:
            if tested:
                tables.write(comparison, scratch / COMPARISON)
                (scratch / COMPARISON / "comparison.json").write_text(
                    tables.to_json(comparison) + "\n", encoding="utf-8"
                )
            write_results(document, study, comparison, untrained, Results(results.table[lexical]).scores, marks=tested)
        document.section("Training")
        write_convergence(document, named)
        document.section("Cost")
        write_cost(document, named, {} if comparison is None else mean_scores(comparison, ""))
        document.section("Layers")
        write_layers(document, named)
        document.section("Method")
        write_set_up(document, study, records, results, names)
        document.section("Equal training")
        write_equality(document, study, records, names)
        write_sweep(document, tunings(study, folder.parent), names)
        if comparison and tested:
            write_tests(document, study, comparison)
        document.section("Limits")
        write_limits(document, study, records, comparison)
        document.section("Runs and how to reproduce them")
        write_runs(document, study, records)
        document.section("How to cite")
        _write_citation(document, study, results, title)
        document.write()
        write_summary(document, study, records)
    return folder / "index.html"


def _compare(study: Study, results: Results, chosen: pd.Series) -> tuple[Comparison | None, str]:
    """Return the comparison of the chosen rows, or why there is none."""
    table = results.table[chosen]
    scores = table[(table["item"] == "") & ~table["diverged"]]
    present = {label(*names) for names in zip(scores["design"], scores["option"], strict=True)}
    if len(present) < 2:
        return None, f"{len(present)} of {len(study.designs)} designs have results, and a comparison needs two."
    contrasts = [pair for pair in study.contrasts or [] if designs_of(pair) <= present]
    try:
        return compare(Results(table, results.notes), contrasts, rope=study.rope), ""
    except DataError as error:
        return None, str(error)


def _write_head(
    document: Document, study: Study, records: Sequence[RunRecord], comparison: Comparison | None, output_dir: Path
) -> None:
    """Add the abstract, then what a reader must know first."""
    today, total = datetime.now(UTC).strftime("%Y-%m-%d"), counted(len(study.runs()), "run")
    document.text(f"Study {study.name}, by st_llmpool {__version__}: {len(records)} of {total}, report of {today}")
    sizes = {record.base: record.training["parameters"] for record in records if "parameters" in record.training}
    bases = [name + (f", {sizes[name] / 1e6:.3g} million parameters" if name in sizes else "") for name in study.bases]
    seeds = counted(len(study.seeds), "seed")
    kinds = comparison.types if comparison else ()
    where = "; ".join(f"{kind.title} {kind.size}" for kind in kinds) or "no scores to compare yet"
    abstract = [
        ("Question", study.description or f"Which of {len(study.designs)} designs is best?"),
        ("Base", "; ".join(bases)),
        ("Data", f"{seeds} per design; {where}"),
    ]
    if comparison and not study.withdrawn:
        abstract.append(("Answer", answer(comparison)))
    limits = [ONE_CORPUS] if any(kind.corpora == 1 for kind in kinds) else []
    limits += ["One seed: the results hold for these runs."] if len(study.seeds) == 1 else []
    abstract.append(("Limit", " ".join(limits) or "One recipe and these bases: other sizes and data may differ."))
    document.bullets(abstract)
    document.text(registration(study, output_dir))
    if study.withdrawn:
        document.text(f"Verdicts withdrawn. {study.withdrawn}", warning=True)
    left_out = [tuning for tuning in tunings(study, output_dir) if tuning.is_finished and tuning.chosen is None]
    if left_out:
        names = listed(" ".join([tuning.base, tuning.label]) for tuning in left_out)
        document.text(f"Left out, since every run of the sweep diverged: {names}.", warning=True)
    absent = sum(not any(tuning.is_of(run) for tuning in left_out) for run in missing_runs(study, records))
    if absent:
        document.text(f"Not finished: {absent} of {total} missing, so all results may change.", warning=True)
    for what, runs in (
        ("Diverged, left out of every score", [record for record in records if record.diverged]),
        ("Under-trained, validation still rose at the end", [record for record in records if record.rising]),
    ):
        if runs:
            names = listed(record.id for record in runs)
            document.text(f"{what}: {len(runs)} of {counted(len(records), 'run')}: {names}.", warning=True)


def _write_citation(document: Document, study: Study, results: Results, title: str) -> None:
    """Add a citation with a hash of the scores, and links to the data."""
    columns = [column for column in COLUMNS if column != "file"]
    table = results.table[columns].sort_values(columns).to_csv(index=False, float_format="%.6f")
    digest = hashlib.sha256(table.encode()).hexdigest()
    year = datetime.now(UTC).year
    document.code(f"{title}. Study {study.name!r}, st_llmpool {__version__}, {year}. Scores sha256:{digest[:32]}.")
    files = {"results.parquet (all scores)": "../results.parquet", "study.yaml (settings)": "../study.yaml"}
    document.links(files | {"tables (CSV)": "tables", "every statistic": COMPARISON})


def write_summary(document: Document, study: Study, records: Sequence[RunRecord]) -> None:
    """Write ``summary/summary.md``, sections of the report with one figure of each kind."""
    folder = document.folder / "summary"
    folder.mkdir()
    parts = [f"# {markdown(document.title)}\n"]
    parts += [f"{markdown(study.description, start=True)}\n"] if study.description else []
    parts += [f"> **Verdicts withdrawn.** {markdown(study.withdrawn)}\n"] if study.withdrawn else []
    parts.append(document.markdown("Results", "Verdicts", pictures=False))
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
