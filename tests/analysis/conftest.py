from __future__ import annotations

from tests.clean import clean_run  # noqa: F401
