"""Shows a training run live: steps, loss, learning rate, the pooling's share, evaluation, time left."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RichProgress(TrainerCallback):
    """A bar on a terminal, one line for each log entry elsewhere.

    Args:
        console: Where to; None is standard error, which keeps standard output for results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar."""
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows the numbers of a log entry."""
        if self._progress is None or not logs or "train_runtime" in logs:
            return
        numbers = describe(logs)
        if "loss" in logs:
            self._progress.update(self._task, numbers=numbers)
        if "loss" not in logs or not self.console.is_terminal:
            self._progress.console.print(f"step {state.global_step}/{state.max_steps}  {numbers}", highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the bar."""
        self.close()

    def close(self) -> None:
        """Closes the bar, also one of a run that was stopped."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe(logs: dict[str, float]) -> str:
    """Returns one line with the numbers that a reader follows.

    Example:
        >>> describe({"loss": 1.25, "learning_rate": 2e-4, "pooling_share": 0.031, "epoch": 0.1})
        'loss 1.2500  lr 2.0e-04  pooling share 3.1 %'
    """
    parts = []
    if "loss" in logs:
        parts.append(f"loss {float(logs['loss']):.4f}")
    if "learning_rate" in logs:
        parts.append(f"lr {float(logs['learning_rate']):.1e}")
    if "pooling_share" in logs:
        parts.append(f"pooling share {logs['pooling_share']:.1%}".replace("%", " %"))
    speed = ("_runtime", "_per_second")
    parts += [
        f"{name.removeprefix('eval_')} {float(value):.4f}"
        for name, value in logs.items()
        if name.startswith("eval_") and not name.endswith(speed)
    ]
    return "  ".join(parts)
