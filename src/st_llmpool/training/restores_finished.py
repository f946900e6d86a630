"""Lets a trainer seal its checkpoints, and take over a run that was killed between its last step and its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoint_seal import seal_checkpoint


class RestoresFinished:
    """A mixin for a trainer."""

    def restore_finished(self: Any, checkpoint: Path) -> bool:
        """Takes over the weights and the log of a run that had made its last step; False if it had not.

        ``train`` would make one step more before it noticed.

        Args:
            checkpoint: The last one of the run.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end:
            self._load_best_model()
        return True

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any = None) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            seal_checkpoint(Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
