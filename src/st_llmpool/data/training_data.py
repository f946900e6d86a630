"""Load the training sets of a recipe, pairs with negatives or unlabelled text, and check them."""

from __future__ import annotations

import glob
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..modules.errors import DataError, nearest
from ..utils.files import file_digest
from ..utils.reading import check_file, check_rows, exists, is_folder, read_lines, shown

if TYPE_CHECKING:
    from datasets import Dataset

    from .docstring_pairs import Split

#: File name ending -> name of the reader in ``datasets``.
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
_ENDINGS = (*FORMATS, ".txt")
DOCSTRINGS = "docstrings"
ROLES = ("query", "positive", "negative")


@dataclass
class DatasetSettings:
    """The source of one set of pairs, and the roles of its columns.

    Attributes:
        source: A parquet, JSONL, CSV or TSV file, a folder with one such file per split, the name of a dataset on the
            Hub, or ``docstrings`` for those of the packages that are installed here.
        name: What logs and cards call it; None is the last part of the source, without the folders above it, whose
            names may be private.
        subset: Configuration of a Hub dataset.
        split: Split of a folder, a Hub dataset or the docstrings.
        columns: Role (``query``, ``positive``, ``negative``) -> column. ``negative`` may be a list of columns, or a
            column of lists. Without an entry a role's column is called as the role; negatives may be absent.
        instruction: Put before every query, as it stands; without a space at its end, which would change the
            tokens of the first word.
        weight: Sampling weight of the set relative to others; None is proportional to size.
        limit: Use only the first rows.
        license: Licence of the data, for the model card.
    """

    source: str
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    columns: dict[str, Any] = field(default_factory=dict)
    instruction: str | None = None
    weight: float | None = None
    limit: int | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        for role, wanted in self.columns.items():
            if role not in ROLES:
                raise DataError(
                    f"columns of {self.source!r}: {role!r} is not one of {list(ROLES)}.{nearest(role, ROLES)}"
                )
            names = wanted if isinstance(wanted, list | tuple) else [wanted]
            if wanted is not None and not (names and all(isinstance(name, str) for name in names)):
                raise DataError(
                    f"columns of {self.source!r}: {role}={shown(wanted)} must be the name of a column, or a list of "
                    f"names; a name that YAML reads as something else needs quotes."
                )
        for name in ("weight", "limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise DataError(f"{name}={value} of {self.source!r} must be above 0 and finite.")

    @property
    def label(self) -> str:
        """What logs and cards call the set."""
        return Path(self.source).stem if self.name is None else self.name


def load_pairs(settings: DatasetSettings, num_negatives: int | None = None) -> Dataset:
    """Load one set.

    Args:
        settings: Where it is and what its columns mean.
        num_negatives: How many hard negatives to keep; None keeps all.

    Returns:
        A ``datasets.Dataset`` with the text columns ``query``, ``positive`` and, if there are any, ``negative`` or
        ``negative_1``, ``negative_2``, ...

    Raises:
        DataError: If the file or the dataset is missing or empty, a column is, a cell is not text or blank, or
            there are fewer negatives than asked for.

    Example:
        >>> import json, tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write(json.dumps({"question": "What is it?", "positive": "It is this."}))
        ...     file.flush()
        ...     load_pairs(DatasetSettings(file.name, columns={"query": "question"})).column_names
        ['query', 'positive']
    """
    import pyarrow as pa
    from datasets import Dataset

    rows = read_rows(settings)
    if settings.limit is not None:
        rows = rows.select(range(min(settings.limit, len(rows))))
    if len(rows) == 0:
        raise DataError(f"{settings.source!r} (split {settings.split!r}) is empty.")
    columns = _find_columns(settings, rows.column_names)
    pairs = rows.select_columns(list(dict.fromkeys([*columns["query"], *columns["positive"], *columns["negative"]])))
    texts = {"query": pairs.data.column(columns["query"][0]), "positive": pairs.data.column(columns["positive"][0])}
    negatives = _negatives(settings, pairs, columns["negative"])
    texts |= _keep_negatives(settings, negatives, num_negatives)
    for name, column in texts.items():
        check_texts(settings, name, column)
    return Dataset(pa.table(texts))


def read_rows(settings: DatasetSettings) -> Dataset:
    """Return the rows of `settings` with all their columns."""
    if settings.source == DOCSTRINGS:
        return _read_docstrings(settings)
    path = _source_path(settings.source)
    if is_folder(path):
        return _read_file(settings, _file_of_split(path, settings.split))
    if exists(path):
        return _read_file(settings, path)
    if path.suffix in _ENDINGS or path.is_absolute() or not settings.source or settings.source.startswith((".", "~")):
        raise DataError(f"There is no file {settings.source!r}; relative paths start at {str(Path.cwd())!r}.")
    return _read_hub(settings)


def _source_path(source: str) -> Path:
    """Return the path that a source may be; ``~`` is the user's home."""
    try:
        return Path(source or "nothing").expanduser()
    except RuntimeError:  # the home of a user who does not exist
        return Path(source)


def _read_docstrings(settings: DatasetSettings) -> Dataset:
    from datasets import Dataset

    from .docstring_pairs import docstring_pairs

    pairs = docstring_pairs(cast("Split", settings.split))
    return Dataset.from_dict({role: [getattr(pair, role) for pair in pairs] for role in ROLES})


def _file_of_split(folder: Path, split: str) -> Path:
    files = sorted(file for file in folder.iterdir() if file.suffix in _ENDINGS)
    matching = [file for file in files if file.stem == split]
    if len(matching) != 1:
        found = [file.name for file in files]
        raise DataError(
            f"{str(folder)!r} must hold one file for split {split!r}, such as {split}.parquet; found {shown(found)}. "
            f"Set split, or name the file itself as source.{nearest(split, [file.stem for file in files])}"
        )
    return matching[0]


def _read_file(settings: DatasetSettings, path: Path) -> Dataset:
    from datasets import Dataset, load_dataset

    if path.suffix not in _ENDINGS:
        raise DataError(f"{settings.source!r} ends in {path.suffix!r}; readable are {list(_ENDINGS)}.")
    if path.suffix == ".txt":
        return Dataset.from_dict({"text": [line for line in read_lines(path) if line.strip()]})
    try:
        check_file(path)
        if _has_no_rows(path):
            raise DataError(f"{settings.source!r} is empty.")
        if path.suffix != ".parquet":
            check_rows(path)
        options = _csv_options(path) if FORMATS[path.suffix] == "csv" else {}
        logging.getLogger("datasets.packaged_modules.json.json").setLevel(logging.CRITICAL)  # it logs what it raises
        # The name says what the file holds: a cached copy is found by name, place, size and time alone.
        files = glob.escape(str(path.resolve()))  # a name with a bracket or a star is no pattern
        return load_dataset(FORMATS[path.suffix], file_digest(path)[:16], data_files=files, split="train", **options)
    except DataError:
        raise
    except Exception as error:  # the readers raise many kinds: of datasets, pandas and pyarrow
        if any(words in _innermost(error) for words in ("corresponds to no data", "No columns to parse")):
            raise DataError(f"{settings.source!r} holds no rows.") from error
        raise DataError(f"{settings.source!r} cannot be read as {path.suffix}: {_innermost(error)}") from error


def _has_no_rows(path: Path) -> bool:
    from pyarrow import parquet

    is_parquet = path.suffix == ".parquet"
    return path.stat().st_size == 0 or (is_parquet and parquet.read_metadata(path).num_rows == 0)


def _csv_options(path: Path) -> dict[str, Any]:
    """Read every cell as text: a reader that guesses turns "NA" into nothing and "007" into 7."""
    import csv

    from datasets import Features, Value

    separator = "\t" if path.suffix == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]  # as pandas calls them
    features = Features({name: Value("string") for name in names})
    return {"sep": separator, "features": features, "keep_default_na": False}


