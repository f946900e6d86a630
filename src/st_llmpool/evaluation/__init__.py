"""Evaluation: local suites as mteb tasks, mteb's own tasks and benchmarks, and an evaluator for use during training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..utils.extras import importing_mteb

if TYPE_CHECKING:
    from .bm25 import bm25_baseline
    from .run import SuiteEvaluator, evaluate
    from .suite import read_suite, shipped_suites
    from .tasks import load_suite

__all__ = ["SuiteEvaluator", "bm25_baseline", "evaluate", "load_suite", "read_suite", "shipped_suites"]

_FILES = {
    "SuiteEvaluator": ".run",
    "bm25_baseline": ".bm25",
    "evaluate": ".run",
    "load_suite": ".tasks",
    "read_suite": ".suite",
    "shipped_suites": ".suite",
}


def __getattr__(name: str) -> object:
    if name in _FILES:  # on first use: importing mteb takes seconds
        with importing_mteb():  # other libraries that come with it draw random numbers too
            return getattr(importlib.import_module(_FILES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
