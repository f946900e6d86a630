"""The base of poolings over a set of vectors: a text's tokens, or the summaries of its layers."""

from __future__ import annotations

import reprlib
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules.errors import ConfigurationError, check_choice
from ..modules.trainable_pooling import TrainablePooling, check_sizes, zero_linear


class SetPooling(TrainablePooling):
    """Base of poolings that turn K vectors into one, as a subclass defines in ``pool_set``.

    With ``reads="tokens"`` the vectors are the real tokens of the last layer. With ``reads="layers"`` they are the
    summaries of the chosen layers, first layer first, each layer-normalised without affine, so that layers of
    different scale can be compared (as in :class:`ScalarMixPooling`). By default embedding = r + U · pooled, where r
    is the plain readout of the last layer and U starts at zero: an untrained module gives exactly r.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        reads: ``"tokens"`` or ``"layers"``.
        num_layers: Number of layers L that the backbone gives; for ``reads="layers"`` only.
        readout_skip: False: embedding = pooled.

    Raises:
        ConfigurationError: If a setting is unknown, missing or out of range, or the features do not fit.

    Inputs:
        For tokens: ``token_embeddings`` (B, T, D) and ``attention_mask`` (B, T) with padding on any side, nonzero for
        the tokens to pool, at least one in every row; or flat ``token_embeddings`` (1, N, D) and ``cu_seq_lens_q``
        (B + 1,). For layers: ``layer_summaries`` (B, L, D). ``readout`` (B, D) for the skip. Any float dtype.

    Outputs:
        ``sentence_embedding`` (B, D) in the readout's dtype, or the vectors' without the skip. Padding has no effect
        on it, whatever it holds, and gets no gradient.

    Example:
        >>> class MaxPooling(SetPooling):
        ...     def pool_set(self, vectors, mask):
        ...         return vectors.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)
        >>> pooling = MaxPooling(2, readout_skip=False)
        >>> tokens, mask = torch.tensor([[[1.0, 5.0], [3.0, 2.0], [9.0, 9.0]]]), torch.tensor([[1, 1, 0]])
        >>> pooling({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"]
        tensor([[3., 5.]])
    """

    config_keys = ["embedding_dimension", "reads", "num_layers", "readout_skip"]

    def __init__(
        self,
        embedding_dimension: int,
        *,
        reads: Literal["tokens", "layers"] = "tokens",
        num_layers: int | None = None,
        readout_skip: bool = True,
    ) -> None:
        super().__init__(embedding_dimension, readout_skip=readout_skip)
        check_choice("reads", reads, ("tokens", "layers"))
        if reads == "layers":
            check_sizes(num_layers=num_layers)
        elif num_layers is not None:
            shown = reprlib.repr(num_layers)
            raise ConfigurationError(f"num_layers={shown} does not apply to reads='tokens'. Use reads='layers'.")
        self.reads = reads
        self.num_layers = num_layers
        if readout_skip:
            self.to_embedding = zero_linear(embedding_dimension, embedding_dimension)

    def project_from(self, pooled_dimension: int) -> None:
        """Make U (D, P) for a method that gives P values; without the skip it is trained from a random start."""
        linear = nn.Linear(pooled_dimension, self.embedding_dimension, bias=False)
        self.to_embedding = zero_linear(pooled_dimension, self.embedding_dimension) if self.readout_skip else linear

    @abstractmethod
    def pool_set(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Pool vectors (B, K, D) in float32 to (B, P); `mask` (B, K) is True for real ones, the others are zero."""

    def pool(self, features: dict[str, Any]) -> Tensor:
        """Return the embeddings (B, D)."""
        vectors, mask, dtype = self.read(features)
        return self.embeddings_from(features, self.pool_set(vectors, mask), dtype=dtype)

    def read(self, features: dict[str, Any]) -> tuple[Tensor, Tensor, torch.dtype]:
        """Return vectors and mask as ``pool_set`` takes them, and the dtype that the vectors had."""
        if self.num_layers is not None:
            summaries = self.layer_summaries(features, self.num_layers)
            mask = torch.ones(summaries.shape[:2], dtype=torch.bool, device=summaries.device)
            return F.layer_norm(summaries.float(), (self.embedding_dimension,)), mask, summaries.dtype
        tokens, mask = self.tokens(features)
        return tokens.float().masked_fill(~mask.unsqueeze(-1), 0.0), mask, tokens.dtype


def masked_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the real vectors, (B, D) from (B, K, D); `mask` is (B, K).

    Example:
        >>> masked_mean(torch.tensor([[[2.0], [4.0], [7.0]]]), torch.tensor([[True, True, False]]))
        tensor([[3.]])
    """
    weights = mask.to(vectors.dtype) / mask.sum(dim=1, keepdim=True)
    return torch.einsum("bk,bkd->bd", weights, vectors)
