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
from typing import Any, TypeAlias, TypeVar

from ..modules.errors import ConfigurationError, DataError, nearest
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


T = TypeVar("T")


def sample(keys: Sequence[str], limit: int | None) -> list[int]:
    """Return the positions of at most `limit` keys, in order; all if `limit` is None."""
    if limit is None or limit >= len(keys):
        return list(range(len(keys)))
    return sorted(_by_hash(keys)[:limit])


def select_rows(table: Mapping[str, Sequence[T]], rows: Sequence[int]) -> dict[str, list[T]]:
    """Return some rows of a table of columns."""
    return {name: [column[row] for row in rows] for name, column in table.items()}


def sample_retrieval(
    queries: Sequence[str], documents: Sequence[str], relevant: Mapping[str, Mapping[str, int]], limit: int | None
) -> tuple[set[str], set[str]]:
    """Return the ids of at most `limit` queries and at most `limit` documents; grades above 0 are relevant.

    Every kept query keeps all its relevant documents; other documents fill the rest.
    """
    if limit is None:
        return set(queries), set(documents)
    kept_queries: set[str] = set()
    kept_documents: set[str] = set()
    for position in _by_hash(queries):
        answers = {document for document, grade in relevant.get(queries[position], {}).items() if grade > 0}
        if answers and len(kept_documents | answers) <= limit:
            kept_queries.add(queries[position])
            kept_documents |= answers
        if len(kept_queries) == limit:
            break
    if not kept_queries:
        raise DataError(f"limit={limit} is too small: no query has so few relevant documents. Raise it.")
    for position in _by_hash(documents):
        if len(kept_documents) >= limit:
            break
        kept_documents.add(documents[position])
    return kept_queries, kept_documents


def _by_hash(keys: Sequence[str]) -> list[int]:
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    return sorted(range(len(keys)), key=digests.__getitem__)
