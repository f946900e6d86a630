"""Scalar mix: one trainable weight per layer, the control for what cross-attention adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .trainable_pooling import TrainablePooling, check_sizes


class ScalarMixPooling(TrainablePooling):
    """Weighs the layers of a text: ``γ Σ_l softmax(w)_l LN(s_l)`` (ELMo, Peters et al. 2018, arXiv 1802.05365, eq. 1).

    LN is layer normalisation without affine parameters, so that layers of different scale can be compared. The w
    start equal and γ at 1: an untrained module is the mean of the normalised layers.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        num_layers: How many layers L the backbone hands over, ``len(LLMTransformer.layers)``.

    Raises:
        ConfigurationError: If a size is not a positive integer, or the features do not fit.

    Inputs:
        ``layer_summaries`` (B, L, D) in any float dtype.

    Outputs:
        ``sentence_embedding`` (B, D) in the summaries' dtype.

    Example:
        >>> pooling = ScalarMixPooling(embedding_dimension=2, num_layers=2)
        >>> features = {"layer_summaries": torch.tensor([[[1.0, 3.0], [20.0, 40.0]]])}
        >>> pooling(features)["sentence_embedding"].detach().round()
        tensor([[-1.,  1.]])
    """

    config_keys = ["embedding_dimension", "num_layers"]

    def __init__(self, embedding_dimension: int, num_layers: int) -> None:
        super().__init__(embedding_dimension)
        check_sizes(num_layers=num_layers)
        self.num_layers = num_layers
        self.layer_scores = nn.Parameter(torch.zeros(num_layers))
        self.gamma = nn.Parameter(torch.ones(1))  # not a scalar: FSDP2 shards no zero-dimensional tensors

    def pool(self, features: dict[str, Any]) -> Tensor:
        """Return the embeddings (B, D)."""
        summaries = self.layer_summaries(features, self.num_layers)
        normed = F.layer_norm(summaries.float(), (self.embedding_dimension,))
        mixed = (self.layer_scores.softmax(dim=0).unsqueeze(-1) * normed).sum(dim=1)
        return (self.gamma * mixed).to(summaries.dtype)
