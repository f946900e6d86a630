"""Multi-layer trainable pooling: a cross-attention over one summary per layer of the backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cross_attention import CrossAttentionPooling
from .trainable_pooling import check_boolean, check_sizes


class MultiLayerPooling(CrossAttentionPooling):
    """Pools the layers of a text: trainable layer weights are added to the layers' summaries, latents attend to them.

    With the summaries S (L, D) of a text, X = S + W with trainable layer weights W (L, D); then the block of
    :class:`CrossAttention` over the L rows of X (Tang & Yang 2024, arXiv 2409.02727 §3.2); then, by default,
    embedding = r + U · pooled with the plain readout r of the last layer. U starts at zero: an untrained module
    gives exactly r.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        num_layers: How many layers L the backbone hands over, ``len(LLMTransformer.layers)``.
        layer_weights: False leaves W out, for ablations.
        **settings: Sizes, ``queries`` and ``readout_skip``, as :class:`CrossAttentionPooling` takes them; with
            ``queries="inputs"`` the layers query the latents.

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
        check_boolean("layer_weights", layer_weights)
        self.num_layers = num_layers
        self.layer_weights = layer_weights
        if layer_weights:
            # Small, so that an untrained table does not drown the summaries of a backbone with small activations.
            self.layer_table = nn.Parameter(torch.randn(num_layers, embedding_dimension) * 0.02)

    def pool(self, features: dict[str, Any]) -> Tensor:
        """Returns the embeddings (B, D)."""
        summaries = self.layer_summaries(features, self.num_layers)
        pooled = self.cross_attention(self._with_weights(summaries))
        return self.embeddings_from(features, pooled, dtype=summaries.dtype)

    def layer_shares(self, features: dict[str, Any]) -> Tensor | None:
        """Returns the latents' attention to each layer, averaged over latents and heads, (B, L).

        None with ``queries="inputs"``, where the layers attend to the latents and all count alike.
        """
        if self.queries == "inputs":
            return None
        summaries = self.layer_summaries(features, self.num_layers)
        return self.cross_attention.weights(self._with_weights(summaries)).mean(dim=(2, 3))

    def _with_weights(self, summaries: Tensor) -> Tensor:
        return summaries.float() + self.layer_table if self.layer_weights else summaries
