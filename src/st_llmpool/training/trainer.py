"""The trainers: what both do beyond their base classes (stop at a loss that is not finite, resume exactly), and ours.

The trainer of masked tokens is in :mod:`st_llmpool.training.mntp.masked_next_token`.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, align_special_tokens
from transformers.utils import logging as hf_logging

from ..adapters import has_adapter
from ..model_card.card import card_without_forwards
from ..modules.errors import InputError, StLlmpoolError
from ..utils.files import reraise_as_write_error
from ..utils.random_state import preserve_rng_state
from .optimizers import refused_by_name
from .report import ElapsedTimeCallback, PoolingChange, RichProgress
from .run_folder import fault_of, last_checkpoint, load_trained_weights, seal_checkpoint

_ROWS = "rows_of_batch"
_SHOWN = 16
_LOWEST_SCALE = 1e-3  # of fp16's loss scaler, which starts at 65,536 and halves at each step that it skips


class TrainingError(StLlmpoolError, ArithmeticError):
    """A training diverged: its loss, gradients or weights are not finite."""


@dataclass
class _Step:
    """What is known of an optimizer step before anyone waits for its numbers."""

    number: int = 0
    losses: list[Tensor] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    failed: Tensor | None = None


class GuardedTrainer:
    """A mixin for a transformers ``Trainer``.

    Each optimizer step is checked on the device and read one step later (at once on a CPU, and before anything is
    saved), so a GPU is never waited for. All processes stop together.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for shown_by_us in (ProgressCallback, PrinterCallback):
            self.remove_callback(shown_by_us)
        for callback in (ElapsedTimeCallback(), RichProgress()):
            self.add_callback(callback)
        self.model_accepts_loss_kwargs = False  # losses are means of a batch: to be averaged over accumulated ones
        if self.processing_class is not None:  # as ``train`` does, which a finished run never calls
            verbosity = hf_logging.get_verbosity()
            hf_logging.set_verbosity_error()
            align_special_tokens(self.model, self.processing_class)
            hf_logging.set_verbosity(verbosity)

    @property
    def is_sharded(self: Any) -> bool:
        """Whether each process holds a part of the model, so that none can run it alone."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def restore_finished(self: Any, checkpoint: Path) -> bool:
        """Load weights and log of a run that had made its last step, after which ``train`` would make one more.

        Returns False, and loads nothing, if `checkpoint` is not of the last step.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if self.args.load_best_model_at_end:
            self._load_best_model()
        return True

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the optimizer."""
        with refused_by_name("training.optim", self.args.optim):
            return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Raises:
            TrainingError: If the loss, the gradients or the weights are not finite.
            WriteError: If a checkpoint cannot be written; the earlier ones are intact.
        """
        self._start_watching()
        try:
            result = super().train(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RichProgress):
                    callback.close()  # or the terminal keeps its bar, and no cursor
            raise
        self._check_weights()
        return result

    def _start_watching(self: Any) -> None:
        self._current, self._unread = _Step(), _Step()

    def get_train_dataloader(self: Any) -> Any:
        """Return batches that know their rows."""
        collator = self.data_collator
        vars(self)["data_collator"] = _WithRows(collator)
        try:
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            vars(self)["data_collator"] = collator

    def training_step(self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Compute loss and gradients of one batch."""
        self._current.rows += inputs.pop(_ROWS, [])
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._current.losses.append(loss)
        return loss

    def _get_grad_norm(self: Any, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        self._check_step(grad_norm)
        return grad_norm

    def _check_step(self: Any, grad_norm: Any) -> None:
        """Note whether the step that is about to be made is finite, and read the note of the one before."""
        step, self._current = self._current, _Step()
        step.number = self.state.global_step + 1
        numbers = torch.stack([loss.detach().float() for loss in step.losses])
        scaler = self.accelerator.scaler
        if scaler is None and grad_norm is not None:
            norm = torch.as_tensor(grad_norm, device=numbers.device)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            numbers = torch.cat([numbers, norm.detach().float().reshape(1)])
        failed = (~numbers.isfinite().all()).float()
        if scaler is not None and scaler.get_scale() < _LOWEST_SCALE:
            failed = torch.ones_like(failed)
        step.failed = self.accelerator.reduce(failed) if self.args.world_size > 1 else failed
        self._read()
        self._unread = step
        if step.failed.device.type == "cpu":
            self._read()

    def _read(self: Any) -> None:
        """Raise what was noted of the last step; wait for the device."""
        step, self._unread = self._unread, _Step()
        if step.failed is None or not step.failed.item():
            return
        losses, rows = [loss.item() for loss in step.losses], step.rows
        if self.args.world_size > 1:
            losses, rows = gather_object(losses), gather_object(rows)
        wrong = next((loss for loss in losses if not torch.isfinite(torch.tensor(loss))), None)
        what = "the gradients are not finite" if wrong is None else f"the loss is {wrong}"
        self._stop(f"Step {step.number}: {what}. Its batch: {self._describe(rows)}.")

    def _check_weights(self: Any) -> None:
        """Raise if a weight that trains is not finite, as a large step makes it with finite gradients."""
        self._read()
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        finite = [getattr(weight, "_local_tensor", weight).detach().isfinite().all() for weight in trained]
        failed = (~torch.stack(finite).all()).float()
        failed = self.accelerator.reduce(failed) if self.args.world_size > 1 else failed
        if failed.item():
            self._stop(f"Step {self.state.global_step}: the weights are not finite after it.")

    def _stop(self: Any, what: str) -> None:
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        kept = "No checkpoint was written before" if checkpoint is None else f"The last good checkpoint is {checkpoint}"
        raise TrainingError(
            f"{what} {kept}; no model is saved. Lower training.learning_rate or check these rows; use another folder."
        )

    def _describe(self: Any, keys: Sequence[int]) -> str:
        """Return the sets and row numbers of a batch, counted from 1, without their texts."""
        sets = self.train_dataset if isinstance(self.train_dataset, Mapping) else {"the training texts": None}
        described = []
        for name, data in sets.items():
            found = sorted(key + 1 for key in keys) if data is None else _row_numbers(data, set(keys))
            shown = ", ".join(map(str, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
            described += [f"rows {shown} of {name}"] if found else []
        return "; ".join(described) or "unknown rows"

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any = None) -> None:
        self._check_weights()
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        try:
            with reraise_as_write_error(folder):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                self.accelerator.wait_for_everyone()  # each process writes its own random state
                if self.args.should_save:
                    seal_checkpoint(folder)
        except Exception:
            if self.args.should_save:  # what was written of it takes the space that the next one needs
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_rng_state(self: Any, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()  # the first process writes its state next, which says that all is there

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        ending = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        if checkpoint is not None and not Path(checkpoint, f"rng_state{ending}.pth").is_file():
            set_seed(self.args.seed + self.state.global_step)  # of another number of processes: not the masks of step 1
            return
        super()._load_rng_state(checkpoint)  # type: ignore[misc]


class _WithRows:
    """Adds to each batch what identifies its rows: their number, or a checksum of their texts."""

    def __init__(self, collate: Callable[[Sequence[dict[str, Any]]], Mapping[str, Any]]) -> None:
        self.collate = collate
        self.valid_label_columns = getattr(collate, "valid_label_columns", None)  # sentence-transformers asks for them

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch with its rows."""
        keys = [int(row["row"]) if "row" in row else _checksum(row) for row in examples]
        return {**self.collate(examples), _ROWS: keys}


def _checksum(row: Mapping[str, Any]) -> int:
    texts = [text for name, text in row.items() if isinstance(text, str) and name != "dataset_name"]
    return zlib.crc32("\0".join(texts).encode("utf-8", "surrogatepass"))


def _row_numbers(data: Any, checksums: set[int]) -> list[int]:
    """Return the numbers, from 1, of the rows with these checksums; the texts are read once, after a failure only."""
    return [number for number, row in enumerate(data, start=1) if _checksum(row) in checksums]


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
