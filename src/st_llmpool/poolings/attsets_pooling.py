"""AttSets: every feature of every vector gets a weight of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..modules.trainable_pooling import zero_linear
from .set_pooling import SetPooling


class AttSetsPooling(SetPooling):
    """Pools a set by attention for each feature (AttSets, Yang et al. 2018, arXiv 1808.00758, eq. 2 to 4).

    For the vectors x_k (D) of a text: scores ``c_k = W x_k`` with one matrix W (D, D); for each feature d one softmax
    over the vectors, ``s_kd = exp(c_kd) / Σ_j exp(c_jd)``; ``y_d = Σ_k s_kd x_kd``. A bias would cancel in the
    softmax. W starts at zero, where y is the mean.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        **settings: As :class:`SetPooling`; the paper has ``readout_skip=False``.

    Raises, Inputs, Outputs:
        As :class:`SetPooling`.

    Example:
        >>> pooling = AttSetsPooling(embedding_dimension=2, readout_skip=False)
        >>> tokens, mask = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]]]), torch.tensor([[1, 1, 0]])
        >>> pooling({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"].detach()
        tensor([[2., 4.]])
    """

    def __init__(self, embedding_dimension: int, **settings: Any) -> None:
        super().__init__(embedding_dimension, **settings)
        self.to_scores = zero_linear(embedding_dimension, embedding_dimension)

    def pool_set(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return y (B, D)."""
        scores = self.to_scores(vectors).masked_fill(~mask.unsqueeze(-1), -torch.inf)
        return (scores.softmax(dim=1) * vectors).sum(dim=1)
