"""Small helpers for sentences that people read."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless there is one.

    Example:
        >>> counted(1, "test"), counted(1200, "test")
        ('1 test', '1,200 tests')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
