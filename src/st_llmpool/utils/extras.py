"""Check optional dependencies early, with the command that installs a missing one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..modules.errors import StLlmpoolError


class MissingExtraError(StLlmpoolError, ModuleNotFoundError):
    """A library of one of the package's extras is not installed."""


def require(extra: str, *modules: str, purpose: str = "This") -> None:
    """Checks that libraries are installed; to be called before a long computation.

    Args:
        extra: Extra of the package that installs them.
        modules: Names to import.
        purpose: What needs them; starts the message.

    Raises:
        MissingExtraError: With the command that installs what is missing.

    Example:
        >>> require("eval", "no_such_library", purpose="Evaluation")
        Traceback (most recent call last):
        ...
        st_llmpool.utils.extras.MissingExtraError: Evaluation needs no_such_library: pip install "st-llmpool[eval]"
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise _missing(purpose, ", ".join(missing), extra)


@contextmanager
def needs(extra: str, purpose: str) -> Iterator[None]:
    """Re-raises a failed import in its block as a `MissingExtraError`.

    Args:
        extra: Extra of the package that installs what the block imports.
        purpose: What needs it, as the start of a sentence.

    Raises:
        MissingExtraError: With the command that installs what is missing.
    """
    try:
        yield
    except MissingExtraError:
        raise
    except ModuleNotFoundError as error:
        first: Any = error
        while first.name is None and isinstance(first.__cause__, ImportError):  # transformers raises its own from it
            first = first.__cause__
        raise _missing(purpose, str(first.name), extra) from error


@contextmanager
def importing_mteb() -> Iterator[None]:
    """Keeps the random state, which mteb seeds when it is imported, and names the extra if it is not installed."""
    from .random_state import preserve_rng_state  # imports torch

    with needs("eval", "Evaluation"), preserve_rng_state():
        yield


def _missing(purpose: str, what: str, extra: str) -> MissingExtraError:
    return MissingExtraError(f'{purpose} needs {what}: pip install "st-llmpool[{extra}]"')
