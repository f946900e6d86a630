"""Choose training rows that look like a target task, from pools that are larger than memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import is_sentence_transformer_model

from ..data.round_robin import Assignment, round_robin
from ..data.training_data import DatasetSettings, read_rows
from ..designs import build_embedder, resolve_base
from ..fast_inference import optimize_inference
from ..hub.loading import check_code, load_model
from ..modules.errors import ConfigurationError, DataError, InputError, StLlmpoolError, nearest
from ..utils.files import atomic_file, check_writable, write_atomically
from ..utils.reading import shown

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

#: What is added to a chosen row: its place in the order of choosing, its similarity to the target row that took it,
#: that row's place in the target, its file and its place there.
ADDED = ("selection_rank", "selection_score", "selection_target_row", "selection_source", "selection_source_row")
#: Rows held in memory at a time.
CHUNK = 1024
#: Columns that are read if none is named.
TEXT_COLUMNS = ("text", "query")
#: Nearest and farthest rows in the note.
SHOWN = 5


@dataclass(frozen=True)
class Selection:
    """The selected rows.

    Attributes:
        file: The parquet file with the chosen rows.
        note: Content of the JSON file next to it: sizes, histograms, nearest and farthest rows.
    """

    file: Path
    note: dict[str, Any]

    def to_rich(self) -> Group:
        """Return the note for a terminal."""
        tables: list[Any] = [self.note["inference"]]
        for column, counts in self.note["histograms"].items():
            table = Table(column, "chosen", title=f"Chosen by {column}", title_justify="left")
            for value, count in counts.items():
                table.add_row(value, f"{count:,}")
            tables.append(table)
        for name in ("nearest", "farthest"):
            table = Table("similarity", "chosen", "for the target", title=name.capitalize(), title_justify="left")
            for row in self.note[name]:
                table.add_row(f"{row['score']:.3f}", _clip(row["text"], 100), _clip(row["target"], 60))
            tables.append(table)
        return Group(*tables)


def select(
    pool: Sequence[str | Path],
    target: str | Path,
    count: int,
    out: str | Path,
    *,
    model: str = "builtin",
    columns: Sequence[str] = (),
    target_columns: Sequence[str] = (),
    by: str | None = None,
    max_length: int = 512,
    batch_size: int = 32,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Selection:
    """Select `count` rows of the pool that are similar to the target (RDS+, Ivison et al. 2025, arXiv 2503.01807).

    A text x with last hidden states h_1..h_T is the mean Σ_t w_t h_t with w_t = t / Σ_s s, of length 1: under causal
    attention the later tokens have seen more. Then each target row in turn is assigned the remaining row with the
    largest cosine similarity; :func:`~st_llmpool.data.round_robin.round_robin` has the details.

    The pool's vectors are kept in a nameless file on the disk of `out` while this runs, 4 D bytes a row, which the
    system frees even after a kill, and the pool itself is read through an Arrow file of ``datasets``; memory does not
    grow with the pool. Same input, same result.

    Args:
        pool: Files (parquet, JSONL, CSV, TSV), folders with a file for the split ``train``, or names on the Hub.
        target: As one of them; the rows to look like.
        count: How many rows to choose.
        out: A ``.parquet`` file for the chosen rows, with all their columns and those in :data:`ADDED`, in the order of
            choosing; the note goes into a ``.json`` file next to it. Neither may exist; both are written atomically.
        model: Name or folder of a language model, or of a sentence-transformers model, whose backbone is used as it
            is; ``builtin`` is the small one that comes with the package.
        columns: The pool's columns with text, joined by a line break; none is ``text`` or else ``query``.
        target_columns: The same for the target; none is as for the pool.
        by: A column of the pool to count the chosen rows by, besides their files.
        max_length: Tokens per text, at most the model's own limit.
        batch_size: Batch size.
        trust_remote_code: Run code of the model that is not the installed package's.
        console: For the progress bar; None is standard error.

    Raises:
        ConfigurationError: If the model cannot be loaded, a file to write exists, or the pool has fewer rows.
        DataError: If a file or column is missing, or a row has no text.
        InputError: If a vector is not finite.

    Example:
        >>> selection = select(["pool.parquet"], "task.parquet", 1000, "chosen.parquet")  # doctest: +SKIP
        >>> selection.note["nearest"][0]["score"]  # doctest: +SKIP
        0.93
    """
    from pyarrow import parquet

    out = Path(out)
    if out.suffix != ".parquet":
        raise ConfigurationError(f"{str(out)!r} must end in .parquet, since that is what is written.")
    for file in (out, out.with_suffix(".json")):
        if file.exists():
            raise ConfigurationError(f"{file} exists; name another file as out, or remove it.")
    check_writable(out.parent)
    check_code(resolve_base(model), trust_remote_code=trust_remote_code)
    sources = {str(source): read_rows(DatasetSettings(str(source))) for source in pool}
    targets = read_rows(DatasetSettings(str(target)))
    if len(targets) == 0:
        raise DataError(f"{str(target)!r} is empty: there is nothing to look like.")
    texts_of = {source: _text_columns(source, rows, columns) for source, rows in sources.items()}
    target_names = _text_columns(str(target), targets, target_columns or columns)
    _check_columns(sources, by)
    sizes = [len(rows) for rows in sources.values()]
    if not 1 <= count <= sum(sizes):
        raise ConfigurationError(f"{count} rows cannot be chosen from a pool of {sum(sizes)}: 1 to {sum(sizes)} can.")
    for source, found in sources.items():
        _check_texts(source, found, texts_of[source])
    _check_texts(str(target), targets, target_names)
    encoder = _encoder(model, max_length, trust_remote_code)
    inference = str(optimize_inference(encoder))
    out.parent.mkdir(parents=True, exist_ok=True)
    with _bar(sum(sizes) + len(targets), console) as advance:
        options: dict[str, Any] = {"encoder": encoder, "batch_size": batch_size, "advance": advance}
        wanted = np.concatenate(list(_vectors(str(target), targets, target_names, **options)))
        with TemporaryFile(dir=out.parent) as unnamed:  # without a name, so gone afterwards and after a kill
            vectors = np.memmap(unnamed, dtype=np.float32, mode="w+", shape=(sum(sizes), wanted.shape[1]))
            place = 0
            for source, found in sources.items():
                for chunk in _vectors(source, found, texts_of[source], **options):
                    vectors[place : place + len(chunk)] = chunk
                    place += len(chunk)
            assigned = round_robin(vectors, wanted, count)
    table = _chosen(sources, assigned)
    with atomic_file(out) as partial:
        parquet.write_table(table, partial, compression="zstd")
    rows = table.to_pylist()
    note = {
        "model": model,
        "inference": inference,
        "target": str(target),
        "target_rows": len(targets),
        "pool": {source: len(rows) for source, rows in sources.items()},
        "chosen": count,
        "passes": assigned.passes,
        "score": {name: float(getattr(np, name)(assigned.scores)) for name in ("min", "median", "max")},
        "histograms": _histograms(table, by),
    }
    order = np.argsort(-assigned.scores, kind="stable").tolist()
    for name, ranks in {"nearest": order[:SHOWN], "farthest": order[::-1][:SHOWN]}.items():
        note[name] = [
            {
                "score": float(assigned.scores[rank]),
                "source": rows[rank]["selection_source"],
                "source_row": rows[rank]["selection_source_row"],
                "text": _text(rows[rank], texts_of[rows[rank]["selection_source"]]),
                "target_row": int(assigned.targets[rank]),
                "target": _text(targets[int(assigned.targets[rank])], target_names),
            }
            for rank in ranks
        ]
    write_atomically(out.with_suffix(".json"), json.dumps(note, indent=2, ensure_ascii=False))
    return Selection(out, note)


def _text_columns(source: str, rows: Dataset, wanted: Sequence[str]) -> list[str]:
    found = rows.column_names
    columns = list(wanted) or [name for name in TEXT_COLUMNS if name in found][:1]
    if not columns:
        raise DataError(f"{source!r} has neither a column text nor query: name its columns with text among {found}.")
    for name in columns:
        if name not in found:
            raise DataError(f"{source!r} has no column {name!r}; its columns are {found}.{nearest(name, found)}")
    return columns


def _check_columns(sources: dict[str, Dataset], by: str | None) -> None:
    """Refuse pools whose rows cannot stand in one file."""
    import pyarrow as pa

    for source, rows in sources.items():
        if taken := set(ADDED) & set(rows.column_names):
            raise DataError(f"{source!r} has a column {min(taken)!r}, which choosing adds: drop or rename it.")
    names = sorted({name for rows in sources.values() for name in rows.column_names})
    if by is not None and by not in names:
        raise DataError(f"No pool has the column {by!r} to count by; there are {names}.{nearest(by, names)}")
    try:
        pa.unify_schemas([rows.features.arrow_schema.remove_metadata() for rows in sources.values()])
    except pa.ArrowException as error:
        raise DataError(f"The pools do not fit into one file: {error}. Rename or convert the column.") from error


def _check_texts(source: str, rows: Dataset, columns: Sequence[str]) -> None:
    """Refuse a row without text, before the rows in front of it are embedded for nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in columns:
        kind = rows.features.arrow_schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            value = shown(rows[0][name]) if len(rows) else "nothing"
            raise DataError(f"Column {name!r} of {source!r} is of type {kind}, not text (row 1: {value}). Convert it.")
    start = 0
    for chunk in rows.select_columns(list(columns)).with_format("arrow").iter(batch_size=CHUNK):
        has_text = np.zeros(len(chunk), dtype=bool)
        for cells in chunk.columns:
            is_filled = pc.not_equal(pc.utf8_trim_whitespace(cells), "")
            has_text |= pc.fill_null(is_filled, False).to_numpy()
        if not has_text.all():
            row = start + int(np.argmin(has_text)) + 1
            raise DataError(f"Row {row} of {source!r} has no text in {list(columns)}. Drop such rows.")
        start += len(chunk)


