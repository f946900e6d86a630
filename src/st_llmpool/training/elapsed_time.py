"""Counts the seconds of a run across its resumptions."""

from __future__ import annotations

import time
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class ElapsedTimeCallback(TrainerCallback, ExportableState):
    """Tracks elapsed training time across resumes.

    Args:
        seconds: Time before the resume, which the checkpoint keeps.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts counting from where the checkpoint left off."""
        # The trainer brings callbacks back only for all or none of them, so this one helps itself.
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get("ElapsedTimeCallback")
        if not self.seconds and saved:
            self.seconds = saved["attributes"]["seconds"]
        self._last = time.monotonic()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Adds the time since the last step."""
        now = time.monotonic()
        self.seconds += now - self._last
        self._last = now

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}


def seconds_of(trainer: Trainer) -> float:
    """Returns the seconds of a trainer's run; from its checkpoint, if it had nothing left to train."""
    counted = next(
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ElapsedTimeCallback)
    )
    callbacks: Any = trainer.state.stateful_callbacks or {}
    return counted.seconds or callbacks.get("ElapsedTimeCallback", {}).get("attributes", {"seconds": 0.0})["seconds"]
