"""What was run, whether all designs were trained equally, whether training converged, and the limits of it all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ...designs import DESIGNS
from ...evaluation.suite import read_suite
from ...modules.errors import StLlmpoolError, __version__
from ...stats.comparison import Comparison
from ...stats.results import Results, label
from ...stats.tables import Sheet
from ...training.pooling_change import NEGLIGIBLE
from ...training.recipe import DEFAULT_LENGTH
from ...utils.settings import differences
from ...utils.words import counted, listed
from ..records import RunRecord
from ..settings import PlannedRun, Study, presets
from .document import Document

_LINES = ("-", "--", ":", "-.")
_SHOWN = 12
_OF_A_DESIGN = ("model.design", "model.attention", "model.pooling", "model.pooling_kwargs", "model.layer")

Curve = Sequence[Sequence[float]]


def by_design(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Return the runs of each design (and option), in order."""
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        found.setdefault(label(record.design, record.option), []).append(record)
    return found


def missing_runs(study: Study, records: Sequence[RunRecord]) -> list[PlannedRun]:
    """Return the planned runs that are not finished."""
    finished = {record.id for record in records}
    return [run for run in study.runs() if run.id not in finished]


def command(study: Study) -> str:
    """Return the command that runs the study."""
    source = study.name if study.name in presets() else "study.yaml"
    return f"st-llmpool study {source} --data DATA --out OUT"


def write_set_up(document: Document, study: Study, records: Sequence[RunRecord], results: Results) -> None:
    """Add designs, bases, seeds, training, suite, data, machine and versions."""
    document.table(Sheet("What was run", ("What", "Value"), tuple(_facts(study, records))))
    columns = ("Design", "Attention", "Pooling", "Changes")
    document.table(Sheet("Designs", columns, tuple(_designs(study))))
    description = suite_description(study.suite)
    if description:
        document.text(f"Suite {study.suite}: {description}")
    if len(results.scores):
        types = results.scores.groupby("task_type", sort=False)["task"].unique()
        rows = tuple((str(kind), str(len(tasks)), ", ".join(map(str, tasks))) for kind, tasks in types.items())
        document.table(Sheet("Tasks of the suite", ("Type", "Tasks", "Names"), rows))


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
    yield "Training", ", ".join(_training(study.recipe))
    yield "Training data", "\n".join(map(_source, study.recipe.get("data", []))) or "-"
    rows = {str(record.training["rows"]): record.training["rows"] for record in records if "rows" in record.training}
    if len(rows) == 1:
        yield "Rows", ", ".join(f"{name} {count:,}" for name, count in next(iter(rows.values())).items())
    limit = f", at most {study.limit} rows, queries or documents per task" if study.limit else ""
    yield "Evaluation", f"suite {study.suite}{limit}"
    machines = dict.fromkeys(_machine(record) for record in records)
    if machines:
        yield "Machine", "\n".join(machines)
        minutes = sum(record.training.get("wall_seconds", 0) + record.evaluation_seconds for record in records) / 60
        yield "Time", f"{minutes:.0f} minutes of training and evaluation in total"
    versions = {name: v for record in records for name, v in record.training.get("versions", {}).items()}
    yield "Versions", ", ".join(f"{name} {v}" for name, v in {"st_llmpool": __version__, **versions}.items())


