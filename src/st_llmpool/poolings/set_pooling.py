"""What the poolings over a set of vectors share: the set is a text's tokens, or the summaries of its layers."""

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
    """Base of poolings that turn K vectors into one: a subclass says in ``pool_set`` how.

    With ``reads="tokens"`` the vectors are the real tokens of the last layer. With ``reads="layers"`` they are the
    summaries of the chosen layers, first layer first, each layer-normalised without affine, so that layers of
    different scale can be compared (as in :class:`ScalarMixPooling`). By default embedding = r + U · pooled, where r
    is the plain readout of the last layer and U starts at zero: an untrained module gives exactly r.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        reads: ``"tokens"`` or ``"layers"``.
        num_layers: How many layers L the backbone hands over; for ``reads="layers"`` only.
        readout_skip: False leaves r out: embedding = pooled.
        pooled_dimension: P, where it is not D or the method ends in a projection: U is (D, P) then, and stays
            without the skip.

    Raises:
        ConfigurationError: If a setting is unknown, missing or not positive, or the features do not fit.

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
        pooled_dimension: int | None = None,
    ) -> None:
        super().__init__(embedding_dimension, readout_skip=readout_skip)
        _check_reads(reads, num_layers)
        self.reads = reads
        self.num_layers = num_layers
        if readout_skip:
            self.to_embedding = zero_linear(pooled_dimension or embedding_dimension, embedding_dimension)
        elif pooled_dimension is not None:
            self.to_embedding = nn.Linear(pooled_dimension, embedding_dimension, bias=False)

    @abstractmethod
    def pool_set(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Pools the real vectors.

        Args:
            vectors: (B, K, D) in float32, zero where `mask` is False.
            mask: (B, K), bool, True for the real ones: at least one in every row.

        Returns:
            (B, P) in float32.
        """

    def pool(self, features: dict[str, Any]) -> Tensor:
        """Returns the embeddings (B, D)."""
        vectors, mask, dtype = self.read(features)
        return self.embeddings_from(features, self.pool_set(vectors, mask), dtype=dtype)

    def read(self, features: dict[str, Any]) -> tuple[Tensor, Tensor, torch.dtype]:
        """Returns vectors and mask as ``pool_set`` takes them, and the dtype that the vectors had."""
        if self.num_layers is not None:
            summaries = self.layer_summaries(features, self.num_layers)
            mask = torch.ones(summaries.shape[:2], dtype=torch.bool, device=summaries.device)
            return F.layer_norm(summaries.float(), (self.embedding_dimension,)), mask, summaries.dtype
        tokens, mask = self.tokens(features)
        return tokens.float().masked_fill(~mask.unsqueeze(-1), 0.0), mask, tokens.dtype


def masked_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over the real vectors.

    Args:
        vectors: (B, K, D), finite where `mask` is False.
        mask: (B, K), bool.

    Returns:
        (B, D).

    Example:
        >>> masked_mean(torch.tensor([[[2.0], [4.0], [7.0]]]), torch.tensor([[True, True, False]]))
        tensor([[3.]])
    """
    weights = mask.to(vectors.dtype) / mask.sum(dim=1, keepdim=True)
    return torch.einsum("bk,bkd->bd", weights, vectors)


def _check_reads(reads: str, num_layers: int | None) -> None:
    check_choice("reads", reads, ("tokens", "layers"))
    if reads == "layers":
        check_sizes(num_layers=num_layers)
    elif num_layers is not None:
        raise ConfigurationError(
            f"num_layers={reprlib.repr(num_layers)} does not apply to reads='tokens'. Use reads='layers'."
        )
