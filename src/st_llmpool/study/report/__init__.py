"""The report of a study, generated from its runs and corrected tests."""

from __future__ import annotations

from .write import write_report

__all__ = ["write_report"]
