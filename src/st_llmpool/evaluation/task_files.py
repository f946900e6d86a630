"""Read a table of an evaluation task, Parquet or JSON lines, and check every value before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet

from ..modules.errors import DataError, nearest
from ..utils.reading import exists, is_folder, read_json_lines, shown
from ..utils.words import listed

SUFFIXES = (".parquet", ".jsonl")

Kind = Literal["id", "text", "texts", "number", "integer", "label"]


@dataclass(frozen=True)
class Column:
    """A column that a task reads.

    Args:
        name: Name in the task; the name in the file may differ.
        kind: Kind of its values: `id` (text or integer), `text`, `texts` (one or a list), `number` (finite), `integer`
            or `label` (text or integer).
        default: Value if the file has no such column; None if the column is required.
    """

    name: str
    kind: Kind
    default: str | float | None = None


def find_table(folder: Path, role: str, file_name: str | None) -> Path:
    """Return the file of a role, by its given name or as `role.parquet` or `role.jsonl`."""
    if not is_folder(folder):
        raise DataError(f"{folder} is not a folder; {_content(folder.parent, folder.name)}")
    candidates = [folder / file_name] if file_name else [folder / f"{role}{suffix}" for suffix in SUFFIXES]
    for path in candidates:
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path} cannot be read: the suffix must be one of {', '.join(SUFFIXES)}.")
        if exists(path) and path.is_file():
            return path
    raise DataError(
        f"{' and '.join(str(path) for path in candidates)} (the task's {role} file): no such file; "
        f"{_content(folder, candidates[0].name)}"
    )


def _content(folder: Path, wanted: str) -> str:
    if not is_folder(folder):
        return f"{folder} does not exist either."
    names = sorted(path.name for path in folder.iterdir())
    return f"{folder} holds {listed(names, most=20) or 'nothing'}.{nearest(wanted, names)}"


def read_table(path: Path, columns: Sequence[Column], file_names: Mapping[str, str]) -> dict[str, list[Any]]:
    """Read and check some columns, called as in `file_names`, of a ``.parquet`` or ``.jsonl`` file: name to values."""
    wanted = {column: file_names.get(column.name, column.name) for column in columns}
    read = _read_parquet if path.suffix == ".parquet" else _read_json_lines
    known, found = read(path, list(wanted.values()))
    for column, file_name in wanted.items():
        if file_name not in found and column.default is None:
            hint = nearest(file_name, known)
            if file_name == column.name:
                hint += f" Map it with `columns: {{{file_name}: ...}}`."
            raise DataError(f"{path} has no column {file_name!r}; it has {', '.join(known)}.{hint}")
    rows = len(next(iter(found.values())))
    if not rows:
        raise DataError(f"{path} has no rows.")
    return {
        column.name: _checked(path, file_name, column.kind, found[file_name])
        if file_name in found
        else [column.default] * rows
        for column, file_name in wanted.items()
    }


def _read_parquet(path: Path, names: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the names of all columns and the values of the wanted ones that exist."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            values = file.read(columns=[name for name in names if name in known])
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    return known, {name: values[name].to_pylist() for name in values.column_names}


def _read_json_lines(path: Path, names: Sequence[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """As `_read_parquet`. Every row must have the columns of the first."""
    table: dict[str, list[Any]] = {}
    for number, row in enumerate(read_json_lines(path), start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} is {type(row).__name__}, expected an object with named columns.")
        if number > 1 and row.keys() != table.keys():
            differs = ", ".join(sorted(row.keys() ^ table.keys()))
            raise DataError(f"{path}: row {number} differs from the first row in the columns {differs}.")
        for name, value in row.items():
            table.setdefault(name, []).append(value)
    if not table:
        raise DataError(f"{path} has no rows.")
    return list(table), {name: table[name] for name in names if name in table}


def _checked(path: Path, name: str, kind: Kind, values: list[Any]) -> list[Any]:
    check, expected = _KINDS[kind]
    for row, value in enumerate(values, start=1):
        if not check(value):
            raise DataError(f"{path}: column {name!r} holds {shown(value)} in row {row}, expected {expected}.")
    if kind == "id":
        return [str(value) for value in values]
    if kind == "integer":
        return [int(value) for value in values]
    if kind == "texts":
        return [[value] if isinstance(value, str) else list(value) for value in values]
    return values


def _is_name(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return _is_number(value) and int(value) == value  # type: ignore[call-overload]


def _is_texts(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
    )


_KINDS: dict[Kind, tuple[Callable[[object], bool], str]] = {
    "id": (_is_name, "a text or an integer"),
    "text": (lambda value: isinstance(value, str), "a text"),
    "texts": (_is_texts, "a text or a list of texts that is not empty"),
    "number": (_is_number, "a finite number"),
    "integer": (_is_integer, "an integer"),
    "label": (_is_name, "a text or an integer"),
}
