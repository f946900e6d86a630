"""What was compared, on what, with what: the set-up, the missing runs and the limits of a study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...designs import DESIGNS
from ...modules.errors import StLlmpoolError, __version__
from ...stats.compare import Comparison
from ...stats.results import Results
from ...stats.tables import Sheet
from ...utils.words import counted
from ..records import RunRecord
from ..settings import PlannedRun, Study, presets
from .document import Block, Bullets, Code, Table, Text

_MANY = 12


def set_up(study: Study, records: Sequence[RunRecord], results: Results) -> list[Block]:
    """Returns designs, bases, seeds, training, suite, data, machine and versions."""
    facts = Sheet("What was run", ("What", "Value"), tuple(_facts(study, records)))
    designs = Sheet("Designs", ("Design", "Attention", "Pooling", "Changes"), tuple(_designs(study)))
    blocks: list[Block] = [Table(facts), Table(designs)]
    description = _suite_description(study.suite)
    if description:
        blocks.append(Text(f"Suite {study.suite}: {description}"))
    if len(results.scores):
        types = results.scores.groupby("task_type", sort=False)["task"].unique()
        rows = tuple((str(kind), str(len(tasks)), ", ".join(map(str, tasks))) for kind, tasks in types.items())
        blocks.append(Table(Sheet("Tasks of the suite", ("Type", "Tasks", "Names"), rows)))
    return blocks


def missing(study: Study, records: Sequence[RunRecord]) -> list[Block]:
    """Returns which runs have no result yet, and the command that makes the rest of the study."""
    absent = missing_runs(study, records)
    total = len(study.runs())
    blocks: list[Block] = [Text(f"{counted(total, 'run')}, all finished.")]
    if absent:
        names = ", ".join(run.id for run in absent[:_MANY]) + (", ..." if len(absent) > _MANY else "")
        blocks = [Text(f"Missing: {len(absent)} of {counted(total, 'run')}: {names}.", warning=True)]
        rows = tuple((run.id, run.base, run.label, str(run.seed)) for run in absent)
        blocks.append(Table(Sheet("Missing runs", ("Run", "Base", "Design", "Seed"), rows), shown=False))
    return [
        *blocks,
        Text("This command makes the study, or the rest of it, and this report:"),
        Code(command(study)),
    ]


def missing_runs(study: Study, records: Sequence[RunRecord]) -> list[PlannedRun]:
    """Returns the planned runs that are not finished."""
    finished = {record.id for record in records}
    return [run for run in study.runs() if run.id not in finished]


def command(study: Study) -> str:
    """Returns what makes the study."""
    source = study.name if study.name in presets() else "study.yaml"
    return f"st-llmpool study {source} --data DATA --out OUT"


def limits(study: Study, records: Sequence[RunRecord], comparison: Comparison | None) -> list[Block]:
    """Returns what a reader must not conclude."""
    sizes = sorted({record.training["parameters"] for record in records if "parameters" in record.training})
    rising = sum(record.rising is True for record in records)
    unknown = sum(record.rising is None for record in records)
    items = [
        (
            "Dependent tasks",
            "Tasks that are slices of one corpus share texts and subjects. The tests take them as independent, so "
            "p-values are too small, and what is found holds for these data: it is no statement on other corpora.",
        )
    ]
    if sizes and sizes[-1] < 10**9:
        span = " to ".join(f"{size / 1e6:.3g}" for size in sorted({sizes[0], sizes[-1]}))
        items.append(
            (
                "Small models",
                f"The models have {span} million parameters. What carries over to models of billions is how "
                "the comparison is made, the cost of a design relative to its backbone, and differences in what a "
                "design can read at all (causal attention hides later tokens at every size). What does not: the size "
                "of the differences, which layers matter, how long training takes to converge, and the verdicts "
                "themselves, which must be tested again at that size.",
            )
        )
    if rising:
        items.append(
            (
                "Under-trained runs",
                f"{rising} of {counted(len(records), 'run')} still improved at the end. A design that is behind "
                " may only be slower: for these runs the study compares speed of learning as much as quality.",
            )
        )
    if unknown:
        items.append(("Convergence unknown", f"{unknown} of {counted(len(records), 'run')}: too few evaluations."))
    if len(study.seeds) < 3:
        items.append(("Few seeds", f"{len(study.seeds)} per design: the noise of seeds is hardly known."))
    items.append(
        (
            "One recipe",
            "All designs share learning rates, steps and data; none was tuned on its own. A design may do better with "
            "a recipe of its own.",
        )
    )
    if comparison is not None:
        items += [("Note", note) for note in comparison.notes]
    return [Bullets(tuple(items))]


def runs_sheet(records: Sequence[RunRecord]) -> Sheet:
    """Returns one row for each finished run."""
    rows = []
    for record in records:
        training, machine = record.training, record.machine
        losses, validation = training.get("losses") or [], record.validation
        share = training.get("pooling_share") or []
        rows.append(
            (
                record.id,
                str(training.get("steps", "-")),
                f"{losses[-1][1]:.4f}" if losses else "-",
                f"{validation[-1][1]:.4f}" if validation else "-",
                {None: "-", True: "yes", False: "no"}[record.rising],
                f"{share[-1][1]:.3f}" if share else "-",
                f"{training.get('wall_seconds', 0):.0f}",
                f"{record.evaluation_seconds:.0f}",
                f"{machine.get('gpu') or machine.get('processor', '-')}, {machine.get('threads', '-')}",
                record.key,
            )
        )
    columns = ("Run", "Steps", "Last loss", "Last validation", "Rising", "Pooling share", "Training s", "Evaluation s")
    return Sheet("Runs", (*columns, "Machine, threads", "Key of settings"), tuple(rows))


def _facts(study: Study, records: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    planned = len(study.runs())
    names = (f"{name} ({source})" if name != source else name for name, source in study.bases.items())
    yield "Bases", ", ".join(names)
    yield "Designs", str(len(study.designs))
    yield "Seeds", ", ".join(map(str, study.seeds))
    yield "Runs", f"{len(records)} of {planned} finished" if len(records) < planned else f"{planned}, all finished"
    yield "Contrasts named beforehand", ", ".join(study.contrasts or []) or "none"
    yield "Training", ", ".join(_training(study.recipe))
    sources = [_source(item) for item in study.recipe.get("data", [])]
    yield "Training data", "\n".join(sources) or "-"
    rows = {str(record.training["rows"]) for record in records if "rows" in record.training}
    if len(rows) == 1:
        counts = next(record.training["rows"] for record in records if "rows" in record.training)
        yield "Rows", ", ".join(f"{name} {count:,}" for name, count in counts.items())
    limit = f", at most {study.limit} rows, queries or documents of each task" if study.limit else ""
    yield "Evaluation", f"suite {study.suite}{limit}"
    machines = dict.fromkeys(_machine(record) for record in records)
    if machines:
        yield "Machine", "\n".join(machines)
        minutes = sum(record.training.get("wall_seconds", 0) + record.evaluation_seconds for record in records) / 60
        yield "Time", f"{minutes:.0f} minutes of training and evaluation in all"
    versions = {name: v for record in records for name, v in record.training.get("versions", {}).items()}
    versions = {"st_llmpool": __version__, **versions}
    yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _training(recipe: dict[str, Any]) -> Iterator[str]:
    """Yields the settings that readers of a paper ask for first."""
    named = {
        "model.tune": "tuning",
        "training.steps": "steps",
        "training.batch_size": "batch size",
        "training.learning_rate": "learning rate",
        "training.pooling_learning_rate": "learning rate of the pooling",
        "training.schedule": "schedule",
        "model.max_seq_length": "tokens at most",
        "loss.name": "loss",
        "preset": "preset",
    }
    for name, words in named.items():
        group, _, key = name.rpartition(".")
        value = (recipe.get(group) or {}).get(key) if group else recipe.get(key)
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
        name = f"{where}.{key}" if where else key
        if isinstance(value, dict) and value:
            yield from _leaves(value, name)
        else:
            yield name, value


def _suite_description(suite: str) -> str:
    """Returns what the suite's file says of itself; nothing if the file is not on this machine."""
    from ...evaluation.suite import read_suite

    try:
        return read_suite(suite).description
    except (StLlmpoolError, OSError):
        return ""
