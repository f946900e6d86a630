"""How many masked tokens of held-out text a model finds, and how many are found without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from .masked_next_token import masked_logits, masked_loss
from .masked_texts import Example, collate
from .masking import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class MaskedScore:
    """What a model makes of masked tokens.

    Attributes:
        accuracy: Share of them that it finds.
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
    """Predicts the masked tokens of `examples`, each from the hidden state one position before it.

    Args:
        model: The language model, as it attends now; its training mode is kept.
        examples: ``input_ids`` (T,) and ``labels`` (T,).
        batch_size: Texts at a time.
        unmasked: Let it read the texts without masks: what a causal model does. Of a bidirectional model that would
            say nothing, since it sees the token it is to predict.
    """
    head, was_training, device = model.get_output_embeddings(), model.training, model.device
    model.eval()
    found, loss, tokens = 0, 0.0, 0
    for batch in _batches(examples, batch_size):
        if unmasked:
            batch["input_ids"] = torch.where(batch["labels"] == IGNORE, batch["input_ids"], batch["labels"])
        logits, targets = masked_logits(model, head, **{name: tensor.to(device) for name, tensor in batch.items()})
        found += int((logits.argmax(dim=-1) == targets).sum())
        loss += float(masked_loss(logits, targets))
        tokens += len(targets)
    model.train(was_training)
    return MaskedScore(found / tokens, loss / tokens, tokens)


def most_frequent_token(pieces: Dataset) -> int:
    """Returns the token that is most frequent in `pieces`, special ones aside; of equally frequent ones the first.

    Args:
        pieces: Columns ``input_ids`` and ``special``.

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
    """Returns the share of the masked tokens of `examples` that are `token`: what a guess without context finds."""
    labels = torch.cat([example["labels"][example["labels"] != IGNORE] for example in examples])
    return float((labels == token).float().mean())


def accuracy_table(report: Mapping[str, Any]) -> Table:
    """Returns ``masked_accuracy`` of an adaptation's ``training.json`` for reading.

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
        "causal": "the base, causal, from the whole text before each",
        "no_context": "always the most frequent token",
    }
    for key, meaning in rows.items():
        table.add_row(meaning, f"{report['masked_accuracy'][key]:.1%}".replace("%", " %"))
    return table


def _batches(examples: Sequence[Example], batch_size: int) -> Iterator[dict[str, Tensor]]:
    by_length = sorted(examples, key=lambda example: len(example["input_ids"]))  # little padding
    for start in range(0, len(by_length), batch_size):
        yield collate(by_length[start : start + batch_size])
