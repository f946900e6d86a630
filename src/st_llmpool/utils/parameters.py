"""Counts a model's parameters by where they belong, and what identifies a model: weights, config, tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
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


def hash_weights(model: nn.Module, digest: Any) -> None:
    """Add names, types and values of a model's weights to a digest of ``hashlib``."""
    for name, tensor in sorted(model.state_dict().items()):  # loading may register them in another order
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def config_values(config: Any) -> dict[str, Any]:
    """Return what a transformers config says of a model, without where it is and which version wrote it."""
    values = config.to_dict() if hasattr(config, "to_dict") else {"config": str(config)}
    return {key: values[key] for key in values.keys() - {"_name_or_path", "transformers_version"}}


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Return what makes a tokenizer's ids, without the truncation and padding of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    state = json.loads(backend.to_str()) if hasattr(backend, "to_str") else {"repr": repr(backend)}
    return {key: state[key] for key in state.keys() - {"truncation", "padding"}}
