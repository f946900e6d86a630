"""Masked next-token prediction: its loss, its trainer, and its accuracy on held-out text with the baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer

from ...modules.errors import ConfigurationError
from ...utils.random_state import preserve_rng_state
from ..trainer import GuardedTrainer
from .masked_texts import IGNORE, Example, collate

if TYPE_CHECKING:
    from datasets import Dataset


def masked_logits(
    model: nn.Module, head: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the model predicts for the masked tokens, and for no others.

    A decoder's head reads position t to predict the token at t + 1. The masked token at t is therefore predicted from
    the hidden state at t - 1 (MNTP, BehnamGhader et al. 2024, arXiv 2404.05961, section 2.1), and the logits are
    ``head(h_{t-1})``. The hidden states are chosen before the head reads them, so that memory is M × V and not
    B × T × V; what a model does with its logits afterwards (soft-capping, scaling) still happens.

    Args:
        model: A causal language model, also wrapped by PEFT or DDP.
        head: The module inside it that turns hidden states into logits, ``get_output_embeddings()``.
        input_ids: (B, T).
        attention_mask: (B, T), padding on either side.
        labels: (B, T), the token where one is masked and -100 elsewhere; never a text's first real token.

    Returns:
        Logits (M, V) of the masked tokens, text by text, and their labels (M,).

    Raises:
        ConfigurationError: If the model computes its logits without calling its head.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=9)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> ids, labels = torch.tensor([[3, 8, 5, 8]]), torch.tensor([[-100, 4, -100, 6]])
        >>> logits, targets = masked_logits(model, model.get_output_embeddings(), ids, torch.ones_like(ids), labels)
        >>> logits.shape, targets
        (torch.Size([2, 9]), tensor([4, 6]))
    """
    rows, places = (labels != IGNORE).nonzero(as_tuple=True)
    with _only(head, rows, places - 1):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    if logits.shape[:2] != (1, len(rows)):
        raise ConfigurationError(
            f"{type(model).__name__} gives logits of shape {tuple(logits.shape)} for {len(rows)} masked tokens: it "
            f"does not call its head on hidden states (B, T, D). Use another base."
        )
    return logits[0], labels[rows, places]


def masked_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of logits (M, V) and targets (M,), in float32 at least."""
    return nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum"
    )


@dataclass(frozen=True)
class MaskedScore:
    """Prediction of masked tokens.

    Attributes:
        accuracy: Fraction that is predicted right.
        loss: Mean cross-entropy in nats.
        tokens: Their number.
    """

    accuracy: float
    loss: float
    tokens: int


@torch.no_grad()
def masked_score(
    model: PreTrainedModel, examples: Sequence[Example], *, batch_size: int, unmasked: bool = False
) -> MaskedScore:
    """Predict the masked tokens of `examples`, each from the hidden state one position before it.

    Args:
        model: The language model, as it attends now; its training mode is kept.
        examples: ``input_ids`` (T,) and ``labels`` (T,).
        batch_size: Batch size.
        unmasked: Read the texts without masks, as a causal model does. Not for a bidirectional one, which would see
            the token that it is to predict.
    """
    head, was_training, device = model.get_output_embeddings(), model.training, model.device
    model.eval()
    found, loss, tokens = 0, 0.0, 0
    by_length = sorted(examples, key=lambda example: len(example["input_ids"]))  # little padding
    for start in range(0, len(by_length), batch_size):
        batch = collate(by_length[start : start + batch_size])
        if unmasked:
            batch["input_ids"] = torch.where(batch["labels"] == IGNORE, batch["input_ids"], batch["labels"])
        logits, targets = masked_logits(model, head, **{name: tensor.to(device) for name, tensor in batch.items()})
        found += int((logits.argmax(dim=-1) == targets).sum())
        loss += float(masked_loss(logits, targets))
        tokens += len(targets)
    model.train(was_training)
    return MaskedScore(found / tokens, loss / tokens, tokens)


def most_frequent_token(pieces: Dataset) -> int:
    """Return the token that is most frequent in `pieces`, without special ones; of equally frequent ones the first.

    Example:
        >>> from datasets import Dataset
        >>> most_frequent_token(Dataset.from_dict({"input_ids": [[7, 5, 5], [7, 7]], "special": [[1, 0, 0], [1, 0]]}))
        5
    """
    counts = torch.zeros(0, dtype=torch.long)
    for rows in pieces.with_format(None).iter(batch_size=1000):
        flat = zip(rows["input_ids"], rows["special"], strict=True)
        ids = torch.tensor([i for text, special in flat for i, s in zip(text, special, strict=True) if s == 0])
        more = torch.bincount(ids.long(), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return int(counts.argmax())


def constant_accuracy(examples: Sequence[Example], token: int) -> float:
    """Return the accuracy of always predicting `token`, a baseline without context."""
    labels = torch.cat([example["labels"][example["labels"] != IGNORE] for example in examples])
    return float((labels == token).float().mean())


def accuracy_table(report: Mapping[str, Any]) -> Table:
    """Return ``masked_accuracy`` of an adaptation's ``training.json`` for reading.

    Example:
        >>> accuracy = {"adapted": 0.3, "base": 0.1, "causal": 0.2, "no_context": 0.05}
        >>> accuracy_table({"masked_accuracy": accuracy, "masked_tokens": 100}).row_count
        4
    """
    table = Table("", title=f"{report['masked_tokens']:,} masked tokens of held-out text")
    table.add_column("found", justify="right")
    rows = {
        "adapted": "adapted, from the masked text",
        "base": "the base, from the masked text with the same attention",
        "causal": "the base, causal, from the text before each",
        "no_context": "always the most frequent token",
    }
    for key, meaning in rows.items():
        table.add_row(meaning, f"{report['masked_accuracy'][key]:.1%}".replace("%", " %"))
    return table


@contextmanager
def _only(head: nn.Module, rows: Tensor, places: Tensor) -> Iterator[None]:
    """Make `head` read hidden states (1, M, D), those of `places` (M,) in `rows` (M,), instead of (B, T, D)."""

    def choose(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][rows, places].unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


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
