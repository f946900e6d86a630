"""The trainer's callbacks: live progress, and the training time across resumes."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState


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
            self._progress.console.print(f"step {state.global_step}/{state.max_steps}  {numbers}", highlight=False)

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
