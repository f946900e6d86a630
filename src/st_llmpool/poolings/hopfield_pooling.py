"""Hopfield pooling: learned state patterns retrieve from the vectors of a text, in one step or several."""

from __future__ import annotations

import reprlib
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.errors import ConfigurationError
from ..modules.trainable_pooling import check_number, check_sizes
from .set_pooling import SetPooling

#: The network converges in a few updates; a config that asks for more was tampered with.
MOST_UPDATES = 1000


class HopfieldPooling(SetPooling):
    """Pools a set X (K, D) by a modern Hopfield network whose stored patterns are X (Ramsauer et al. 2020, 2008.02217).

    The learned state patterns S (R, D) ask, and each update moves them towards what they retrieved (eq. 3 and 10):
    ``q = LN_s(S) W_q``, ``k = LN_x(X) W_k``, ``v = LN_x(X) W_v``; ``ξ = softmax(β q kᵀ)`` over the real vectors;
    `update_steps` times ``q ← ξ k`` with a new ξ; then the mean over the R patterns of ``ξ v W_o``. Without updates it
    is attention. Each of H heads does this in its own space.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        num_patterns: R.
        num_heads: H.
        head_dim: Size of a head; None is D / H.
        update_steps: How often the state patterns move before the last retrieval.
        beta: β, the inverse temperature of the softmax; None is 1/√head_dim.
        **settings: As :class:`SetPooling`, with W_o for U; the paper has ``readout_skip=False``.

    Raises, Inputs, Outputs:
        As :class:`SetPooling`.

    Example:
        >>> pooling = HopfieldPooling(embedding_dimension=16, update_steps=2, readout_skip=False)
        >>> tokens, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
        >>> pooling({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"].shape
        torch.Size([2, 16])
    """

    config_keys = [*SetPooling.config_keys, "num_patterns", "num_heads", "head_dim", "update_steps", "beta"]

    def __init__(
        self,
        embedding_dimension: int,
        *,
        num_patterns: int = 8,
        num_heads: int = 8,
        head_dim: int | None = None,
        update_steps: int = 0,
        beta: float | None = None,
        **settings: Any,
    ) -> None:
        check_sizes(embedding_dimension=embedding_dimension, num_patterns=num_patterns)
        check_sizes(num_heads=num_heads)
        head_dim = max(1, embedding_dimension // num_heads) if head_dim is None else head_dim
        check_sizes(embedding_dimension=embedding_dimension, num_heads=num_heads, head_dim=head_dim)
        if type(update_steps) is not int or not 0 <= update_steps <= MOST_UPDATES:
            shown = reprlib.repr(update_steps)
            raise ConfigurationError(f"update_steps={shown} must be an integer from 0 (attention) to {MOST_UPDATES}.")
        beta = head_dim**-0.5 if beta is None else beta
        check_number("beta", beta, 1e-6, 1e6)
        inner = num_heads * head_dim
        super().__init__(embedding_dimension, **settings)
        self.project_from(inner)
        self.num_patterns = num_patterns
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.update_steps = update_steps
        self.beta = beta
        self.state_patterns = nn.Parameter(torch.randn(num_patterns, embedding_dimension) * 0.02)
        self.norm_states = nn.LayerNorm(embedding_dimension)
        self.norm_stored = nn.LayerNorm(embedding_dimension)
        self.to_query = nn.Linear(embedding_dimension, inner, bias=False)
        self.to_key_value = nn.Linear(embedding_dimension, 2 * inner, bias=False)

    def pool_set(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return the mean over the patterns of ``ξ v`` (B, H * head_dim); ``to_embedding`` is W_o."""
        stored = self.to_key_value(self.norm_stored(vectors))
        keys, values = (part.unflatten(-1, (self.num_heads, self.head_dim)) for part in stored.chunk(2, dim=-1))
        states = self.to_query(self.norm_states(self.state_patterns)).unflatten(-1, (self.num_heads, self.head_dim))
        states = states.expand(len(vectors), -1, -1, -1)
        weights = self._associate(states, keys, mask)
        for _ in range(self.update_steps):
            states = torch.einsum("brhk,bkhd->brhd", weights, keys)
            weights = self._associate(states, keys, mask)
        return torch.einsum("brhk,bkhd->brhd", weights, values).mean(dim=1).flatten(1)

    def _associate(self, states: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Return ξ (B, R, H, K)."""
        scores = self.beta * torch.einsum("brhd,bkhd->brhk", states, keys)
        return scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(dim=-1)
