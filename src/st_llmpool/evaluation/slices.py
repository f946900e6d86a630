"""Slices of larger tables as tasks: the rows that a suite's `where` keeps.

`where` maps a table's role to a column of the task to conditions. A row is kept if all of them hold:

- ``in: [a, b]``: the value is one of these; each must occur.
- ``starts: [who, whose]``: the text starts with one of these words or phrases, in any case.
- ``length: [0.25, 0.5]``: the text is in the second quarter of the table by its length in characters.
- ``part: 2/5``: the value is in the second of five parts. The distinct values are ordered by their hashes and assigned
  in turn, so rows with equal values stay together.

Every condition applies to the full table, so slices with adjacent ranges or parts partition it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from ..modules.errors import ConfigurationError, DataError, nearest
from .sampling import select_rows
from .task_files import Column, Kind

#: Role to column to condition to its argument.
Where: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Any]]]


def check_where(task: str, where: Where, tables: Mapping[str, Sequence[Column]]) -> None:
    """Check a suite's `where` before any data are read."""
    kinds = {role: {column.name: column.kind for column in columns} for role, columns in tables.items()}
    for role, columns in _entries(task, "table", where, kinds):
        for column, conditions in _entries(task, f"column of {role}", columns, kinds[role]):
            for name, argument in _entries(task, "condition", conditions, _CONDITIONS):
                condition = _CONDITIONS[name]
                given = f"Task {task}: where {role}.{column} has `{name}: {argument}`"
                if kinds[role][column] not in condition.kinds:
                    raise ConfigurationError(
                        f"{given}, which does not fit a column of kind {kinds[role][column]!r}; "
                        f"it needs one of {', '.join(condition.kinds)}."
                    )
                if not condition.is_argument(argument):
                    raise ConfigurationError(f"{given}; expected {condition.expected}.")


def cut(task: str, where: Where, tables: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, dict[str, list[Any]]]:
    """Return the tables (role to column to values) with only the rows that a checked `where` keeps, in order."""
    kept = {role: dict(table) for role, table in tables.items()}
    for role, columns in where.items():
        holds = [
            _CONDITIONS[name].holds(f"Task {task}: where {role}.{column}", tables[role][column], argument)
            for column, conditions in columns.items()
            for name, argument in conditions.items()
        ]
        rows = [row for row, held in enumerate(zip(*holds, strict=True)) if all(held)]
        if not rows:
            raise DataError(f"Task {task}: where keeps no row of {role}: {dict(columns)} never holds together.")
        kept[role] = select_rows(tables[role], rows)
    return kept


def _entries(task: str, what: str, given: object, known: Mapping[str, object]) -> list[tuple[str, Any]]:
    if not isinstance(given, Mapping) or not given:
        raise ConfigurationError(f"Task {task}: where has {given!r}, expected {what} and a value each.")
    for name in given:
        if name not in known:
            raise ConfigurationError(
                f"Task {task}: where names the unknown {what} {name!r}; known are {', '.join(known)}."
                f"{nearest(str(name), known)}"
            )
    return list(given.items())


def _in(where: str, values: Sequence[Any], wanted: Sequence[Any]) -> list[bool]:
    for value in wanted:
        if value not in values:
            raise DataError(f"{where} is never {value!r}.{nearest(str(value), {str(known) for known in values})}")
    return [value in wanted for value in values]


def _starts(where: str, values: Sequence[str], words: Sequence[str]) -> list[bool]:
    start = re.compile(rf"(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
    return [start.match(value) is not None for value in values]


def _length(where: str, values: Sequence[str], bounds: Sequence[float]) -> list[bool]:
    order = sorted(range(len(values)), key=lambda row: len(values[row]))  # stable: equal lengths keep their order
    first, end = (round(bound * len(values)) for bound in bounds)
    rows = set(order[first:end])
    return [row in rows for row in range(len(values))]


def _part(where: str, values: Sequence[Any], part_of: str) -> list[bool]:
    part, parts = map(int, part_of.split("/"))
    order = sorted(set(values), key=lambda value: hashlib.sha256(str(value).encode()).digest())
    wanted = set(order[part - 1 :: parts])
    return [value in wanted for value in values]


def _is_range(argument: Any) -> bool:
    return _is_list_of(argument, int | float) and len(argument) == 2 and 0 <= argument[0] < argument[1] <= 1


def _is_part(argument: object) -> bool:
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", argument) if isinstance(argument, str) else None
    return found is not None and 1 <= int(found[1]) <= int(found[2])


def _is_list_of(argument: object, kind: Any) -> bool:
    are_values = isinstance(argument, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in argument)
    return are_values and bool(argument)


@dataclass(frozen=True)
class _Condition:
    holds: Callable[[str, Sequence[Any], Any], list[bool]]
    kinds: tuple[Kind, ...]
    is_argument: Callable[[Any], bool]
    expected: str


_CONDITIONS = {
    "in": _Condition(
        _in, ("id", "text", "label", "integer"), partial(_is_list_of, kind=str | int), "a list of texts or integers"
    ),
    "starts": _Condition(_starts, ("id", "text"), partial(_is_list_of, kind=str), "a list of words"),
    "length": _Condition(_length, ("id", "text"), _is_range, "two numbers from 0 to 1, the smaller first"),
    "part": _Condition(_part, ("id", "text", "label", "integer"), _is_part, "k/n with k from 1 to n, such as 2/5"),
}
