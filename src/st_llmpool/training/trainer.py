"""sentence-transformers' trainer with exact resuming and the pooling's effect in the log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from torch import nn
from transformers import TrainingArguments

from ..adapters import has_adapter
from ..model_card.card import card_without_forwards
from ..modules.errors import InputError
from ..utils.random_state import preserve_rng_state
from .checkpoints import fault_of, load_trained_weights
from .guarded_trainer import GuardedTrainer
from .pooling_change import PoolingChange


class EmbedderTrainer(GuardedTrainer, SentenceTransformerTrainer):
    """Trains an embedder; used as its base class is.

    Args:
        *args: As the base class.
        optimizer_class: Returns the class of an optimizer that transformers cannot name; None goes by the arguments.
        **kwargs: As the base class.
    """

    def __init__(
        self, *args: Any, optimizer_class: Callable[[], type[torch.optim.Optimizer]] | None = None, **kwargs: Any
    ) -> None:
        self._optimizer_class = optimizer_class
        super().__init__(*args, **kwargs)
        self.pooling_change = PoolingChange(self.model)

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Return the optimizer's class and arguments, among them the groups with their learning rates."""
        optimizer, options = super().get_optimizer_cls_and_kwargs(args, model)
        if self._optimizer_class is None:
            return optimizer, options
        return self._optimizer_class(), {name: options[name] for name in ("lr", "optimizer_dict")}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the pooling's effect next to each training loss."""
        if "loss" in logs and (change := self.pooling_change.pop_mean()) is not None:
            of_each_process = self.accelerator.gather(torch.tensor(change, device=self.accelerator.device))
            logs = {**logs, "pooling_share": of_each_process.mean().item()}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; data order and dropout afterwards are as if it had not happened."""
        with preserve_rng_state():
            return super().evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not (self.args.should_save or self.is_sharded):
            return  # transformers calls this on every process, and they would write the same files
        with card_without_forwards(self.model):  # of a checkpoint; the model at the end gets the full card
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        # The base class reads the model a second time, with the base unquantised, and fails on its shapes; and it does
        # not know our classes by the names that they are saved under.
        if has_adapter(self.model) or not any(weight.requires_grad for weight in self.model[0].parameters()):
            load_trained_weights(self.model, Path(checkpoint_path))
        else:
            trained: Any = getattr(self.model, "_orig_mod", self.model)
            classes = {f"{kind.__module__}.{kind.__name__}": kind for kind in map(type, trained)}
            trusted = trained.trust_remote_code
            loaded = type(trained)._load_with_module_classes(checkpoint_path, classes, trust_remote_code=trusted)
            trained.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        # The base class logs a failure to load and goes on with the last weights, as if they were the best.
        checkpoint = self.state.best_model_checkpoint
        if checkpoint is None:
            raise InputError(
                f"The best checkpoint, of step {self.state.best_global_step}, is gone: nothing to end with."
            )
        if fault := fault_of(Path(checkpoint)):
            raise InputError(
                f"The best checkpoint, {checkpoint}, is damaged: {fault}. Train again from an earlier one."
            )
        self.model.model_card_data.set_best_model_step(int(checkpoint.rpartition("-")[2]))
        self._load_from_checkpoint(checkpoint)
