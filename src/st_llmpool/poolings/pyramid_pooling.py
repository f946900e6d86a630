"""Pyramid pooling: the means of ever shorter spans of a text, so that the order of its parts is not lost."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..modules.errors import ConfigurationError
from ..modules.trainable_pooling import check_sizes
from .set_pooling import SetPooling


class PyramidPooling(SetPooling):
    """Pools spans of a sequence at several levels (spatial pyramid pooling, He et al. 2014, arXiv 1406.4729, §2.2).

    Level n cuts the K real vectors x_0..x_{K-1} of a text into n bins, x_k into bin ``⌊k n / K⌋``; a bin's value is
    the mean of its vectors. Bin i may be empty if K < n; its value is then the nearest vector, ``x_⌊i K / n⌋``.
    The S = Σ n values are concatenated and projected back, ``y = P [b_1; ...; b_S]`` with P (D, S·D).

    Args:
        embedding_dimension: Hidden size D of the backbone.
        levels: The n of each level.
        **settings: As :class:`SetPooling`, with P for U; without the skip P starts as the mean of the bins.

    Raises, Inputs, Outputs:
        As :class:`SetPooling`.

    Example:
        >>> pooling = PyramidPooling(embedding_dimension=1, levels=[1, 2], readout_skip=False)
        >>> tokens, mask = torch.tensor([[[1.0], [3.0], [8.0], [99.0]]]), torch.tensor([[1, 1, 1, 0]])
        >>> pooling({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"].detach()  # of 4, 2, 8
        tensor([[4.6667]])
    """

    config_keys = [*SetPooling.config_keys, "levels"]

    def __init__(self, embedding_dimension: int, *, levels: Sequence[int] = (1, 2, 4), **settings: Any) -> None:
        if isinstance(levels, str) or not isinstance(levels, Sequence) or not levels:
            shown = reprlib.repr(levels)
            raise ConfigurationError(f"levels={shown} must be a list of numbers of bins, such as [1, 2, 4].")
        check_sizes(levels=len(levels))
        for level in levels:
            check_sizes(level=level)
        num_bins = sum(levels)
        check_sizes(embedding_dimension=embedding_dimension, levels=num_bins, inputs=embedding_dimension)
        super().__init__(embedding_dimension, **settings)
        self.project_from(num_bins * embedding_dimension)
        self.levels = list(levels)
        if not self.readout_skip:
            mean = torch.eye(embedding_dimension).repeat(1, num_bins) / num_bins
            self.to_embedding.load_state_dict({"weight": mean})

    def pool_set(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return the values of all bins (B, S * D); ``to_embedding`` is P."""
        weights = torch.cat([_bin_weights(mask, level) for level in self.levels], dim=1)
        return torch.einsum("bsk,bkd->bsd", weights, vectors).flatten(1)


def _bin_weights(mask: Tensor, num_bins: int) -> Tensor:
    """Return the weight of each vector in each bin, (B, num_bins, K); a bin's weights sum to 1."""
    rank = mask.long().cumsum(dim=1).unsqueeze(1) - 1
    length = mask.sum(dim=1).view(-1, 1, 1)
    bins = torch.arange(num_bins, device=mask.device).unsqueeze(1)
    members = (rank * num_bins // length == bins) & mask.unsqueeze(1)
    nearest = (rank == bins * length // num_bins) & mask.unsqueeze(1)
    members = torch.where(members.any(dim=2, keepdim=True), members, nearest)
    return members.float() / members.sum(dim=2, keepdim=True)
