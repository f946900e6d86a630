"""Measure how much a trained pooling changes the embedding, relative to the plain readout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: Below this relative change the pooling has no effect worth its cost.
NEGLIGIBLE = 0.01


def trainable_poolings(model: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the poolings of `model` that start from scratch.

    By a class attribute, since a model that was loaded from a repository runs the repository's copy of the class.
    """
    return [module for module in model if hasattr(module, "default_learning_rate")]


class PoolingChange:
    """Mean of ‖embedding − readout‖ / ‖readout‖ over the texts since the last reading.

    Args:
        model: The model; nothing is measured if it has no trainable pooling.

    Example:
        >>> from st_llmpool.modules import MultiLayerPooling
        >>> untrained = MultiLayerPooling(embedding_dimension=8, num_layers=1)
        >>> change = PoolingChange([untrained])
        >>> features = untrained({"layer_summaries": torch.ones(3, 1, 8), "readout": torch.ones(3, 8)})
        >>> change.pop_mean()
        0.0
    """

    def __init__(self, model: Iterable[nn.Module]) -> None:
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._hooks = [pooling.register_forward_hook(self._add) for pooling in trainable_poolings(model)]

    def pop_mean(self) -> float | None:
        """Return the mean and reset it; None if there was no forward pass in training mode."""
        if self._count == 0:
            return None
        mean = float(self._sum) / self._count
        self._sum, self._count = 0.0, 0
        return mean

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _add(self, pooling: nn.Module, inputs: Any, features: dict[str, Any]) -> None:
        if not pooling.training:  # evaluation has its own texts
            return
        with torch.no_grad():
            embedding, readout = (features[key].float() for key in ("sentence_embedding", "readout"))
            moved = (embedding - readout).norm(dim=1) / readout.norm(dim=1)
            self._sum = self._sum + moved.sum()  # a tensor: to wait for its value stalls a GPU
        self._count += len(features["sentence_embedding"])
