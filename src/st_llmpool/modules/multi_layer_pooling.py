"""Multi-layer trainable pooling: a cross-attention over one summary per layer of the backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cross_attention import CrossAttentionPooling
from .errors import check_choice
from .trainable_pooling import check_sizes


class MultiLayerPooling(CrossAttentionPooling):
    """Pools the layers of a text by :class:`CrossAttention` over X = S + W (Tang & Yang 2024, arXiv 2409.02727 §3.2).

    S (L, D) are the summaries of the layers, W (L, D) trainable layer weights. By default embedding = r + U · pooled,
    which is r, the plain readout of the last layer, until U is trained.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        num_layers: How many layers L the backbone hands over, ``len(LLMTransformer.layers)``.
        layer_weights: False leaves W out, for ablations.
        **settings: As :class:`CrossAttentionPooling`; with ``queries="inputs"`` the layers query the latents.

    Raises:
        ConfigurationError: If a setting is unknown, missing or out of range, or the features do not fit.

    Inputs:
        ``layer_summaries`` (B, L, D), and ``readout`` (B, D) for the skip, in any float dtype.

    Outputs:
        ``sentence_embedding`` (B, D) in the readout's dtype, or the summaries' without the skip.

    Example:
        >>> pooling = MultiLayerPooling(embedding_dimension=16, num_layers=3)
        >>> features = {"layer_summaries": torch.randn(2, 3, 16), "readout": torch.randn(2, 16)}
        >>> bool((pooling(features)["sentence_embedding"] == features["readout"]).all())
        True
    """

    config_keys = [*CrossAttentionPooling.config_keys, "num_layers", "layer_weights"]

    def __init__(
        self, embedding_dimension: int, num_layers: int, *, layer_weights: bool = True, **settings: Any
    ) -> None:
        super().__init__(embedding_dimension, **settings)
        check_sizes(embedding_dimension=embedding_dimension, num_layers=num_layers)
        check_choice("layer_weights", layer_weights, (True, False))
        self.num_layers = num_layers
        self.layer_weights = layer_weights
        if layer_weights:
            # Small, so that an untrained table does not drown the summaries of a backbone with small activations.
            self.layer_table = nn.Parameter(torch.randn(num_layers, embedding_dimension) * 0.02)

    def pool(self, features: dict[str, Any]) -> Tensor:
        """Return the embeddings (B, D)."""
        summaries = self.layer_summaries(features, self.num_layers)
        rows = summaries.float() + self.layer_table if self.layer_weights else summaries
        return self.embeddings_from(features, self.cross_attention(rows), dtype=summaries.dtype)
