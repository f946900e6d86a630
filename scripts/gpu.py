"""Everything that only a GPU can show, in one command of at most nine minutes: `make gpu` runs this.

    python scripts/gpu.py --out runs/gpu                                    on the GPU of this machine
    python scripts/gpu.py --out runs/gpu --wheels build/gpu-wheels          on a bare machine without network
    python scripts/gpu.py --out runs/gpu --quick                            the same code, small, on a CPU

The parts are in `benchmarks/gpu_parts.py`, the most valuable first. Each runs in a process of its own; a cell that
fails, crashes or hangs is noted, and the rest goes on. `OUT/cells.jsonl` is written line by line, `OUT/results.md`
after every part. This file needs nothing but Python: what the parts need is installed from `--wheels`, into a folder of
its own in front of what the machine has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[1]
#: Part -> the most seconds that it may take.
PARTS = {
    "correctness": 150,
    "encoding_small": 75,
    "encoding_large": 85,
    "training_large": 85,
    "training_small": 60,
    "learning": 540,  # what is left
}
#: A cell that takes longer hangs. The first compilation is what takes longest.
CELL_SECONDS = 80
HEADER = ("what", "ours", "plain", "ratio (95 %)", "limit", "verdict", "note")


# --- the process of a part ------------------------------------------------------------------------------------------


class Run:
    """What a part is given; its cells end up in the file of the run, line by line."""

    def __init__(self, args: argparse.Namespace, as_json: Callable[[Any], Any]) -> None:
        self.device, self.quick, self.scratch, self.text_dir = args.device, args.quick, args.scratch, args.text_dir
        self._file, self._part, self._as_json = args.out / "cells.jsonl", args.part, as_json
        self._run_before = {line["cell"] for line in read(self._file) if line["part"] == args.part}

    def cell(self, name: str, function: Callable[[], Sequence[Any]]) -> None:
        """Runs a cell unless it was run before, and writes its rows or its error."""
        if not self.started(name):
            return
        try:
            rows = [self._as_json(row) for row in function()]
        except Exception as error:
            self.ended(name, f"{type(error).__name__}: {error}"[:600])
            self._require_working_gpu()
        else:
            self.ended(name, rows=rows)

    def started(self, name: str) -> bool:
        """Notes that a cell starts; False if it was run before."""
        if name in self._run_before:
            return False
        self._write(cell=name, state="started")
        return True

    def ended(self, name: str, error: str = "", rows: Sequence[Any] = ()) -> None:
        """Notes how a cell ended."""
        state = "skipped" if error.startswith("skipped") else "failed" if error else "done"
        self._write(cell=name, state=state, error=error, rows=list(rows))

    def note(self, **content: Any) -> None:
        """Notes something about the whole run."""
        self._write(cell="machine", state="about", about=content)

    def _write(self, **content: Any) -> None:
        write_line(self._file, self._part, **content)

    def _require_working_gpu(self) -> None:
        """Frees what a failed cell held; a GPU that cannot go on in this process may in another one."""
        if self.device == "cuda":
            import torch

            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                os._exit(3)


def run_part(args: argparse.Namespace) -> None:
    """Runs one part in this process."""
    sys.path[:0] = [str(args.parts.parent), str(TOP)]
    spec = importlib.util.spec_from_file_location(args.parts.stem, args.parts)
    assert spec is not None
    assert spec.loader is not None
    parts = importlib.util.module_from_spec(spec)
    sys.modules[args.parts.stem] = parts
    spec.loader.exec_module(parts)
    run = Run(args, parts.as_json)
    run.note(**parts.describe(run))
    getattr(parts, args.part)(run)


# --- all parts ------------------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace, parts: Mapping[str, float] = PARTS, cell_seconds: float = CELL_SECONDS) -> None:
    """Runs the parts one after the other within the time of the whole, and writes the table after each."""
    start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cells.jsonl").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as scratch:
        environment = prepare(args, Path(scratch))
        for part, seconds in parts.items():
            end = min(time.time() + seconds, start + 60 * args.minutes)
            if time.time() < end:
                supervise(args, part, end, cell_seconds, Path(scratch), environment)
            remark = " Quick: the figures mean nothing." * args.quick
            (args.out / "results.md").write_text(page(args.out / "cells.jsonl", parts, time.time() - start, remark))
    print((args.out / "results.md").read_text())


def memory_folder() -> str | None:
    """Returns a folder in memory, where weights are written and read fastest, if it has space for the largest."""
    folder = Path("/dev/shm")
    return str(folder) if folder.is_dir() and shutil.disk_usage(folder).free > 40 * 2**30 else None


def prepare(args: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """Installs the wheels; returns the environment of the parts, in which this checkout comes first."""
    paths = [str(TOP / "src")]
    if args.wheels is not None:
        wheels = sorted(map(str, args.wheels.glob("*.whl")))
        options = ["--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target"]
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, scratch / "site", *wheels], check=True)
        paths.append(str(scratch / "site"))
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


def supervise(
    args: argparse.Namespace, part: str, end: float, cell_seconds: float, scratch: Path, environment: Mapping[str, str]
) -> None:
    """Runs a part until it ends or its time does; after a crash or a hang it goes on behind the cell that was running.

    Without a cell that was running there is nothing to leave out, so the part is over.
    """
    file = args.out / "cells.jsonl"
    command = [sys.executable, __file__, "--part", part, "--out", args.out, "--device", args.device]
    command += ["--scratch", scratch, "--parts", args.parts, *["--quick"] * args.quick]
    command += ["--text-dir", args.text_dir] if args.text_dir else []
    while time.time() < end:
        begun = time.time()
        with (args.out / f"{part}.log").open("a") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            why = ""
            while process.poll() is None and not why:
                time.sleep(0.1)
                running = [line for line in read(file) if line["part"] == part][-1:]
                hangs = running and running[0]["state"] == "started" and running[0]["time"] < time.time() - cell_seconds
                why = "out of time" if time.time() > end else "hangs" if hangs and running[0]["time"] > begun else ""
            if why:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if code == 0:
            return
        lines = [line for line in read(file) if line["part"] == part]
        was_running = lines and lines[-1]["state"] == "started"
        cell = lines[-1]["cell"] if was_running else "the process of the part"
        error = why or f"ended with code {code}, see {part}.log"
        write_line(file, part, cell=cell, state="failed", error=error, rows=[])
        if not was_running and code != 3:
            return


def write_line(file: Path, part: str, **content: Any) -> None:
    """Adds a line on a part to the file of the run."""
    with file.open("a") as written:
        written.write(json.dumps({"part": part, "time": time.time(), **content}) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Returns the lines written so far; the last may be half of one."""
    lines = file.read_text().splitlines() if file.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def page(file: Path, parts: Mapping[str, float], seconds: float, remark: str = "") -> str:
    """Returns the results as Markdown: a table for each part, and what failed or was not reached."""
    lines = read(file)
    about = next((line["about"] for line in lines if line["state"] == "about"), {})
    text = ["# GPU run", "", "; ".join(f"{name}: {value}" for name, value in about.items()) + "."]
    text += ["", f"`python scripts/gpu.py`, {seconds / 60:.1f} minutes. Seconds and MiB are medians.{remark}"]
    for part in parts:
        ended = [line for line in lines if line["part"] == part and line["state"] in ("done", "failed", "skipped")]
        counts = {state: sum(line["state"] == state for line in ended) for state in ("done", "failed", "skipped")}
        text += ["", f"## {part.replace('_', ' ')}", ""]
        text.append(", ".join(f"{count} {state}" for state, count in counts.items() if count) or "not reached")
        rows = [row["cells"] for line in ended for row in line["rows"]]
        if rows:
            text += ["", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
            text += ["| " + " | ".join(row) + " |" for row in rows]
        failed = [line for line in ended if line["state"] == "failed"]
        text += ["", *(f"- FAILED {line['cell']}: {' '.join(line['error'].split())}" for line in failed)] * bool(failed)
    return "\n".join(text) + "\n"


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the arguments; the last three are for the processes of the parts."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="folder for cells.jsonl, results.md and logs")
    found.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    found.add_argument("--text-dir", type=Path, help="text to pretrain on, as scripts/pretrain_backbone.py reads it")
    found.add_argument("--minutes", type=float, default=8.8)
    found.add_argument("--device", choices=["cuda", "cpu"], help="cuda, or cpu with --quick")
    found.add_argument("--quick", action="store_true", help="shows that the script runs; the figures mean nothing")
    found.add_argument("--parts", type=Path, default=TOP / "benchmarks" / "gpu_parts.py", help=argparse.SUPPRESS)
    found.add_argument("--part", help=argparse.SUPPRESS)
    found.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs everything, or one part in this process."""
    args = parser().parse_args(argv)
    args.device = args.device or ("cpu" if args.quick else "cuda")
    args.out = args.out.resolve()
    if args.part:
        run_part(args)
    else:
        slow = 8 if args.quick else 1  # a CPU that has other things to do as well
        run_all(args, {part: slow * seconds for part, seconds in PARTS.items()}, slow * CELL_SECONDS)


if __name__ == "__main__":
    main()
