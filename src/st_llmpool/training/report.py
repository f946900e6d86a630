"""Write a run's training.json, and a plot of its loss where matplotlib is installed."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState

from ..model_card.figures import draw_curve
from ..modules.errors import __version__
from ..utils.files import write_atomically
from .callbacks import metrics_of, seconds_of

_LIBRARIES = ("torch", "transformers", "sentence-transformers", "accelerate", "datasets", "peft", "bitsandbytes")


def write_report(folder: Path, trainer: Trainer, facts: dict[str, Any]) -> dict[str, Any]:
    """Write ``training.json`` and ``loss.png``.

    Returns:
        What is in ``training.json``: `facts`, ``wall_seconds``, ``processes``, ``device``, ``precision``,
        ``versions``, ``steps``, ``losses``, ``learning_rates``, ``pooling_share`` and ``evaluations``, the last four
        as lists of ``[step, value]``.
    """
    state, arguments = trainer.state, trainer.args
    report = {
        "wall_seconds": round(seconds_of(trainer), 1),
        "processes": arguments.world_size,
        "device": str(arguments.device.type),
        "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
        **facts,
        "versions": _versions(),
        "steps": state.global_step,
        "losses": _curve(state, "loss"),
        "learning_rates": _curve(state, "learning_rate"),
        "pooling_share": _curve(state, "pooling_share"),
        "evaluations": [[entry["step"], metrics] for entry in state.log_history if (metrics := metrics_of(entry))],
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
