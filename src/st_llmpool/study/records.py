"""Records of finished runs: a folder for each, and one `results.parquet` with all, to commit and continue from."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ..modules.errors import ConfigurationError, DataError, StLlmpoolError
from ..stats.results import COLUMNS, Results, complete
from ..utils.files import atomic_file, atomic_folder, write_atomically
from ..utils.reading import check_file, parse_json, read_json_object
from ..utils.settings import differences, from_mapping
from ..utils.words import counted
from .settings import Kind, PlannedRun, Study, factors

_FACTS = "run.json"
_REGISTERED = "# registered sha256 "  # then the hash and the time of each version of a study's settings that was run
_SCORES = "results.parquet"
_FACTS_OF_ALL = b"st_llmpool.runs"  # key of the records in the metadata of a study's results.parquet
_REGISTRATION = b"st_llmpool.registered"  # likewise, of these lines
_SWEEP = b"st_llmpool.sweep"  # likewise, of what was tried and chosen
_RUN = ["base", "design", "option", "seed", "step"]
COST = "cost.json"
LAYERS = "layers.json"


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Args:
        id, key, base, design, option, seed, recipe, evaluation: As in :class:`PlannedRun`.
        training: Content of the run's ``training.json``.
        evaluation_seconds: Duration of the evaluation.
        stages: Name, steps, seconds, losses and masked accuracy of each stage before the recipe's own training.
        data: Training file to the hash of its content.
        machine: Processor or GPU, and threads.
        cost: `Cost.to_dict`, measured when all runs are finished; None before.
        layers: `LayerAnalysis.to_dict`, likewise.
        kind: `PlannedRun.kind`.
    """

    id: str
    key: str
    base: str
    design: str
    option: str
    seed: int
    recipe: dict[str, Any]
    evaluation: dict[str, Any]
    training: dict[str, Any]
    evaluation_seconds: float
    stages: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] | None = None
    layers: dict[str, Any] | None = None
    kind: Kind = "trained"

    @property
    def step(self) -> str:
        """Step of its scores in tables of results: ``0`` before training, else empty."""
        return "0" if self.kind == "untrained" else ""

    @property
    def rising(self) -> bool | None:
        """Whether the last validation value is above all others by over 1 %; None for fewer than three evaluations.

        Such a run is under-trained: its design may be slower, not worse.
        """
        curve = self.validation
        if len(curve) < 3:
            return None
        before = max(value for _, value in curve[:-1])
        return curve[-1][1] > before + 0.01 * abs(before)

    @property
    def diverged(self) -> bool:
        """Whether validation ended below its start, or numbers were not finite."""
        curve = self.validation
        below = len(curve) > 1 and curve[0][0] == 0 and not curve[-1][1] >= curve[0][1]
        return below or bool(self.training.get("not_finite"))

    @property
    def validation(self) -> list[tuple[int, float]]:
        """Step and value of the validation metric, the first held-out nDCG@10 (else the first metric)."""
        entries = self.training.get("evaluations", [])
        names = [name for _, metrics in entries for name in metrics]
        name = next((name for name in names if name.endswith("ndcg@10")), names[0] if names else None)
        return [(int(step), float(metrics[name])) for step, metrics in entries if name in metrics]


def write_record(record: RunRecord, results: Results, output_dir: Path) -> None:
    """Write the folder of a run atomically."""
    names = {name: str(getattr(record, name)) for name in _RUN}
    with atomic_folder(output_dir / "runs" / record.id) as place:
        _stored(results.table.assign(**names)).to_parquet(place / _SCORES, index=False, compression="zstd")
        (place / _FACTS).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def write_results(
    records: Sequence[RunRecord], results: Results, output_dir: Path, sweep: Sequence[dict[str, Any]] = ()
) -> Path:
    """Write ``results.parquet``: scores and, in its metadata, the facts of all runs and each `Tuning.to_dict`."""
    table = pa.Table.from_pandas(_stored(results.table), preserve_index=False)
    facts = base64.b64encode(zlib.compress(json.dumps([asdict(record) for record in records]).encode()))
    metadata = {_FACTS_OF_ALL: facts, _SWEEP: json.dumps(list(sweep)).encode()}
    metadata[_REGISTRATION] = "\n".join(_registered(output_dir)).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    with atomic_file(output_dir / _SCORES) as partial:
        pq.write_table(table, partial, compression="zstd")
    return output_dir / _SCORES


