"""Seal checkpoints, and find what is wrong with one before training resumes from it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from ..modules.seal import MANIFEST, differences, read_manifest, record_of, write_manifest


def seal_checkpoint(checkpoint: Path) -> None:
    """Adds what the trainer wrote to the seal that the model's own save left in a checkpoint.

    Args:
        checkpoint: Written to its end by every process.
    """
    manifest = read_manifest(checkpoint)
    ignored = {MANIFEST, "README.md", *manifest.get("files", ())}
    state = [file for file in sorted(checkpoint.iterdir()) if file.is_file() and file.name not in ignored]
    write_manifest(checkpoint, {**manifest, "state": {file.name: record_of(file) for file in state}})


def fault_of(checkpoint: Path) -> str | None:
    """Returns why training cannot resume from a checkpoint, None if it can.

    One without a seal, of an older version or of a run that was killed just before it, is examined by its form only.

    Args:
        checkpoint: Its folder, of any number of processes: all have written their random state before the trainer's.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json, which is written last, is missing or damaged"
    states = sorted(file.name for file in checkpoint.glob("rng_state*.pth")) or ["rng_state.pth"]
    for name in (*states, "scheduler.pt"):
        if not zipfile.is_zipfile(checkpoint / name):  # a zip file's directory is at its end
            return f"{name} is missing or cut"
    if not any(checkpoint.glob("optimizer*")):
        return "the optimizer's state is missing"
    manifest = read_manifest(checkpoint)
    if not manifest and (checkpoint / MANIFEST).is_file():
        return f"{MANIFEST} is damaged"
    found = differences(checkpoint, {**manifest.get("files", {}), **manifest.get("state", {})})
    return "; ".join(map(str, found)) or None
