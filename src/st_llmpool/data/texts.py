"""Load unlabelled text: a column of a table, or the lines of a text file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..modules.errors import DataError, nearest
from ..utils.reading import exists, read_lines
from .training_data import DOCSTRINGS, DatasetSettings, check_texts, read_rows, source_path

if TYPE_CHECKING:
    from datasets import Dataset


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
    rows = _lines(settings) if Path(settings.source).suffix == ".txt" else _column(settings)
    if settings.limit is not None:
        rows = rows.select(range(min(settings.limit, len(rows))))
    if len(rows) == 0:
        raise DataError(f"{settings.source!r} (split {settings.split!r}) is empty.")
    check_texts(settings.as_pairs(), "text", rows.data.column("text"))
    return rows


def load_views(settings: TextSettings) -> Dataset:
    """Return each text of `settings` twice, in the columns ``query`` and ``positive``."""
    import pyarrow as pa
    from datasets import Dataset

    texts = load_texts(settings).data.column("text")
    return Dataset(pa.table({"query": texts, "positive": texts}))


def _lines(settings: TextSettings) -> Dataset:
    from datasets import Dataset

    path = source_path(settings.source)
    if not exists(path):
        raise DataError(f"There is no file {settings.source!r}; relative paths start at {str(Path.cwd())!r}.")
    return Dataset.from_dict({"text": [line for line in read_lines(path) if line.strip()]})


def _column(settings: TextSettings) -> Dataset:
    pairs = settings.as_pairs()
    rows, column = read_rows(pairs), pairs.columns["query"]
    if column not in rows.column_names:
        raise DataError(
            f"{settings.source!r} has no column {column!r} for the text; its columns are {rows.column_names}. Name the "
            f"one that holds the text as column.{nearest(column, rows.column_names)}"
        )
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")