def _encoder(model: str, max_length: int, trust_remote_code: bool) -> SentenceTransformer:
    """Return a model that gives the position-weighted mean of the last hidden states, of length 1."""
    base = resolve_base(model)
    try:
        if is_sentence_transformer_model(base):
            backbone = load_model(base, trust_remote_code=trust_remote_code)[0]
            pooling = Pooling(backbone.get_embedding_dimension(), "weightedmean")
            encoder = SentenceTransformer(modules=[backbone, pooling, Normalize()])
        else:
            options: dict[str, Any] = {"attention": "causal", "pooling": "weightedmean", "add_eos_token": False}
            encoder = build_embedder(base, trust_remote_code=trust_remote_code, **options)
    except StLlmpoolError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The model {model!r} cannot be loaded: {error}") from error
    encoder.max_seq_length = min(max_length, encoder.max_seq_length or max_length)
    return encoder


def _vectors(
    source: str,
    rows: Dataset,
    columns: Sequence[str],
    *,
    encoder: SentenceTransformer,
    batch_size: int,
    advance: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """Yield the vectors (C, D) of the rows, a chunk at a time."""
    start = 0
    for chunk in rows.select_columns(list(columns)).iter(batch_size=CHUNK):
        texts = [_text(dict(zip(chunk, row, strict=True)), columns) for row in zip(*chunk.values(), strict=True)]
        vectors = encoder.encode(texts, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True)
        if not np.isfinite(vectors).all():
            broken = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise InputError(
                f"The vector of row {start + broken + 1} of {source!r} is not finite: check the weights and dtype."
            )
        start += len(texts)
        advance(len(texts))
        yield vectors


def _text(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    return "\n".join(str(row[name]) for name in columns if row[name] is not None)


@contextmanager
def _bar(total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    console = console or Console(stderr=True)
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def _chosen(sources: dict[str, Dataset], assigned: Assignment) -> pa.Table:
    """Return the chosen rows with what is added to them, in the order of choosing."""
    import pyarrow as pa

    ends = np.cumsum([len(rows) for rows in sources.values()])
    of_source = np.searchsorted(ends, assigned.rows, side="right")
    tables = []
    for number, (source, rows) in enumerate(sources.items()):
        ranks = np.flatnonzero(of_source == number)
        places = assigned.rows[ranks] - (ends[number] - len(rows))
        table = rows.select(places).with_format("arrow")[:].replace_schema_metadata(None)
        values = (ranks + 1, assigned.scores[ranks], assigned.targets[ranks], [source] * len(ranks), places)
        types = (pa.int64(), pa.float32(), pa.int64(), pa.string(), pa.int64())
        for name, value, kind in zip(ADDED, values, types, strict=True):
            table = table.append_column(name, pa.array(value, kind))
        tables.append(table)
    return pa.concat_tables(tables, promote_options="default").sort_by("selection_rank")


def _histograms(table: pa.Table, by: str | None) -> dict[str, dict[str, int]]:
    columns = {"source": "selection_source"} | ({} if by is None else {by: by})
    counts = {name: Counter(map(str, table[column].to_pylist())) for name, column in columns.items()}
    return {name: dict(found.most_common()) for name, found in counts.items()}


def _clip(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
