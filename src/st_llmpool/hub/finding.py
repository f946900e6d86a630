"""One line of the doctor's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        check: What was looked at.
        status: ``"ok"``, ``"warning"``, ``"failed"`` or ``"skipped"``.
        detail: What was found, and the way out if it is not ok.
    """

    check: str
    status: Status
    detail: str
