"""PoNet pooling: every token is mixed with its text, segment and neighbours before the mean is taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules.errors import ConfigurationError
from ..modules.layer_readout import unflatten
from ..modules.trainable_pooling import TrainablePooling, check_sizes, zero_linear
from .set_pooling import masked_mean


class PoNetPooling(TrainablePooling):
    """Pools tokens after mixing them at three ranges (PoNet, Tan et al. 2021, arXiv 2110.02442, §3).

    Six projections of the tokens x_t, ``h* = W* x + b*`` for * = q, k, v, s, l, o, over the K real tokens of a text:

    * global: ``g = 1/K Σ_t hq_t``, then ``g' = Σ_t softmax_t(g · hk_t / √d) hv_t`` in each of H heads of size d;
    * segment: ``S_t = max hs`` over the tokens of t's segment, feature by feature;
    * local: ``L_t = max(hl_{t-1}, hl_t, hl_{t+1})``, feature by feature, of those that the text has;
    * fusion: ``P_t = g' ∘ ho_t + S_t ∘ ho_t + L_t``, and pooled is the mean of P_t over the text.

    A segment is `segment_length` tokens from the text's first on, or a sentence if the features say where sentences
    start. By default embedding = r + U · pooled, as in :class:`SetPooling`.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        num_heads: H, a divisor of D.
        segment_length: Tokens in a segment.
        readout_skip: False: embedding = pooled.

    Raises:
        ConfigurationError: If a setting is not positive or does not fit, or the features do not fit.

    Inputs:
        As :class:`LatentAttentionPooling`, and ``sentence_starts`` if there are boundaries: (B, T), or (1, N) if flat,
        nonzero at the first token of each sentence.

    Outputs:
        As :class:`LatentAttentionPooling`.

    Example:
        >>> pooling = PoNetPooling(embedding_dimension=16, readout_skip=False)
        >>> tokens, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
        >>> pooling({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"].shape
        torch.Size([2, 16])
    """

    config_keys = ["embedding_dimension", "num_heads", "segment_length", "readout_skip"]

    def __init__(
        self, embedding_dimension: int, *, num_heads: int = 8, segment_length: int = 16, readout_skip: bool = True
    ) -> None:
        super().__init__(embedding_dimension, readout_skip=readout_skip)
        check_sizes(num_heads=num_heads)
        check_sizes(segment_length=segment_length)
        check_sizes(embedding_dimension=embedding_dimension, inputs=embedding_dimension, parts=6)
        if embedding_dimension % num_heads:
            unfit = f"num_heads={num_heads} does not divide embedding_dimension={embedding_dimension}"
            raise ConfigurationError(f"{unfit}. Use a divisor, such as 1.")
        self.num_heads = num_heads
        self.segment_length = segment_length
        self.to_parts = nn.Linear(embedding_dimension, 6 * embedding_dimension)
        if readout_skip:
            self.to_embedding = zero_linear(embedding_dimension, embedding_dimension)

    def pool(self, features: dict[str, Any]) -> Tensor:
        """Return the embeddings (B, D)."""
        tokens, mask = self.tokens(features)
        pooled = self._mix(tokens.float().masked_fill(~mask.unsqueeze(-1), 0.0), mask, self._segments(features, mask))
        return self.embeddings_from(features, pooled, dtype=tokens.dtype)

    def _segments(self, features: dict[str, Any], mask: Tensor) -> Tensor:
        """Return the number of each token's segment (B, T), from 0 to T."""
        starts = features.get("sentence_starts")
        if starts is None:
            return (mask.long().cumsum(dim=1) - 1).clamp(min=0) // self.segment_length
        if "cu_seq_lens_q" in features:
            starts, _ = unflatten(starts, features["cu_seq_lens_q"])
        return (starts != 0).long().cumsum(dim=1)

    def _mix(self, tokens: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
        """Return the mean of P (B, D)."""
        queries, keys, values, segment, local, fusion = self.to_parts(tokens).chunk(6, dim=-1)
        whole = self._attend(masked_mean(queries, mask), keys, values, mask).unsqueeze(1)
        fused = (whole + _segment_max(segment, segments, mask)) * fusion + _neighbour_max(local, mask)
        return masked_mean(fused, mask)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Return g' (B, D)."""
        query, keys, values = (part.unflatten(-1, (self.num_heads, -1)) for part in (query, keys, values))
        scores = torch.einsum("bhd,bthd->bht", query, keys) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(dim=-1)
        return torch.einsum("bht,bthd->bhd", weights, values).flatten(1)


def _segment_max(tokens: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
    """Return for each real token the maximum (B, T, D) of its segment, 0 for the others."""
    index = segments.unsqueeze(-1).expand_as(tokens)
    maxima = tokens.new_zeros(tokens.shape[0], tokens.shape[1] + 1, tokens.shape[2])
    maxima = maxima.scatter_reduce(1, index, _only_real(tokens, mask), reduce="amax", include_self=False)
    return maxima.gather(1, index).masked_fill(~mask.unsqueeze(-1), 0.0)


def _neighbour_max(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return for each real token the maximum (B, T, D) of it and its neighbours, 0 for the others."""
    maxima = F.max_pool1d(_only_real(tokens, mask).transpose(1, 2), kernel_size=3, stride=1, padding=1)
    return maxima.transpose(1, 2).masked_fill(~mask.unsqueeze(-1), 0.0)


def _only_real(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens.masked_fill(~mask.unsqueeze(-1), -torch.inf)
