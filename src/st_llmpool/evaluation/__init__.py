"""Evaluation: local suites as mteb tasks, mteb's own tasks and benchmarks, and an evaluator for use during training."""

from __future__ import annotations

from ..utils.extras import needs
from ..utils.random_state import preserve_rng_state

with needs("eval", "Evaluation"), preserve_rng_state():  # importing mteb seeds Python, numpy and torch
    from .bm25 import bm25_baseline
    from .result import EvaluationResult, TaskScore
    from .run import evaluate
    from .suite import Suite, load_suite, read_suite, shipped_suites
    from .suite_evaluator import SuiteEvaluator
    from .tasks import TASK_TYPES, TaskSpec

__all__ = [
    "TASK_TYPES",
    "EvaluationResult",
    "Suite",
    "SuiteEvaluator",
    "TaskScore",
    "TaskSpec",
    "bm25_baseline",
    "evaluate",
    "load_suite",
    "read_suite",
    "shipped_suites",
]
