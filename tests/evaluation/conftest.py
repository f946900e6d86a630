"""The fixtures of the evaluation tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from tests.clean import clean_run  # noqa: F401
from tests.evaluation.tiny_suite import static_model, write_suite


@pytest.fixture
def model() -> SentenceTransformer:
    return static_model()


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite file with one task of every type, its data beside it."""
    return write_suite(tmp_path / "data")


@pytest.fixture
def suite_of(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a suite of the given tasks."""
    return lambda *tasks: write_suite(tmp_path / "data", list(tasks))
