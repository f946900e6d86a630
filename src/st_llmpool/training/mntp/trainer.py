"""transformers' trainer with the loss of masked next-token prediction."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from ...utils.random_state import preserve_rng_state
from ..guarded_trainer import GuardedTrainer
from .masked_next_token import masked_logits, masked_loss, masked_score


class MaskedTokenTrainer(GuardedTrainer, Trainer):
    """Trains a causal language model on :class:`MaskedTexts`; used as its base class is.

    The evaluation set is a sequence of examples, and its metrics are the accuracy on the masked tokens and
    their mean loss.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss of the masked tokens, those of all processes together."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        logits, targets = masked_logits(model, head, **inputs)
        count = torch.tensor(len(targets), device=logits.device)
        # Gradients are averaged over processes, but texts differ in length: each token counts equally.
        scale = self.accelerator.num_processes / self.accelerator.reduce(count)
        loss = masked_loss(logits, targets) * scale
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure on the evaluation set; what is drawn afterwards is as if it had not happened."""
        model, examples = cast("Any", self.model), cast("Any", self.eval_dataset)
        with preserve_rng_state():
            score = masked_score(model, examples, batch_size=self.args.per_device_eval_batch_size)
        metrics = {"eval_masked_accuracy": score.accuracy, "eval_masked_loss": score.loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        # The data are in a random order already, one that does not depend on any generator's state.
        texts: Any = self.train_dataset
        return SequentialSampler(texts)
