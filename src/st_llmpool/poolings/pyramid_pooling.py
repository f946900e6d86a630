"""Pyramid pooling: the means of ever shorter spans of a text, so that the order of its parts is not lost."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..modules.errors import ConfigurationError
from ..modules.trainable_pooling import check_sizes
from .set_pooling import SetPooling


class PyramidPooling(SetPooling):
    """Pools spans of a sequence at several levels (spatial pyramid pooling, He et al. 2014, arXiv 1406.4729, §2.2).

    Level n cuts the K real vectors x_0..x_{K-1} of a text into n bins, x_k into bin ``⌊k n / K⌋``; a bin's value is
    the mean of its vectors. Bin i may be empty if K < n: it then lies within one vector's share of the text, and that
    nearest one, ``x_⌊i K / n⌋``, is its value.
    The S = Σ n values are concatenated and projected back, ``y = P [b_1; ...; b_S]`` with P (D, S·D).

    By default embedding = r + y, where r is the plain readout of the last layer and P starts at zero: an untrained
    module gives exactly r.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        levels: The n of each level.
        reads: ``"tokens"`` of the last layer, or ``"layers"``: the layers' summaries, spans of depth.
        num_layers: How many layers L the backbone hands over, for ``reads="layers"``.
        readout_skip: False: embedding = y, and P starts as the mean of the bins.

    Raises:
        ConfigurationError: If a setting is unknown, missing or not positive, or the features do not fit.

    Inputs, Outputs:
        As :class:`SetPooling`.

    Example:
        >>> pooling = PyramidPooling(embedding_dimension=1, levels=[1, 2], readout_skip=False)
        >>> tokens, mask = torch.tensor([[[1.0], [3.0], [8.0], [99.0]]]), torch.tensor([[1, 1, 1, 0]])
        >>> pooling({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"].detach()  # of 4, 2, 8
        tensor([[4.6667]])
    """

    config_keys = [*SetPooling.config_keys, "levels"]

    def __init__(
        self,
        embedding_dimension: int,
        *,
        levels: Sequence[int] = (1, 2, 4),
        reads: Literal["tokens", "layers"] = "tokens",
        num_layers: int | None = None,
        readout_skip: bool = True,
    ) -> None:
        if isinstance(levels, str) or not isinstance(levels, Sequence) or not levels:
            raise ConfigurationError(
                f"levels={reprlib.repr(levels)} must be a list of numbers of bins, such as [1, 2, 4]."
            )
        check_sizes(levels=len(levels))
        for level in levels:
            check_sizes(level=level)
        num_bins = sum(levels)
        check_sizes(embedding_dimension=embedding_dimension, levels=num_bins, inputs=embedding_dimension)
        super().__init__(
            embedding_dimension,
            reads=reads,
            num_layers=num_layers,
            readout_skip=readout_skip,
            pooled_dimension=num_bins * embedding_dimension,
        )
        self.levels = list(levels)
        if not readout_skip:
            mean = torch.eye(embedding_dimension).repeat(1, num_bins) / num_bins
            self.to_embedding.load_state_dict({"weight": mean})

    def pool_set(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Returns the values of all bins (B, S * D); ``to_embedding`` is P."""
        shares = torch.cat([_bin_shares(mask, level) for level in self.levels], dim=1)
        return torch.einsum("bsk,bkd->bsd", shares, vectors).flatten(1)


def _bin_shares(mask: Tensor, num_bins: int) -> Tensor:
    """Returns how much of each vector goes into each bin, (B, num_bins, K); a bin's shares sum to 1."""
    rank = mask.long().cumsum(dim=1).unsqueeze(1) - 1
    length = mask.sum(dim=1).view(-1, 1, 1)
    bins = torch.arange(num_bins, device=mask.device).unsqueeze(1)
    members = (rank * num_bins // length == bins) & mask.unsqueeze(1)
    nearest = (rank == bins * length // num_bins) & mask.unsqueeze(1)
    members = torch.where(members.any(dim=2, keepdim=True), members, nearest)
    return members.float() / members.sum(dim=2, keepdim=True)
