"""Every ratio in one table: `make bench` runs this.

    python benchmarks/run_all.py [--device cuda] [--out benchmarks/results]

Each benchmark is a process of its own. The table goes to `<out>/<device>.md`, with the rows in `<device>.json` beside
it, and the machine's description in both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from harness import Row, arguments, cells, finish, machine

SCRIPTS = (
    *("folded_head", "encoding_overhead", "shared_start", "padding", "utilisation", "training", "in_batch_loss"),
    "cached_training",
)
HEADER = ("what", "ours", "plain", "ratio (95 %)", "limit", "verdict", "note")


def run(script: str, device: str, repetitions: int, quick: bool) -> list[Row]:
    """Runs one benchmark and returns its rows."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.json"
        command = [sys.executable, str(Path(__file__).parent / f"{script}.py"), "--device", device, "--json", str(file)]
        subprocess.run([*command, f"--repetitions={repetitions}", *["--quick"] * quick], check=True)
        return [Row(**row) for row in json.loads(file.read_text())]


def page(rows: list[Row], about: dict[str, str], minutes: float) -> str:
    """Returns the table as Markdown."""
    lines = ["# Ratios", "", "; ".join(f"{name}: {value}" for name, value in about.items()) + "."]
    lines += ["", f"`python benchmarks/run_all.py`, {minutes:.0f} minutes. Seconds and MiB are medians.", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)]) + "\n"


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs all, prints and writes the table."""
    args = arguments(__doc__, argv, ("--out", {"type": Path, "default": Path(__file__).parent / "results"}))
    start = time.perf_counter()
    rows = [row for script in SCRIPTS for row in run(script, args.device, args.repetitions, args.quick)]
    about = machine(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.device}.md").write_text(page(rows, about, (time.perf_counter() - start) / 60))
    document = {"machine": about, "rows": [asdict(row) for row in rows]}
    (args.out / f"{args.device}.json").write_text(json.dumps(document, indent=2) + "\n")
    return finish("All ratios", rows, args)


if __name__ == "__main__":
    main()