def _training(recipe: dict[str, Any]) -> Iterator[str]:
    """Yield the settings that readers of a paper ask for first; names of earlier versions come second."""
    named = {
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
    for words, names in named.items():
        value = next((found for name in names if (found := _at(recipe, name)) is not None), None)
        if value is None and words == "max_seq_length":
            value = f"{DEFAULT_LENGTH} (default)"
        if value is not None:
            yield f"{words} {value}"


def _source(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    facts = {key: item[key] for key in ("license", "limit") if item.get(key) is not None}
    return str(item.get("source", "-")) + "".join(f", {key} {value}" for key, value in facts.items())


def _machine(record: RunRecord) -> str:
    gpu, processor = record.machine.get("gpu"), record.machine.get("processor", "unknown processor")
    threads = counted(record.machine["threads"], "thread") if "threads" in record.machine else "? threads"
    return f"{gpu or processor}, {threads}, {record.training.get('precision', '?')}"


def _designs(study: Study) -> Iterator[tuple[str, ...]]:
    for design in study.designs:
        model = {**study.recipe.get("model", {}), **design.change.get("model", {})}
        known = DESIGNS.get(design.design)
        attention = model.get("attention") or (known.attention if known else "bidirectional")
        pooling = model.get("pooling") or (known.pooling if known else "multi_layer")
        changes = ", ".join(f"{name} {value}" for name, value in _leaves(design.change))
        yield design.label, attention, pooling, changes or "-"


def _leaves(values: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def write_equality(document: Document, study: Study, records: Sequence[RunRecord]) -> None:
    """Add every setting in which runs differ besides the seed, with a warning where it is more than the design."""
    first, *others = (run for run in study.runs() if run.seed == study.seeds[0] and run.base == next(iter(study.bases)))
    changes = [(run, name) for run in others for name in differences(first.recipe, run.recipe)]
    document.text(
        "All designs have the same recipe and seeds, so they see the same data in the same order, except for these "
        "settings."
    )
    rows = [(run.label, name, *(_shown(_at(each.recipe, name)) for each in (first, run))) for run, name in changes]
    columns = ("Design", "Setting", first.label, "Here")
    document.table(Sheet("Settings that differ from those of the first design", columns, tuple(rows)))
    beyond: dict[str, list[str]] = {}
    for run, name in changes:
        if not name.startswith(_OF_A_DESIGN):
            beyond.setdefault(name, []).append(run.label)
    if beyond:
        named = "; ".join(f"{name} of {', '.join(labels)}" for name, labels in beyond.items())
        document.text(f"Not only the design differs: {named}. Compare these designs with care.", warning=True)
    for line in _unequal_runs(records):
        document.text(line, warning=True)
    files = dict.fromkeys((file, digest) for record in records for file, digest in record.data.items())
    if files:
        cells = tuple((f, digest, str(sum(r.data.get(f) == digest for r in records))) for f, digest in files)
        document.table(Sheet("Training files by the hash of their content", ("File", "Hash", "Runs"), cells))


def _unequal_runs(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield what recipes do not say: data that changed, other libraries, other machines."""
    contents: dict[str, dict[str, list[str]]] = {}
    for record in records:
        for file, digest in record.data.items():
            contents.setdefault(file, {}).setdefault(digest, []).append(record.id)
    for file, runs in contents.items():
        if len(runs) > 1:
            fewest = min(runs.values(), key=len)
            yield (
                f"{file} differs between runs: it is another file in {', '.join(fewest[:6])}"
                f"{' and others' if len(fewest) > 6 else ''}. Do not compare their scores with the others."
            )
    facts = {
        "versions of libraries": [record.training.get("versions", {}) for record in records],
        "steps": [record.training.get("steps") for record in records],
        "rows of training data": [record.training.get("rows") for record in records],
        "precision": [record.training.get("precision") for record in records],
    }
    for what, values in facts.items():
        if any(value != values[0] for value in values):
            yield f"Runs differ in {what}; see the table of runs."


def write_convergence(document: Document, records: Sequence[RunRecord]) -> None:
    """Add the curves of loss, validation and pooling effect, and the runs to be wary of."""
    if not records:
        return
    flags: dict[str, tuple[str, Callable[[RunRecord], bool]]] = {
        "Still rising": ("under-trained: the last validation is the best by over 1 %", lambda run: run.rising is True),
        "Unknown": ("fewer than three evaluations", lambda run: run.rising is None),
        "The pooling did nothing": (
            f"it changes the embedding by less than {100 * NEGLIGIBLE:.0f} %",
            lambda run: run.training.get("pooling_did_nothing") is True,
        ),
    }
    items = []
    for what, (why, flagged) in flags.items():
        names = [record.id for record in records if flagged(record)]
        number = f"{len(names)} of {counted(len(records), 'run')}" + (": " if names else "")
        items.append((what, f"{number}{listed(names, most=_SHOWN)} ({why})."))
    document.bullets(items)
    document.table(_convergence_sheet(records))
    if any(record.stages for record in records):
        document.table(_stages_sheet(records))
    bases = list(dict.fromkeys(record.base for record in records))
    for base in bases:
        own = by_design([record for record in records if record.base == base])
        for name, words, curve, meaning in _CURVES:
            curves = {design: [curve(run) for run in runs if curve(run)] for design, runs in own.items()}
            curves = {design: found for design, found in curves.items() if found}
            if curves:
                _draw_curves(document, curves, name + (f"_{base}" if len(bases) > 1 else ""), words, meaning)


def _losses(run: RunRecord) -> Curve:
    return run.training.get("losses") or []


def _pooling_change(run: RunRecord) -> Curve:
    return run.training.get("pooling_share") or []


_CURVES: list[tuple[str, str, Callable[[RunRecord], Curve], str]] = [
    ("loss", "training loss", _losses, "lower is better"),
    ("validation", "validation", lambda run: run.validation, "a curve that still rises at the end was cut short"),
    (
        "pooling_change",
        "change by the pooling ‖e - r‖ / ‖r‖",
        _pooling_change,
        "below the dotted line, 1 %, the pooling does nothing",
    ),
]


def _convergence_sheet(records: Sequence[RunRecord]) -> Sheet:
    def mean(curves: Any, form: str = "{:.4f}") -> str:
        last = [curve[-1][1] for curve in curves if curve]
        return form.format(float(np.mean(last))) if last else "-"

    rows = []
    for name, runs in by_design(records).items():
        known = [run for run in runs if run.rising is not None]
        rows.append(
            (
                name,
                str(len(runs)),
                mean(map(_losses, runs)),
                mean(run.validation[:1] for run in runs),
                mean(run.validation for run in runs),
                f"{sum(run.rising is True for run in known)} of {len(known)}" if known else "-",
                mean(map(_pooling_change, runs), "{:.3f}"),
            )
        )
    columns = ("Design", "Runs", "Last loss", "First validation", "Last validation", "Rising", "Change by pooling")
    below = (
        "Means over the runs of a design. Validation: held-out nDCG@10, else the first metric. Change by pooling: "
        "‖e - r‖ / ‖r‖ of the embedding e and the plain readout r at the end; - without a trained pooling.",
    )
    return Sheet("Convergence", columns, tuple(rows), below)


def _stages_sheet(records: Sequence[RunRecord]) -> Sheet:
    rows = []
    for record in records:
        for stage in record.stages:
            accuracy = stage.get("masked_accuracy") or {}
            cells = (
                f"{accuracy[n]:.3f}" if n in accuracy else "-" for n in ("adapted", "base", "causal", "no_context")
            )
            seconds = f"{stage.get('wall_seconds', 0):.0f}"
            rows.append((record.id, stage["stage"], str(stage.get("steps", "-")), seconds, *cells))
    below = (
        "Masked accuracy on held-out texts: after the stage; of the base, with the same attention; of the base with "
        "causal attention from the unmasked text before the token; of the most frequent token."
    )
    columns = ("Run", "Stage", "Steps", "Seconds", "Adapted", "Base", "Causal", "No context")
    return Sheet("Stages before the training", columns, tuple(rows), (below,))


def _draw_curves(document: Document, curves: dict[str, list[Curve]], name: str, words: str, meaning: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    figure = Figure(figsize=(8, 3.6 + 0.18 * max(0, len(curves) - 12)), layout="constrained")
    axes = figure.add_subplot()
    for place, (design, runs) in enumerate(curves.items()):
        style = {"color": colours[place % len(colours)], "linestyle": _LINES[place // len(colours) % len(_LINES)]}
        for run in runs:
            axes.plot(*zip(*run, strict=True), linewidth=0.6, alpha=0.35, **style)
        values = [dict[float, float](run) for run in runs]  # type: ignore[arg-type]
        steps = sorted(set.intersection(*map(set, values)))
        means = [np.mean([run[step] for run in values]) for step in steps]
        axes.plot(steps, means, linewidth=1.6, label=design, **style)
    if name.startswith("pooling_change"):
        axes.axhline(NEGLIGIBLE, color="0.3", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel=words)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    last = ", ".join(f"{design} {np.mean([run[-1][1] for run in runs]):.3g}" for design, runs in curves.items())
    document.draw(
        figure,
        name,
        alt=f"Curves of the {words} over steps by design. At the end: {last}.",
        caption=f"{words[0].upper()}{words[1:]} by design: thick the mean over seeds, thin each seed; {meaning}.",
    )


def write_limits(document: Document, study: Study, records: Sequence[RunRecord], comparison: Comparison | None) -> None:
    """Add what a reader must not conclude."""
    sizes = sorted({record.training["parameters"] for record in records if "parameters" in record.training})
    rising = sum(record.rising is True for record in records)
    unknown = sum(record.rising is None for record in records)
    items = [
        (
            "Dependent tasks",
            "Slices of one corpus have texts and topics in common, but the tests treat tasks as independent. So "
            "p-values are too small, and the results say nothing about other corpora.",
        )
    ]
    if sizes and sizes[-1] < 10**9:
        span = " to ".join(f"{size / 1e6:.3g}" for size in sorted({sizes[0], sizes[-1]}))
        items.append(
            (
                "Small models",
                f"The models have {span} million parameters. What carries over to billions: the method of comparison, "
                "the relative cost of a design, and what a design can read at all. What does not: the size of "
                "differences, which layers matter, time to convergence, and the verdicts; test them again at scale.",
            )
        )
    if rising:
        text = f"{rising} of {counted(len(records), 'run')} still improved at the end. A design that is behind may "
        items.append(("Under-trained runs", f"{text}only learn more slowly."))
    if unknown:
        items.append(("Convergence unknown", f"{unknown} of {counted(len(records), 'run')}: too few evaluations."))
    if len(study.seeds) < 3:
        items.append(("Few seeds", f"{len(study.seeds)} per design: the estimate of seed noise is rough."))
    text = "All designs have the same learning rates, steps and data; a design may do better when tuned on its own."
    items.append(("One recipe", text))
    document.bullets([*items, *(("Note", note) for note in (comparison.notes if comparison else ()))])


def write_runs(document: Document, study: Study, records: Sequence[RunRecord]) -> None:
    """Add which runs are missing, the command for the rest, and a row for each finished run."""
    absent, total = missing_runs(study, records), counted(len(study.runs()), "run")
    if absent:
        names = listed([run.id for run in absent], most=_SHOWN)
        document.text(f"Missing: {len(absent)} of {total}: {names}.", warning=True)
        rows = tuple((run.id, run.base, run.label, str(run.seed)) for run in absent)
        document.table(Sheet("Missing runs", ("Run", "Base", "Design", "Seed"), rows), shown=False)
    else:
        document.text(f"{total}, all finished.")
    document.text("This command runs what is missing and writes this report:")
    document.code(command(study))
    document.table(_runs_sheet(records))


def _runs_sheet(records: Sequence[RunRecord]) -> Sheet:
    def last(curve: Curve, form: str = "{:.4f}") -> str:
        return form.format(curve[-1][1]) if curve else "-"

    rows = [
        (
            record.id,
            str(record.training.get("steps", "-")),
            last(_losses(record)),
            last(record.validation),
            {None: "-", True: "yes", False: "no"}[record.rising],
            last(_pooling_change(record), "{:.3f}"),
            f"{record.training.get('wall_seconds', 0):.0f}",
            f"{record.evaluation_seconds:.0f}",
            f"{record.machine.get('gpu') or record.machine.get('processor')}, {record.machine.get('threads', '-')}",
            record.key,
        )
        for record in records
    ]
    columns = ("Run", "Steps", "Last loss", "Last validation", "Rising", "Change by pooling", "Training s")
    return Sheet("Runs", (*columns, "Evaluation s", "Machine, threads", "Key of settings"), tuple(rows))


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _shown(value: Any) -> str:
    return "(not set)" if value is None else str(value)
