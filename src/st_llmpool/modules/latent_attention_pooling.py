"""Latent-attention pooling: a cross-attention over the last layer's tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cross_attention import CrossAttentionPooling


class LatentAttentionPooling(CrossAttentionPooling):
    """Pools the tokens of a text with trainable latents; padding has no effect and gets no gradient.

    The block of :class:`CrossAttention` over the real tokens of the last layer: with ``queries="latents"`` the
    latents query the tokens (Tang & Yang 2024, arXiv 2409.02727 §3.1), with ``queries="inputs"`` the tokens query
    the latents, a dictionary (NV-Embed, Lee et al. 2024, arXiv 2405.17428 §3.1). Then, by default, embedding =
    r + U · pooled with the plain readout r of the last layer. U starts at zero: an untrained module gives exactly r.
    Sizes, ``queries`` and ``readout_skip`` are those of :class:`CrossAttentionPooling`.

    Args:
        embedding_dimension: Hidden size D of the backbone.

    Raises:
        ConfigurationError: If a setting is unknown, missing or out of range, or the features do not fit.

    Inputs:
        ``token_embeddings`` (B, T, D) and ``attention_mask`` (B, T) with padding on any side, nonzero for the
        tokens to pool, at least one in every row; or flat ``token_embeddings`` (1, N, D) and ``cu_seq_lens_q``
        (B + 1,). ``readout`` (B, D) for the skip. Any float dtype.

    Outputs:
        ``sentence_embedding`` (B, D) in the readout's dtype, or the tokens' without the skip.

    Example:
        >>> import torch
        >>> pooling = LatentAttentionPooling(embedding_dimension=16, queries="inputs", readout_skip=False)
        >>> tokens, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
        >>> pooling({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"].shape
        torch.Size([2, 16])
    """

    def pool(self, features: dict[str, Any]) -> Tensor:
        """Return the embeddings (B, D)."""
        tokens, mask = self.tokens(features)
        return self.embeddings_from(features, self.cross_attention(tokens, mask), dtype=tokens.dtype)