def _stored(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table as it is stored: without paths of this machine, and with the seven digits of float32."""
    return complete(table).drop(columns="file").astype({"score": "float32"})


def read_record(folder: Path) -> RunRecord | None:
    """Read the facts of a run; None if it is not finished.

    Raises:
        DataError: If the folder holds something else.
    """
    file = folder / _FACTS
    if not file.is_file():
        return None
    try:
        facts = read_json_object(file)
        for name in (COST, LAYERS):
            if (folder / name).is_file():
                facts[Path(name).stem] = read_json_object(folder / name)
        record = from_mapping(RunRecord, facts)
        _ = record.validation  # reads what training wrote
        return record
    except (StLlmpoolError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{folder} is not the record of a run ({error}): delete it to run it again.") from error


class RunStore:
    """The finished runs of a study's folder: those in ``runs``, then those that only ``results.parquet`` holds."""

    def __init__(self, source: Path) -> None:
        self._folder = source / "runs"
        self._file = source / _SCORES if source.is_dir() else source
        self._packed: dict[str, RunRecord] = {}
        if self._file.is_file():
            try:
                facts = (pq.read_schema(self._file).metadata or {}).get(_FACTS_OF_ALL)
                text = zlib.decompress(base64.b64decode(facts)).decode() if facts else "[]"
                records = [from_mapping(RunRecord, content) for content in parse_json(text, "its metadata")]
            except (OSError, ValueError, TypeError, zlib.error) as error:  # Arrow's errors and ours are among them
                raise DataError(f"{self._file} is not the results of a study: {error}") from error
            self._packed = {record.id: record for record in records}

    @property
    def exists(self) -> bool:
        """Whether there is anything that holds runs."""
        return self._folder.is_dir() or bool(self._packed)

    def record(self, run_id: str) -> RunRecord | None:
        """Return the facts of a run; None if it is not finished."""
        return read_record(self._folder / run_id) or self._packed.get(run_id)

    def results(self, records: Sequence[RunRecord]) -> Results:
        """Return the scores of some finished runs, with the factors of their designs."""
        packed: dict[tuple[str, ...], pd.DataFrame] | None = None
        tables = [pd.DataFrame(columns=COLUMNS)]
        for record in (record for record in records if record.kind != "sweep"):
            file = self._folder / record.id / _SCORES
            if (file.parent / _FACTS).is_file():
                table = _read_scores(file)
            else:
                packed = dict(iter(_read_scores(self._file).groupby(_RUN))) if packed is None else packed
                table = packed.get(tuple(str(getattr(record, name)) for name in _RUN), tables[0])
            known = factors(record.recipe["model"]) if "model" in record.recipe else {}
            tables.append(table.assign(**known, diverged=record.diverged))
        tables = [table for table in tables if len(table)] or tables[:1]
        return Results(pd.concat(tables, ignore_index=True))


def write_study(study: Study, path: Path) -> None:
    """Write the settings of a study, below a line with hash and time for each version of them that was run."""
    lines, digest = _registered(path.parent), settings_digest(study)
    if not any(digest in line for line in lines):
        lines.append(f"{_REGISTERED}{digest} {datetime.now(UTC).isoformat(timespec='seconds')}")
    write_atomically(path, "\n".join([*lines, yaml.safe_dump(study.to_dict(), sort_keys=False)]))


def settings_digest(study: Study) -> str:
    """Return a hash of the settings of a study, without its texts and the paths of this machine."""
    apart = ("name", "description", "withdrawn", "base_folders")
    settings = {key: value for key, value in study.to_dict().items() if key not in apart}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def registration(study: Study, output_dir: Path) -> str:
    """Return in a sentence when the settings of a study, as they are, were first run."""
    digest = settings_digest(study)
    times = {line.split()[-2]: line.split()[-1] for line in _registered(output_dir)}
    start = f"Pre-registration: settings sha256:{digest}"
    if digest not in times:
        return f"{start}, of unknown time."
    others = len(times) - 1
    return f"{start}, {times[digest]}" + (f"; {counted(others, 'other version')} in study.yaml." if others else ".")


def _registered(output_dir: Path) -> list[str]:
    """Return the lines of registration in ``study.yaml``, else those in ``results.parquet``."""
    file, results = output_dir / "study.yaml", output_dir / _SCORES
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if _REGISTERED not in text and results.is_file():
        text = (pq.read_schema(results).metadata or {}).get(_REGISTRATION, b"").decode()
    return [line for line in text.splitlines() if line.startswith(_REGISTERED)]


def reuse_runs(runs: Iterable[PlannedRun], other: Path, output_dir: Path) -> list[str]:
    """Copy the runs of another study with identical settings, and return their ids."""
    store, own = RunStore(other), RunStore(output_dir)
    if not store.exists:
        raise DataError(f"{other} holds no runs of a study: neither a folder 'runs' nor a results.parquet with them.")
    reused = []
    for run in runs:
        record = store.record(run.id)
        if record is not None and record.key == run.key and own.record(run.id) is None:
            write_record(record, store.results([record]), output_dir)
            reused.append(run.id)
    return reused


def finished(runs: Iterable[PlannedRun], output_dir: Path) -> list[RunRecord]:
    """Return the records of those planned runs that are finished."""
    store = RunStore(output_dir)
    records = []
    for run in runs:
        record = store.record(run.id)
        if record is None:
            continue
        if record.key != run.key:
            before = {"recipe": record.recipe, "evaluation": record.evaluation}
            changes = differences(before, {"recipe": run.recipe, "evaluation": run.evaluation})
            raise ConfigurationError(
                f"run {run.id} was made with other settings: {', '.join(changes) or 'an earlier version'} changed. "
                f"Delete {output_dir / 'runs' / run.id} and {output_dir / _SCORES} to run it again, give the changed "
                f"design an option of its own, or choose another output folder."
            )
        records.append(record)
    return records


def read_scores(records: Sequence[RunRecord], output_dir: Path) -> Results:
    """Read the scores of finished runs into one table."""
    return RunStore(output_dir).results(records)


def _read_scores(file: Path) -> pd.DataFrame:
    check_file(file)
    try:
        return complete(pd.read_parquet(file).astype({"score": float}))
    except (OSError, ValueError, KeyError, TypeError) as error:  # pandas' and Arrow's own errors are among them
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{file} is not the scores of a run ({reason}): delete its folder to run it again.") from error
