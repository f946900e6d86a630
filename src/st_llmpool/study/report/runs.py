"""What was run, whether all designs were trained equally, and the limits of the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from ...evaluation.suite import read_suite
from ...modules.errors import StLlmpoolError, __version__
from ...stats.comparison import Comparison
from ...stats.results import Results, label
from ...stats.results import design_names as names_of_designs
from ...stats.tables import ONE_CORPUS, Sheet, number
from ...training.recipe import DEFAULT_LENGTH
from ...utils.settings import differences
from ...utils.words import counted, listed
from ..records import RunRecord
from ..settings import PlannedRun, Study, factors, presets
from ..sweep import Tuning
from .document import Document

_OF_A_DESIGN = ("model.design", "model.attention", "model.pooling", "model.pooling_kwargs", "model.layer")
_SETTINGS = {  # of a recipe, with the names of earlier versions
    "tuning": ("model.tune",),
    "steps": ("training.max_steps", "training.steps"),
    "epochs": ("training.num_train_epochs", "training.epochs"),
    "batch size": ("training.batch_size",),
    "learning rate": ("training.learning_rate",),
    "learning rate of the pooling": ("training.pooling_learning_rate",),
    "schedule": ("training.lr_scheduler_type", "training.schedule"),
    "max_seq_length": ("model.max_seq_length",),
    "loss": ("loss.name",),
    "preset": ("preset",),
}


def run_facts(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Return a row per run: what it is, the ends of its curves, its parameters and times; NaN where unknown."""
    rows = []
    for record in records:
        training = record.training
        curves = {name: training.get(key) or [] for name, key in (("loss", "losses"), ("change", "pooling_share"))}
        last = {name: curve[-1][1] for name, curve in {**curves, "validation": record.validation}.items() if curve}
        steps, seconds = training.get("steps"), training.get("wall_seconds", 0)
        rows.append(
            {
                "run": record.id,
                "base": record.base,
                "design": label(record.design, record.option),
                "steps": steps,
                "first": record.validation[0][1] if record.validation else None,
                **{name: last.get(name) for name in ("loss", "validation", "change")},
                "rising": record.rising,
                "seconds": seconds,
                "ms": 1000 * seconds / steps if steps else None,
                "evaluation": record.evaluation_seconds,
                "trained": training.get("trained_parameters"),
            }
        )
    return pd.DataFrame(rows)


def missing_runs(study: Study, records: Sequence[RunRecord]) -> list[PlannedRun]:
    """Return the planned runs that are not finished."""
    finished = {record.id for record in records}
    return [run for run in study.runs() if run.id not in finished]


def command(study: Study) -> str:
    """Return the command that runs the study."""
    source = study.name if study.name in presets() else "study.yaml"
    return f"st-llmpool study {source} --data DATA --out OUT"


def design_names(study: Study) -> dict[str, str]:
    """Return the name of each design by its label, such as ``causal · EOS · plain``."""
    rows = [{"design": run.design, "option": run.option, **factors(run.recipe["model"])} for run in study.runs()]
    return dict(
        zip((label(row["design"], row["option"]) for row in rows), names_of_designs(pd.DataFrame(rows)), strict=True)
    )


def write_set_up(
    document: Document, study: Study, records: Sequence[RunRecord], results: Results, names: Mapping[str, str]
) -> None:
    """Add designs, bases, seeds, training, suite, data, machine and versions."""
    facts = ({"What": what, "Value": value} for what, value in _facts(study, records))
    document.table(Sheet.of("What was run", facts))
    designs = []
    for design in study.designs:
        known = factors({"design": design.design, **study.recipe.get("model", {}), **design.change.get("model", {})})
        changes = ", ".join(f"{name} {value}" for name, value in _leaves(design.change))
        cells = {name.capitalize(): value for name, value in known.items()}
        name = names.get(design.label, design.label)
        designs.append({"Design": name, "In the study": design.label, **cells, "Changes": changes or "-"})
    document.table(Sheet.of("Designs", designs))
    description = suite_description(study.suite)
    if description:
        document.text(f"Suite {study.suite}: {description}")
    rows = [
        {
            "Type": str(kind),
            "Corpora": str(own["corpus"].nunique()),
            "Tasks": str(own["task"].nunique()),
            "Names": listed(own["task"], most=100),
        }
        for kind, own in results.scores.groupby("task_type", sort=False)
    ]
    document.table(Sheet.of("Tasks of the suite", rows))


