"""Dataclasses from plain mappings: types checked, unknown keys answered with the nearest known one."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from ..modules.errors import ConfigurationError, nearest
from .reading import check_plain, parse_yaml, shown

T = TypeVar("T")


def from_mapping(settings: type[T], values: object, where: str = "") -> T:
    """Build a dataclass from what a YAML file holds.

    Args:
        settings: The dataclass; its fields may be dataclasses, lists of them, literals, unions with None.
        values: The mapping.
        where: Dotted name of the place in the file, for messages.

    Returns:
        The dataclass, every value of its field's type (``1e-4``, text in YAML 1.1, becomes a float). A field with the
        metadata ``rest``, a function of the values, their place and the fields, holds the keys that no field has. A
        key in the class's ``RENAMED`` (old name to new) is refused with its new name.
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{where or 'The file'} must hold keys and values; found {shown(values)}.")
    fields = {field.name: field for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    renamed: Mapping[str, str] = getattr(settings, "RENAMED", {})
    rest = next((field.name for field in fields.values() if field.metadata.get("rest")), None)
    further = {}
    for key in values:
        if key in renamed:
            raise ConfigurationError(f"{_join(where, key)} is now {_join(where, renamed[key])}.")
        if rest is not None and key not in fields and isinstance(key, str):
            further[key] = values[key]
        elif key not in fields or key == rest:
            hint = nearest(str(key), fields) or f" Known keys: {', '.join(fields)}."
            raise ConfigurationError(f"{_join(where, _name(key))} is not a key here.{hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigurationError(f"{_join(where, name)} is missing, and there is no default for it.")
    kinds = typing.get_type_hints(settings)
    known = {key: value for key, value in values.items() if key not in further}
    made = {key: converted(kinds[key], value, _join(where, key)) for key, value in known.items()}
    if rest is not None and further:
        made[rest] = fields[rest].metadata["rest"](further, where, fields)
    return settings(**made)


def to_mapping(settings: Any) -> dict[str, Any]:
    """Return a dataclass as nested mappings that :func:`from_mapping` reads back."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        plain |= value if field.metadata.get("rest") else {field.name: _plain(value)}
    return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


class Range(NamedTuple):
    """What a number may be: from `low` on (above it, if `is_open`) to `high`."""

    low: float
    high: float = math.inf
    is_open: bool = False

    def __str__(self) -> str:
        lowest = f"above {self.low:g}" if self.is_open else f"at least {self.low:g}"
        return lowest if self.high == math.inf else f"{lowest} and at most {self.high:g}"

    def holds(self, value: float) -> bool:
        """Return whether `value` is inside; NaN and infinity never are."""
        return (self.low < value if self.is_open else self.low <= value) and value <= self.high and value < math.inf


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]


class Settings:
    """Base of dataclasses of settings: a number must be within the `Range` that its field is annotated with."""

    #: Dotted name of the settings' place in a file.
    where: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for part in (kind, *get_args(kind)):  # of `PositiveInt | None` too
                for allowed in getattr(part, "__metadata__", ()):
                    if value is not None and not allowed.holds(value):
                        raise ConfigurationError(f"{_join(self.where, name)}={value} must be {allowed}.")


def check_filled(settings: object, *names: str) -> None:
    """Refuse empty text, which as a path is the current directory."""
    for name in names:
        if not str(getattr(settings, name)).strip():
            raise ConfigurationError(f"{name}={getattr(settings, name)!r} is empty. Name a folder; '.' is this one.")


def with_overrides(values: object, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of what a recipe's file holds, with changes as for :func:`override`."""
    if not isinstance(values, dict):
        raise ConfigurationError(f"A recipe must hold keys and values; found {shown(values)}.")
    changed = _copy(values)  # overrides change it in place
    check_plain(changed, "The recipe", ConfigurationError, finite=True)
    for assignment in overrides:
        override(changed, assignment)
    return changed


def override(values: dict[str, Any], assignment: str) -> None:
    """Change one value of a nested mapping in place: ``dotted.key=value``, with numbers for places in lists."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ConfigurationError(f"{shown(assignment)} is not key=value, such as training.learning_rate=1e-4.")
    place: Any = values
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        place = _step(place, part, ".".join(path[: depth + 1]))
    value = parse_yaml(text, f"The value of {shown(assignment)}")
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        value = text.strip()  # plain text with a colon in it, such as an instruction
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over` in their places; mappings merge, all else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Return the dotted names of the settings that differ between two nested mappings."""
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        return [] if before == after else [where]
    names = dict.fromkeys([*before, *after])
    return [
        change for name in names for change in differences(before.get(name), after.get(name), _join(where, str(name)))
    ]


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _name(key: object) -> str:
    return key if isinstance(key, str) and len(key) <= 80 else shown(key)


def _copy(value: Any) -> Any:
    """Return a copy in YAML's types: paths become text, tuples lists."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _step(place: Any, part: str, path: str) -> Any:
    if isinstance(place, list):
        found = place[_index(place, part, path)]
    else:
        if place.get(part) is None:
            place[part] = {}
        found = place[part]
    if not isinstance(found, dict | list):
        raise ConfigurationError(f"{path} is {shown(found)}, which has no keys of its own.")
    return found


def _index(place: list[Any], part: str, path: str) -> int:
    if not (part.isascii() and part.isdigit() and len(part) < 10) or int(part) >= len(place):
        raise ConfigurationError(f"{path}: the list has {len(place)} entries, so {part!r} is not a place in it.")
    return int(part)


def converted(kind: Any, value: Any, where: str) -> Any:
    """Return `value`, which a file holds at `where`, as a `kind`: a type, as in an annotation."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(get_args(kind), value, where)
    if origin is Literal:
        if value in get_args(kind):
            return value
        known = list(get_args(kind))
        hint = nearest(str(value), map(str, known))
        raise ConfigurationError(f"{where}={shown(value)} is unknown; it is one of {known}.{hint}")
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [converted(get_args(kind)[0], item, f"{where}.{place}") for place, item in enumerate(items)]
    if origin in (dict, Mapping) or kind is dict:
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{where}={shown(value)} must hold keys and values.")
        of_keys, of_values = get_args(kind) or (Any, Any)
        return {
            converted(of_keys, key, f"{where} (a key)"): converted(of_values, item, _join(where, _name(key)))
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(kind):
        return from_mapping(typing.cast(type, kind), {} if value is None else value, where)
    return _coerce_scalar(kind, value, where)


def _coerce_union(kinds: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    options = [kind for kind in kinds if kind is not type(None)]
    for kind in options:  # a value that is of one of the types stays as it is
        if isinstance(kind, type) and type(value) is kind:
            return converted(kind, value, where)
    for kind in options[:-1]:
        try:
            return converted(kind, value, where)
        except ConfigurationError:
            continue
    return converted(options[-1], value, where)


def _coerce_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is bool:
        fits = isinstance(value, bool)
    elif kind is str:
        fits = isinstance(value, str | int | float) and not isinstance(value, bool)
    else:
        fits = not isinstance(value, bool)
    try:
        converted = kind(value) if fits else None
    except (TypeError, ValueError, OverflowError):
        converted = None
    if converted is None or (kind is int and isinstance(value, float) and converted != value):
        raise ConfigurationError(f"{where}={shown(value)} must be of type {kind.__name__}.")
    if kind is float and not math.isfinite(converted):
        raise ConfigurationError(f"{where}={shown(value)} must be a finite number.")
    if kind is int and converted.bit_length() > 63:
        raise ConfigurationError(f"{where}={shown(value)} is beyond the range of a 64-bit integer.")
    return converted
