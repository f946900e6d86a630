"""Check optional dependencies early, with the command that installs a missing one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..modules.errors import StLlmpoolError


class MissingExtraError(StLlmpoolError, ModuleNotFoundError):
    """A library of one of the package's extras is not installed."""


def require(extra: str, *modules: str, purpose: str = "This") -> None:
    """Check, before a long computation, that the `modules` of an extra that `purpose` needs can be imported."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise _missing(purpose, ", ".join(missing), extra)


def missing_extra(error: BaseException) -> MissingExtraError | None:
    """Return the error that names the extra of a library that was not found; None if it is of no extra.

    Example:
        >>> print(missing_extra(ModuleNotFoundError(name="peft")))
        This needs peft: pip install "st-llmpool[train]"
        >>> missing_extra(ModuleNotFoundError(name="nothing"))
    """
    if not isinstance(error, ModuleNotFoundError):
        return None
    library = _library(error).partition(".")[0]
    for line in importlib.metadata.requires("st-llmpool") or ():
        found = re.match(r"([\w.-]+).*extra == ['\"](\w+)", line)
        if found and found[2] != "all" and found[1].replace("-", "_").lower() == library.lower():
            return _missing("This", library, found[2])
    return None


@contextmanager
def needs(extra: str, purpose: str) -> Iterator[None]:
    """Re-raise a failed import in the block as a `MissingExtraError`."""
    try:
        yield
    except MissingExtraError:
        raise
    except ModuleNotFoundError as error:
        raise _missing(purpose, _library(error), extra) from error


@contextmanager
def importing_mteb() -> Iterator[None]:
    """Keep the random state, which mteb seeds when it is imported, and name the extra if it is not installed."""
    from .random_state import preserve_rng_state  # imports torch

    with needs("eval", "Evaluation"), preserve_rng_state():
        yield


def _library(error: Any) -> str:
    """Return the name of the module that was not found; transformers raises its own error from that."""
    while error.name is None and isinstance(error.__cause__, ImportError):
        error = error.__cause__
    return str(error.name)


def _missing(purpose: str, what: str, extra: str) -> MissingExtraError:
    return MissingExtraError(f'{purpose} needs {what}: pip install "st-llmpool[{extra}]"')
