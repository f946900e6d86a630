"""A trained linear map of the plain readout: the control for what parameters alone add to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..modules.trainable_pooling import TrainablePooling, zero_linear


class LinearPooling(TrainablePooling):
    """Adds a linear map of the last layer's plain readout r to it: embedding = r + U · r; U (D, D) starts at zero.

    Args:
        embedding_dimension: Hidden size D of the backbone.

    Raises:
        ConfigurationError: If the size is not a positive integer, or the features do not fit.

    Inputs:
        ``readout`` (B, D) in any float dtype.

    Outputs:
        ``sentence_embedding`` (B, D) in its dtype.

    Example:
        >>> import torch
        >>> pooling, readout = LinearPooling(embedding_dimension=4), torch.randn(2, 4)
        >>> bool((pooling({"readout": readout})["sentence_embedding"] == readout).all())
        True
    """

    config_keys = ["embedding_dimension"]

    def __init__(self, embedding_dimension: int) -> None:
        super().__init__(embedding_dimension, readout_skip=True)
        self.to_embedding = zero_linear(embedding_dimension, embedding_dimension)

    def pool(self, features: dict[str, Any]) -> Tensor:
        """Return the embeddings (B, D)."""
        readout = self._require(features, "readout")
        return self.embeddings_from(features, readout.float(), dtype=readout.dtype)
