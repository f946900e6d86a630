"""The result of one check of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of one check, a row of the doctor's table.

    Attributes:
        check: Name of the check.
        status: ``"ok"``, ``"warning"``, ``"failed"`` or ``"skipped"``.
        detail: What was found and, if it is not ok, what to do.
    """

    check: str
    status: Status
    detail: str