def _read_hub(settings: DatasetSettings) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(settings.source, settings.subset, split=settings.split)
    except Exception as error:  # offline, unknown name, unknown split, gated: each of another kind
        raise DataError(
            f"{settings.source!r} is neither a file or folder here (relative paths start at {str(Path.cwd())!r}) nor a "
            f"dataset that the Hub gives (subset {settings.subset!r}, split {settings.split!r}): {_innermost(error)}"
        ) from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _find_columns(settings: DatasetSettings, found: Sequence[str]) -> dict[str, list[str]]:
    columns = {}
    for role in ROLES:
        wanted = settings.columns.get(role)
        if wanted is None:
            is_optional_and_absent = role == "negative" and role not in found
            wanted = [] if is_optional_and_absent else [role]
        columns[role] = [wanted] if isinstance(wanted, str) else list(wanted)
        for name in columns[role]:
            if name not in found:
                raise DataError(
                    f"{settings.source!r} has no column {name!r} for the {role}; its columns are {list(found)}. "
                    f"Map it, as in columns: {{{role}: {found[0]}}}.{nearest(name, found)}"
                )
    for role in ("query", "positive"):
        if len(columns[role]) != 1:
            raise DataError(f"{settings.source!r}: {role} must be one column; found {columns[role]}.")
    return columns


