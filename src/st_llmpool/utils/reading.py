"""Read text, JSON and YAML files within limits; whatever is wrong with one is a single error that names the file.

The libraries raise over a dozen kinds of errors for a damaged file, some only after minutes: deep nesting overflows the
stack, a number of 5,000 digits cannot be printed, a named pipe never ends. Every reader of the package goes through
here, so that a user sees one line: an error of the `kind` that the caller names.
"""

from __future__ import annotations

import csv
import json
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..modules.errors import ConfigurationError, DataError, StLlmpoolError

#: Nested lists and mappings: no file that people or this package write comes near.
MAX_DEPTH = 64
#: Values of a YAML file once its aliases are expanded.
MAX_VALUES = 100_000
#: Bytes of a YAML file.
MAX_YAML = 2**19
#: Bytes of a JSON file that is read at once; mteb's largest results, with a score for every query, have a tenth.
MAX_JSON = 2**28


def shown(value: object) -> str:
    """Return `value` as a message shows it: on one line and short."""
    try:
        text = _SHORT.repr(value)
    except (ValueError, RecursionError):  # a number with too many digits to print
        return f"a {type(value).__name__} that is too large to print"
    return text if len(text) <= 160 else f"{text[:157]}..."


def exists(path: str | Path) -> bool:
    """Return whether there is something; False too for a name that nothing can have: too long, or with a zero byte."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def is_folder(path: str | Path) -> bool:
    """Return whether there is a folder, as :func:`exists`."""
    return exists(path) and Path(path).is_dir()


def check_file(path: str | Path, kind: type[StLlmpoolError] = DataError) -> Path:
    """Return `path` if it is a regular file; opening a named pipe or a device would wait for ever."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise kind(f"{shown(str(path))} cannot be read: {_reason(error)}.") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise kind(f"{str(path)!r} is {what}; name a regular file.")
    return Path(path)


def check_no_pipes(folder: Path) -> None:
    """Check that no file of a model is a pipe or device, on which every library would wait for ever."""
    for file in folder.rglob("*"):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise DataError(f"{str(file)!r} is a pipe or device.")


