"""Which design is better: results in one table, paired tests, and their power."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..utils.extras import needs

if TYPE_CHECKING:
    from .comparison import Comparison, compare
    from .readers import read_results, read_task_types
    from .results import Results

__all__ = ["Comparison", "Results", "compare", "read_results", "read_task_types"]

_FILES = {
    "Comparison": ".comparison",
    "Results": ".results",
    "compare": ".comparison",
    "read_results": ".readers",
    "read_task_types": ".readers",
}


def __getattr__(name: str) -> object:
    if name in _FILES:  # on first use: importing scipy and statsmodels takes seconds
        with needs("eval", "Comparing results"):
            return getattr(importlib.import_module(_FILES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