def _negatives(settings: DatasetSettings, rows: Dataset, names: Sequence[str]) -> list[Any]:
    """Return one column for each hard negative; a column of lists becomes as many as its lists are long."""
    import pyarrow as pa
    import pyarrow.compute as pc

    negatives = []
    for name in names:
        column = rows.data.column(name)
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            negatives.append(column)
            continue
        lengths = pc.fill_null(pc.list_value_length(column), 0)
        counts = pc.min_max(lengths).as_py()
        if counts["min"] != counts["max"]:
            row = pc.index(lengths, counts["min"]).as_py()
            raise DataError(
                f"{settings.source!r}: the lists in {name!r} hold {counts['min']} to {counts['max']} negatives (row "
                f"{row + 1} has {counts['min']}). Every row needs the same number: cut them, or drop rows with fewer."
            )
        negatives += [pc.list_element(column, place) for place in range(counts["max"])]
    return negatives


def _keep_negatives(settings: DatasetSettings, negatives: Sequence[Any], wanted: int | None) -> dict[str, Any]:
    if wanted is not None and wanted > len(negatives):
        raise DataError(
            f"{settings.source!r} has {len(negatives)} negatives to a query, but loss.num_negatives={wanted}. Lower "
            f"it, or name more columns, as in columns: {{negative: [hard_1, hard_2]}}."
        )
    kept = list(negatives)[:wanted]
    if len(kept) == 1:
        return {"negative": kept[0]}
    return {f"negative_{place}": column for place, column in enumerate(kept, start=1)}


def check_texts(settings: DatasetSettings, name: str, column: Any) -> None:
    """Refuse an Arrow column that holds anything but text, or blank text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kinds = (pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise DataError(
            f"{settings.source!r}: the {name} is of type {column.type}, not text. Convert it, or choose another column."
        )
    try:
        column.validate(full=True)
    except pa.ArrowException as error:
        raise DataError(f"{settings.source!r}: the {name} is not valid UTF-8 text: {error}. Convert it.") from error
    blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(column, ""))), 0)
    count = pc.sum(blank).as_py()
    if count:
        row = pc.index(blank, True).as_py()
        raise DataError(f"{settings.source!r}: the {name} of row {row + 1} is blank ({count} such rows). Drop them.")


@dataclass
class TextSettings:
    """The source of one set of texts.

    Attributes:
        source: A parquet, JSONL, CSV or TSV file, a TXT file with one text per line, a folder with one such file
            per split, the name of a dataset on the Hub, or ``docstrings`` for those of the installed packages.
        name: What logs and cards call it; None goes by the source.
        column: Column that holds the text; TXT files and docstrings have no columns.
        subset: Configuration of a Hub dataset.
        split: Split of a folder, a Hub dataset or the docstrings.
        limit: Use only the first rows.
        license: Licence of the data, for the model card.

    Raises:
        DataError: From the constructor, if `limit` is not positive.
    """

    source: str
    name: str | None = None
    column: str = "text"
    subset: str | None = None
    split: str = "train"
    limit: int | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        self.as_pairs()

    @property
    def label(self) -> str:
        """What logs and cards call the set."""
        return self.as_pairs().label

    def as_pairs(self) -> DatasetSettings:
        """Return the set with each text as a query and as its own positive, for a loss that compares two views."""
        column = "positive" if self.source == DOCSTRINGS else self.column
        column = "text" if Path(self.source).suffix == ".txt" else column
        return DatasetSettings(
            source=self.source,
            name=self.name,
            subset=self.subset,
            split=self.split,
            columns={"query": column, "positive": column},
            limit=self.limit,
            license=self.license,
        )


def load_texts(settings: TextSettings) -> Dataset:
    r"""Load one set.

    Returns:
        A ``datasets.Dataset`` with the column ``text``.

    Raises:
        DataError: If the file or the dataset is missing or empty, the column is, or a cell is not text or blank.
            Blank lines of a TXT file are skipped.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("a text\n\nanother text\n")
        ...     file.flush()
        ...     load_texts(TextSettings(file.name))["text"][:]
        ['a text', 'another text']
    """
    pairs = settings.as_pairs()
    rows, column = read_rows(pairs), pairs.columns["query"]
    if column not in rows.column_names:
        raise DataError(
            f"{settings.source!r} has no column {column!r} for the text; its columns are {rows.column_names}. Name the "
            f"one that holds the text as column.{nearest(column, rows.column_names)}"
        )
    rows = rows.select_columns([column]).rename_columns({column: "text"})
    if settings.limit is not None:
        rows = rows.select(range(min(settings.limit, len(rows))))
    if len(rows) == 0:
        raise DataError(f"{settings.source!r} (split {settings.split!r}) is empty.")
    check_texts(pairs, "text", rows.data.column("text"))
    return rows


def load_views(settings: TextSettings) -> Dataset:
    """Return each text of `settings` twice, in the columns ``query`` and ``positive``."""
    import pyarrow as pa
    from datasets import Dataset

    texts = load_texts(settings).data.column("text")
    return Dataset(pa.table({"query": texts, "positive": texts}))
