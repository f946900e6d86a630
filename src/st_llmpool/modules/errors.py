"""The errors that st_llmpool raises, each naming the value, the limit and the way out; and its version."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

__version__ = "0.1.0"


class StLlmpoolError(Exception):
    """Base class of every error that st_llmpool raises; a shared model's own copy is recognised by the attribute."""

    is_st_llmpool_error = True


class AttentionError(StLlmpoolError, RuntimeError):
    """The backbone does not attend the way that its configuration says."""


class ConfigurationError(StLlmpoolError, ValueError):
    """A setting is unknown, out of range, or does not fit the backbone."""


class DataError(StLlmpoolError, ValueError):
    """A data file or data set is missing, or does not have the shape that is asked for."""


class InputError(StLlmpoolError, ValueError):
    """A text, a batch or a saved file cannot give a correct embedding."""


def of_package(module: str) -> Any:
    """Return a module of the installed st_llmpool by its name, or None on a machine without it."""
    try:
        return import_module(f"st_llmpool.{module}")
    except ImportError:
        return None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the known name closest to `name`, such as " Did you mean 'mean'?", or nothing."""
    matches = difflib.get_close_matches(str(name), [str(option) for option in known], n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def check_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    """Raise ConfigurationError unless `value` is one of the known ones; 1 is not True."""
    if not any(type(value) is type(option) and value == option for option in known):
        shown = reprlib.repr(value)
        hint = nearest(shown.strip("'"), known)
        raise ConfigurationError(f"{name}={shown} is unknown; it is one of {list(known)}.{hint}")