def read_text(path: str | Path, kind: type[StLlmpoolError] = DataError, *, limit: int = MAX_JSON) -> str:
    """Read a UTF-8 file, with or without a byte order mark."""
    file = check_file(path, kind)
    try:
        if file.stat().st_size > limit:
            raise kind(f"{str(path)!r} has {file.stat().st_size:,} bytes; the limit is {limit:,}.")
        content = file.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise kind(f"{str(path)!r} cannot be read: {_reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise kind(f"{str(path)!r} {not_utf8(content, error)}") from error


def not_utf8(content: bytes, error: UnicodeDecodeError | None = None) -> str:
    """Return why a file's (first) bytes are not UTF-8 text, and what to do; empty if they seem to be.

    Example:
        >>> not_utf8("text".encode("utf-16"))
        'is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 FILE'
    """
    for start, name, way_out in _SIGNATURES:
        if content.startswith(start):
            return f"is {name}, not UTF-8. {way_out}"
    if b"\0" in content[:1024]:
        return "holds zero bytes, so it is no text file: check that it is the right one."
    if error is None:
        return ""
    return (
        f"is not UTF-8: byte 0x{content[error.start]:02x} at position {error.start:,}. If it is Latin-1 or "
        f"Windows-1252, convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE"
    )


def read_json(path: str | Path, kind: type[StLlmpoolError] = DataError) -> Any:
    """Read a JSON file."""
    return parse_json(read_text(path, kind), str(path), kind)


def read_json_object(path: str | Path, kind: type[StLlmpoolError] = DataError) -> dict[str, Any]:
    """Read a JSON file that holds an object; arguments and errors as for :func:`read_json`."""
    content = read_json(path, kind)
    if not isinstance(content, dict):
        raise kind(f"{str(path)!r} must hold a JSON object; found {shown(content)}.")
    return content


def parse_json(text: str, where: str, kind: type[StLlmpoolError] = DataError) -> Any:
    """Parse JSON."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise kind(f"{where} is nested deeper than {MAX_DEPTH} levels.") from error
    except ValueError as error:
        raise kind(f"{where} is not JSON: {_reason(error)}.") from error
    check_plain(content, where, kind)
    return content


def read_json_lines(path: str | Path, kind: type[StLlmpoolError] = DataError) -> Iterator[Any]:
    """Yield the values of a JSON Lines file, skipping blank lines."""
    for number, line in enumerate(read_lines(path, kind), start=1):
        if line.strip():
            yield parse_json(line, f"Line {number} of {str(path)!r}", kind)


def read_lines(path: str | Path, kind: type[StLlmpoolError] = DataError) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, without their ends."""
    file = check_file(path, kind)
    try:
        with file.open("rb") as lines:
            if reason := not_utf8(lines.read(1024)):
                raise kind(f"{str(path)!r} {reason}")
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise kind(f"Line {number} of {str(path)!r} {not_utf8(line, error)}") from error
    except OSError as error:
        raise kind(f"{str(path)!r} cannot be read: {_reason(error)}.") from error


def check_rows(path: str | Path, kind: type[StLlmpoolError] = DataError) -> None:
    """Check a JSON, JSON Lines, CSV or TSV file for what other readers crash on, or get wrong in silence.

    Arrow's JSON reader ends the process at deep nesting, and takes text that is not UTF-8; pandas moves the columns of
    a row that is longer than the header.
    """
    suffix, name = Path(path).suffix, str(path)
    if suffix in (".csv", ".tsv"):
        _check_cells(read_lines(path, kind), name, kind, separator="\t" if suffix == ".tsv" else ",")
        return
    for number, line in enumerate(read_lines(path, kind), start=1):
        if number == 1 and suffix == ".jsonl" and line.strip() and not line.lstrip("\ufeff \t").startswith("{"):
            raise kind(f"Line 1 of {name!r} is {shown(line)}, not a JSON object: JSON Lines has one, {{...}}, per row.")
        if line.count("[") + line.count("{") > MAX_DEPTH or "\\ud" in line.lower():  # else it can be neither
            where = f"Line {number} of {name!r}"
            if suffix == ".jsonl":
                parse_json(line, where, kind)
            else:
                read_json(path, kind)
                return


def _check_cells(lines: Iterator[str], name: str, kind: type[StLlmpoolError], *, separator: str) -> None:
    limit = csv.field_size_limit(2**31 - 1)
    try:
        rows = csv.reader((f"{line}\n" for line in lines), delimiter=separator, strict=True)
        header = next(rows, [])
        named = [column for column in header if column]  # pandas writes its index without a name
        if len(set(named)) < len(named):
            raise kind(f"The header of {name!r} must name every column once; it has {shown(header)}.")
        for row in rows:
            if len(row) > len(header):
                raise kind(
                    f"Line {rows.line_num} of {name!r} has {len(row)} cells, not {len(header)}: quote separators."
                )
    except csv.Error as error:
        raise kind(f"Line {rows.line_num} of {name!r} is not CSV: {_reason(error)}.") from error
    finally:
        csv.field_size_limit(limit)


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file of settings: a recipe, a study, a suite."""
    return parse_yaml(read_text(path, ConfigurationError, limit=MAX_YAML), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML that holds settings: text, finite numbers, booleans, lists, mappings.

    Example:
        >>> parse_yaml("steps: 10", "recipe.yaml")
        {'steps': 10}
    """
    try:
        content = yaml.load(text, _Loader)
    except RecursionError as error:
        raise ConfigurationError(f"{where} is nested deeper than {MAX_DEPTH} levels.") from error
    except Exception as error:  # PyYAML lets through whatever int, float, date and the like raise over a value
        raise ConfigurationError(f"{where} is not YAML: {_reason(error)}.") from error
    check_plain(content, where, ConfigurationError, finite=True, limit=MAX_VALUES)
    return content


def check_plain(
    content: object,
    where: str,
    kind: type[StLlmpoolError] = DataError,
    *,
    finite: bool = False,
    limit: int | None = None,
) -> None:
    """Refuse what breaks later, far from the file: deep nesting, huge numbers, text that cannot be encoded.

    With `finite` also NaN and infinity, and with `limit` more values than that, those that aliases repeat included.
    """
    level: list[object] = [content]
    count = 0
    for _ in range(MAX_DEPTH + 1):
        count += len(level)
        if limit is not None and count > limit:
            raise kind(f"{where} holds more than {limit:,} values.")
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            else:
                _check_scalar(value, where, kind, finite=finite)
            if limit is not None and len(below) > limit:
                raise kind(f"{where} holds more than {limit:,} values.")
        if not below:
            return
        level = below
    raise kind(f"{where} is nested deeper than {MAX_DEPTH} levels.")


def _check_scalar(value: object, where: str, kind: type[StLlmpoolError], *, finite: bool) -> None:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise kind(
                    f"{where} holds a lone surrogate, {value[error.start]!a}, which no tokenizer reads: {value[:60]!a}."
                ) from error
    elif isinstance(value, int):
        if value.bit_length() > 64:
            raise kind(f"{where} holds an integer of {value.bit_length()} bits; at most 64 can be used.")
    elif isinstance(value, float):
        if finite and not -_INFINITY < value < _INFINITY:
            raise kind(f"{where} holds {value}; numbers must be finite.")
    elif value is not None:
        raise kind(
            f"{where} holds {shown(value)}, of type {type(value).__name__}; text that looks like one needs quotes."
        )


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: PyYAML would drop the first one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in names:
                raise ValueError(f"the key {key.value!r} of line {key.start_mark.line + 1} is there twice")
            if name is not None:
                names.add(name)
        return super().construct_mapping(node, deep)


_INFINITY = float("inf")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SIGNATURES = (
    (b"\x1f\x8b", "compressed with gzip", "Unpack it: gunzip -c FILE > OTHER"),
    (b"PK\x03\x04", "a ZIP archive", "Unpack it."),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "Unpack it: unzstd FILE"),
    (b"PAR1", "Parquet", "Name it .parquet."),
    (b"\xff\xfe", "UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 FILE"),
    (b"\xfe\xff", "UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8 FILE"),
)


def _reason(error: BaseException) -> str:
    """Return what an error says, on one line."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(words.split()).rstrip(".")[:300] or type(error).__name__
