"""The errors that st_llmpool raises, each naming the value, the limit and the way out; and its version."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__version__ = "0.1.0"


class StLlmpoolError(Exception):
    """Base class of every error that st_llmpool raises on purpose.

    A shared model raises the errors of its own copy of this file, whose classes are others: recognise them by
    `is_st_llmpool_error`.
    """

    is_st_llmpool_error = True


class AttentionError(StLlmpoolError, RuntimeError):
    """The backbone does not attend the way that its configuration says."""


class ConfigurationError(StLlmpoolError, ValueError):
    """A setting is unknown, out of range, or does not fit the backbone."""


class DataError(StLlmpoolError, ValueError):
    """A data file or data set is missing, or does not have the shape that is asked for."""


class InputError(StLlmpoolError, ValueError):
    """A text, a batch or a saved file cannot give a correct embedding."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint that names the known name closest to `name`, or an empty string if none is close.

    Example:
        >>> nearest("bidirectoinal", ["causal", "bidirectional"])
        " Did you mean 'bidirectional'?"
    """
    matches = difflib.get_close_matches(str(name), [str(option) for option in known], n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
