"""What a run reports: live progress, the pooling's effect, training.json, and a plot of its loss with matplotlib."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ..model_card.figures import draw_curve
from ..modules.errors import __version__
from ..utils.files import write_atomically

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
    draw_curve(folder / "loss.png", report["losses"], "training loss", report["evaluations"])
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


class ElapsedTimeCallback(TrainerCallback, ExportableState):
    """Tracks elapsed training time across resumes.

    Args:
        seconds: Time before the resume, which the checkpoint keeps.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting from where the checkpoint left off."""
        # The trainer restores either all callbacks or none, so this one restores itself.
        self.seconds = self.seconds or _saved_seconds(state)
        self._last = time.monotonic()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Add the time since the last step."""
        now = time.monotonic()
        self.seconds += now - self._last
        self._last = now

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}


def seconds_of(trainer: Trainer) -> float:
    """Return the seconds of a trainer's run; from its checkpoint, if it had nothing left to train."""
    counted = next(
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ElapsedTimeCallback)
    )
    return counted.seconds or _saved_seconds(trainer.state)


def _saved_seconds(state: Any) -> float:
    return (state.stateful_callbacks or {}).get("ElapsedTimeCallback", {}).get("attributes", {}).get("seconds", 0.0)


class RichProgress(TrainerCallback):
    """One live line on a terminal; one line per log entry elsewhere.

    Args:
        console: Output; None is standard error, which leaves standard output to results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the live line."""
        if not state.is_world_process_zero:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=600,  # a step may take minutes
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, numbers="")
        self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the live line."""
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Show the numbers of a log entry."""
        if self._progress is None or not logs or "train_runtime" in logs:
            return
        numbers = describe(logs)
        if "loss" in logs:
            self._progress.update(self._task, numbers=numbers.partition("  pooling")[0])  # fits 80 columns
        if "loss" not in logs or not self.console.is_terminal:
            left = self._progress.tasks[self._task].time_remaining if not self.console.is_terminal else None
            ending = "" if left is None else f"  {timedelta(seconds=round(left))} left"
            line = f"step {state.global_step}/{state.max_steps}  {numbers}{ending}"
            self._progress.console.print(line, highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the live line, and print the last numbers."""
        is_live = self._progress is not None and self.console.is_terminal
        self.close()
        last = next((entry for entry in reversed(state.log_history) if "loss" in entry), None)
        if is_live and last is not None:  # the live line had no space for all of it
            self.console.print(describe(last), highlight=False)

    def close(self) -> None:
        """End the live line, also of a run that was stopped."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe(logs: dict[str, float]) -> str:
    """Return one line with the main numbers of a log entry."""
    parts = []
    if "loss" in logs:
        parts.append(f"loss {float(logs['loss']):.4f}")
    if "learning_rate" in logs:
        parts.append(f"lr {float(logs['learning_rate']):.1e}")
    if "pooling_share" in logs:
        parts.append(f"pooling changes the embedding by {100 * logs['pooling_share']:.1f} %")
    return "  ".join([*parts, *(f"{name} {value:.4f}" for name, value in metrics_of(logs).items())])


def metrics_of(logs: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of an evaluation's log entry, without its speed.

    Example:
        >>> metrics_of({"eval_mean": 0.5, "eval_runtime": 3.0, "step": 7})
        {'mean': 0.5}
    """
    found = {name.removeprefix("eval_"): float(value) for name, value in logs.items() if name.startswith("eval_")}
    return {name: value for name, value in found.items() if not name.endswith(("runtime", "_per_second"))}


#: Below this relative change the pooling has no effect worth its cost.
NEGLIGIBLE = 0.01


def trainable_poolings(model: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the poolings of `model` that start from scratch.

    By a class attribute, since a model that was loaded from a repository runs the repository's copy of the class.
    """
    return [module for module in model if hasattr(module, "default_learning_rate")]


class PoolingChange:
    """Mean of ‖embedding − readout‖ / ‖readout‖ over the texts since the last reading.

    Args:
        model: The model; nothing is measured if it has no trainable pooling.

    Example:
        >>> from st_llmpool.modules import MultiLayerPooling
        >>> untrained = MultiLayerPooling(embedding_dimension=8, num_layers=1)
        >>> change = PoolingChange([untrained])
        >>> features = untrained({"layer_summaries": torch.ones(3, 1, 8), "readout": torch.ones(3, 8)})
        >>> change.pop_mean()
        0.0
    """

    def __init__(self, model: Iterable[nn.Module]) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._hooks = [pooling.register_forward_hook(self._add) for pooling in trainable_poolings(model)]

    def pop_mean(self) -> float | None:
        """Return the mean and reset it; None if there was no forward pass in training mode."""
        if self._count == 0:
            return None
        mean = float(self._sum) / self._count
        self._sum, self._count = 0.0, 0
        return mean

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _add(self, pooling: nn.Module, inputs: Any, features: dict[str, Any]) -> None:
        if not pooling.training:  # evaluation has its own texts
            return
        with torch.no_grad():
            embedding, readout = (features[key].float() for key in ("sentence_embedding", "readout"))
            moved = (embedding - readout).norm(dim=1) / readout.norm(dim=1)
            self._sum = self._sum + moved.sum()  # a tensor: to wait for its value stalls a GPU
        self._count += len(features["sentence_embedding"])