def suite_description(suite: str) -> str:
    """Return the description in the suite's file; empty if the file is not on this machine."""
    try:
        return read_suite(suite).description
    except (StLlmpoolError, OSError):
        return ""


def _facts(study: Study, records: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    planned = len(study.runs())
    yield "Bases", ", ".join(f"{name} ({source})" if name != source else name for name, source in study.bases.items())
    yield "Designs", str(len(study.designs))
    yield "Seeds", ", ".join(map(str, study.seeds))
    yield "Runs", f"{len(records)} of {planned} finished" if len(records) < planned else f"{planned}, all finished"
    yield "Pre-registered comparisons", ", ".join(study.contrasts or []) or "none"
    found = {
        what: next(filter(None, (_at(study.recipe, name) for name in names)), None) for what, names in _SETTINGS.items()
    }
    found["max_seq_length"] = found["max_seq_length"] or f"{DEFAULT_LENGTH} (default)"
    yield "Training", ", ".join(f"{what} {value}" for what, value in found.items() if value is not None)
    yield "Training data", "\n".join(map(_source, study.recipe.get("data", []))) or "-"
    rows = {str(record.training["rows"]): record.training["rows"] for record in records if "rows" in record.training}
    if len(rows) == 1:
        yield "Rows", ", ".join(f"{name} {count:,}" for name, count in next(iter(rows.values())).items())
    limit = f", at most {study.limit} rows, queries or documents per task" if study.limit else ""
    yield "Evaluation", f"suite {study.suite}{limit}"
    if records:
        yield "Machine", "\n".join(dict.fromkeys(map(_machine, records)))
        minutes = sum(record.training.get("wall_seconds", 0) + record.evaluation_seconds for record in records) / 60
        yield "Time", f"{minutes:.0f} minutes of training and evaluation in total"
    versions = {name: v for record in records for name, v in record.training.get("versions", {}).items()}
    yield "Versions", ", ".join(f"{name} {v}" for name, v in {"st_llmpool": __version__, **versions}.items())


def _source(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    facts = {key: item[key] for key in ("license", "limit") if item.get(key) is not None}
    return str(item.get("source", "-")) + "".join(f", {key} {value}" for key, value in facts.items())


def _machine(record: RunRecord) -> str:
    gpu, processor = record.machine.get("gpu"), record.machine.get("processor", "unknown processor")
    threads = counted(record.machine["threads"], "thread") if "threads" in record.machine else "? threads"
    return f"{gpu or processor}, {threads}, {record.training.get('precision', '?')}"


def _leaves(values: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def write_equality(document: Document, study: Study, records: Sequence[RunRecord], names: Mapping[str, str]) -> None:
    """Add every setting besides the seed in which runs differ, with a warning if it is more than the design."""
    first, *others = (run for run in study.runs() if run.seed == study.seeds[0] and run.base == next(iter(study.bases)))
    changes = [(run, name) for run in others for name in differences(first.recipe, run.recipe)]
    document.text(
        "All designs have the same recipe and seeds, so they see the same data in the same order, except for these "
        "settings."
    )
    rows = [
        {
            "Design": names.get(run.label, run.label),
            "Setting": name,
            names.get(first.label, first.label): _shown(first.recipe, name),
            "Here": _shown(run.recipe, name),
        }
        for run, name in changes
    ]
    document.table(Sheet.of("Settings that differ from those of the first design", rows))
    beyond: dict[str, list[str]] = {}
    for run, name in changes:
        if not name.startswith(_OF_A_DESIGN):
            beyond.setdefault(name, []).append(run.label)
    if beyond:
        named = "; ".join(f"{name} of {', '.join(labels)}" for name, labels in beyond.items())
        document.text(f"Not only the design differs: {named}. Compare these designs with care.", warning=True)
    files: dict[str, dict[str, list[str]]] = {}
    for record in records:
        for file, digest in record.data.items():
            files.setdefault(file, {}).setdefault(digest, []).append(record.id)
    for file, runs in files.items():
        if len(runs) > 1:
            fewest = listed(sorted(runs.values(), key=len)[0], most=6)
            document.text(
                f"{file} differs between runs: it is another file in {fewest}. Do not compare their scores with the "
                f"others.",
                warning=True,
            )
    for what, key in (
        ("versions of libraries", "versions"),
        ("steps", "steps"),
        ("rows of training data", "rows"),
        ("precision", "precision"),
    ):
        if len({str(record.training.get(key)) for record in records}) > 1:
            document.text(f"Runs differ in {what}; see the table of runs.", warning=True)
    rows = [
        {"File": file, "Hash": key, "Runs": str(len(ids))}
        for file, found in files.items()
        for key, ids in found.items()
    ]
    document.table(Sheet.of("Training files by the hash of their content", rows))


def write_sweep(document: Document, swept: Sequence[Tuning], names: Mapping[str, str]) -> None:
    """Add what the sweep tried for each design, and what it chose."""
    rows = [
        {
            "Base": tuning.base,
            "Design": names.get(tuning.label, tuning.label),
            "Tried": ", ".join(f"{key} {value:g}" for key, value in tuning.values[record.id].items()),
            "First validation": number(record.validation[0][1] if record.validation else None),
            "Last validation": number(record.validation[-1][1] if record.validation else None),
            "Result": "diverged" if record.diverged else "chosen" if record.id == tuning.chosen else "-",
        }
        for tuning in swept
        for record in tuning.records
    ]
    if rows:
        below = "At the first seed; chosen: the best last validation, of equal ones that with smaller values."
        document.table(Sheet.of("Sweep", rows, below))


def write_limits(document: Document, study: Study, records: Sequence[RunRecord], comparison: Comparison | None) -> None:
    """Add what a reader must not conclude."""
    items = {"One corpus": ONE_CORPUS} if comparison and any(kind.corpora == 1 for kind in comparison.types) else {}
    sizes = sorted({record.training["parameters"] for record in records if "parameters" in record.training})
    if sizes and sizes[-1] < 10**9:
        span = " to ".join(f"{size / 1e6:.3g}" for size in sorted({sizes[0], sizes[-1]}))
        items["Small models"] = (
            f"The models have {span} million parameters. What carries over to billions: the method of comparison, the "
            "relative cost of a design, and what a design can read at all. What does not: the size of differences, "
            "which layers matter, time to convergence, and the verdicts; test them again at scale."
        )
    rising = sum(record.rising is True for record in records)
    unknown = sum(record.rising is None for record in records)
    if rising:
        text = f"{rising} of {counted(len(records), 'run')} still improved at the end. "
        items["Under-trained runs"] = f"{text}A design that is behind may only learn more slowly."
    if unknown:
        items["Convergence unknown"] = f"{unknown} of {counted(len(records), 'run')}: too few evaluations."
    if len(study.seeds) < 3:
        items["Few seeds"] = f"{len(study.seeds)} per design: the estimate of seed noise is rough."
    items["One recipe"] = (
        "All designs have the same learning rates, steps and data; a design may do better when tuned on its own."
    )
    document.bullets([*items.items(), *(("Note", note) for note in (comparison.notes if comparison else ()))])


def write_runs(document: Document, study: Study, records: Sequence[RunRecord]) -> None:
    """Add which runs are missing, the command for the rest, and a row for each finished run."""
    absent, total = missing_runs(study, records), counted(len(study.runs()), "run")
    if absent:
        document.text(f"Missing: {len(absent)} of {total}: {listed(run.id for run in absent)}.", warning=True)
        rows = [{"Run": run.id, "Base": run.base, "Design": run.label, "Seed": str(run.seed)} for run in absent]
        document.table(Sheet.of("Missing runs", rows), shown=False)
    else:
        document.text(f"{total}, all finished.")
    document.text("This command runs what is missing and writes this report:")
    document.code(command(study))
    rows = [
        {
            "Run": row["run"],
            "Steps": number(row["steps"], ".0f"),
            "Last loss": number(row["loss"]),
            "Last validation": number(row["validation"]),
            "Rising": "diverged" if record.diverged else {True: "yes", False: "no"}.get(row["rising"], "-"),
            "Change by pooling": number(row["change"], ".3f"),
            "Training s": number(row["seconds"], ".0f"),
            "Evaluation s": number(row["evaluation"], ".0f"),
            "Machine": _machine(record),
            "Key of settings": record.key,
        }
        for row, record in zip(run_facts(records).to_dict("records"), records, strict=True)
    ]
    document.table(Sheet.of("Runs", rows))


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _shown(values: Any, name: str) -> str:
    value = _at(values, name)
    return "(not set)" if value is None else str(value)
