"""Counts a model's parameters by where they belong."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sentence_transformers import SentenceTransformer
from torch import nn

#: Parts of the names of weights that an adapter adds.
_OF_ADAPTERS = ("lora_", ".modules_to_save.", ".trainable_tokens_")


def count_weights(parameters: Iterable[nn.Parameter]) -> int:
    """Return the number of weights; in 4 bits, two or more lie in one number of a parameter."""

    def count(parameter: nn.Parameter) -> int:
        state = getattr(parameter, "quant_state", None)
        return parameter.numel() if state is None else math.prod(state.shape)

    return sum(map(count, parameters))


def count_parameters(model: SentenceTransformer) -> dict[str, int]:
    """Return the weights of ``backbone``, ``adapter`` and ``pooling`` (all modules after the first)."""
    first, *others = list(model)
    named = first.named_parameters()
    adapter = count_weights(weight for name, weight in named if any(part in name for part in _OF_ADAPTERS))
    return {
        "backbone": count_weights(first.parameters()) - adapter,
        "adapter": adapter,
        "pooling": sum(count_weights(module.parameters()) for module in others),
    }
