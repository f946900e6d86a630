"""Small helpers for sentences that people read."""

from __future__ import annotations

import re
from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless there is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    r"""Return `text` without control characters other than tabs and line ends.

    Example:
        >>> printable("a\x1b[31mb\n")
        'a[31mb\n'
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def listed(values: Iterable[object], most: int = 10) -> str:
    """Return the different values, with the number of those beyond the first `most`."""
    names = list(dict.fromkeys(map(str, values)))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers with runs shortened."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def markdown(text: str, *, start: bool = False) -> str:
    r"""Return `text` on one line with Markdown's markup escaped; with `start` also what would start a block."""
    text = re.sub(r"[\\`*<|]|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])|(?<=\])\(", r"\\\g<0>", " ".join(text.split()))
    return re.sub(r"^(\d*)(?=[-+#>=~\[]|(?<=\d)[.)])", r"\1\\", text) if start else text
