"""Write a run's training.json, and a plot of its loss where matplotlib is installed."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..model_card.figures import draw_curve
from ..modules.errors import __version__
from ..utils.files import write_atomically

_LIBRARIES = ("torch", "transformers", "sentence-transformers", "accelerate", "datasets", "peft", "bitsandbytes")


def write_report(folder: Path, state: TrainerState, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes ``training.json`` and ``loss.png``.

    Args:
        folder: The run's folder.
        state: The trainer's state, whose log goes back to the first step even if the run was resumed.
        facts: What the state does not know; becomes the head of the file.

    Returns:
        What is in ``training.json``: `facts`, ``versions``, ``steps``, ``losses``, ``learning_rates``,
        ``pooling_share`` and ``evaluations``, the last four as lists of ``[step, value]``.
    """
    report = {
        **facts,
        "versions": _versions(),
        "steps": state.global_step,
        "losses": _curve(state, "loss"),
        "learning_rates": _curve(state, "learning_rate"),
        "pooling_share": _curve(state, "pooling_share"),
        "evaluations": [[entry["step"], metrics] for entry in state.log_history if (metrics := _metrics(entry))],
    }
    write_atomically(folder / "training.json", json.dumps(report, indent=2))
    draw_curve(folder / "loss.png", report["losses"], "training loss")
    return report


def _versions() -> dict[str, str]:
    versions = {"st_llmpool": __version__}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _curve(state: TrainerState, name: str) -> list[list[float]]:
    return [[entry["step"], float(entry[name])] for entry in state.log_history if name in entry]


def _metrics(entry: dict[str, Any]) -> dict[str, float]:
    speed = ("_runtime", "_per_second")
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(speed)
    }
