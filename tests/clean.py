"""A fixture for test folders in which no run may log a warning."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def clean_run(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails a test, unless marked `logs_warning`, in which the package or a library of Hugging Face warned."""
    yield
    if request.node.get_closest_marker("logs_warning") is not None:
        return
    loud = [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING]
    found = [
        record.getMessage() for record in loud if record.name.startswith(("st_llmpool", "transformers", "sentence"))
    ]
    assert not found
