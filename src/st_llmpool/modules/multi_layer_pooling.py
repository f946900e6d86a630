"""Multi-layer trainable pooling: a cross-attention over one summary per layer of the backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        layer_norm: X = LN(S) + W: layers differ in scale, and a W that is small beside all of them cannot act.
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

    config_keys = [*CrossAttentionPooling.config_keys, "num_layers", "layer_weights", "layer_norm"]

    def __init__(
        self,
        embedding_dimension: int,
        num_layers: int,
        *,
        layer_weights: bool = True,
        layer_norm: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(embedding_dimension, **settings)
        check_sizes(embedding_dimension=embedding_dimension, num_layers=num_layers)
        for name, value in {"layer_weights": layer_weights, "layer_norm": layer_norm}.items():
            check_choice(name, value, (True, False))
        self.num_layers, self.layer_weights, self.layer_norm = num_layers, layer_weights, layer_norm
        if layer_weights:  # at the scale of LN(S); else small, as some backbones' activations are
            scale = 1.0 if layer_norm else settings.get("init_std", 0.02)
            self.layer_table = nn.Parameter(torch.randn(num_layers, embedding_dimension) * scale)

    def pool(self, features: dict[str, Any]) -> Tensor:
        """Return the embeddings (B, D)."""
        summaries = self.layer_summaries(features, self.num_layers)
        rows = F.layer_norm(summaries.float(), summaries.shape[-1:]) if self.layer_norm else summaries.float()
        rows = rows + self.layer_table if self.layer_weights else rows
        return self.embeddings_from(features, self.cross_attention(rows), dtype=summaries.dtype)
