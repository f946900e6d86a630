"""InfoNCE of each query with what sentence-transformers lacks: focal weights and mixed negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.util import all_gather_with_grad, cos_sim, get_rank
from torch import Tensor
from torch.nn import functional as F

from ..modules.errors import ConfigurationError
from .hard_negative_mixing import HardNegativeMixing


@dataclass
class RankingObjective:
    """The loss of each query, shared by :class:`FocalRankingLoss` and its cached form.

    With the scores of a query's positive s⁺ and of its negatives s_j, mixed ones included, and the margin
    ``m = log Σ_j exp(s_j) − s⁺``: its probability of being found is ``P = 1 / (1 + exp(m))``, its InfoNCE loss
    ``−log P = softplus(m)``, and its focal weight ``(1 − P)^γ = sigmoid(m)^γ`` (KaLM-Embedding-V2, Zhao et al. 2025,
    arXiv 2506.20923). In terms of m nothing is lost where P rounds to 1, and every gradient is finite.

    Attributes:
        focal_gamma: γ; 0 weights all queries equally.
        detach_focal: Detach the focal weights (stop-gradient).
        mixing: Mixes more negatives; None for none.

    Example:
        >>> losses = RankingObjective(focal_gamma=0.0).losses(
        ...     torch.eye(2), torch.eye(2), torch.tensor([0, 1]), scale=1.0, batch_size=2
        ... )
        >>> losses
        tensor([0.3133, 0.3133])
    """

    focal_gamma: float = 0.5
    detach_focal: bool = True
    mixing: HardNegativeMixing | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.focal_gamma < math.inf:
            raise ConfigurationError(
                f"focal_gamma={self.focal_gamma} must be 0 or more; 0 weights all queries equally, 0.5 is the paper's."
            )

    @property
    def is_plain(self) -> bool:
        """Whether this step's loss is sentence-transformers' own."""
        return self.focal_gamma == 0 and not (self.mixing is not None and self.mixing.is_on)

    def losses(self, queries: Tensor, documents: Tensor, positives: Tensor, *, scale: float, batch_size: int) -> Tensor:
        """Return the weighted loss of each query (Q,).

        Args:
            queries: (Q, D).
            documents: (N, D), the positives of the global batch first.
            positives: (Q,) place of each query's positive in `documents`.
            scale: Inverse temperature, which multiplies cosine similarities.
            batch_size: Queries in the global batch, over all processes.
        """
        scores = cos_sim(queries, documents) * scale
        positive = scores.gather(1, positives.unsqueeze(1))
        negatives = scores.scatter(1, positives.unsqueeze(1), -torch.inf)
        if self.mixing is not None and self.mixing.is_on:
            mixed = self.mixing.mix(documents, negatives, rows=positives, batch_size=batch_size)
            own = torch.einsum("qd,qmd->qm", F.normalize(queries, dim=1), mixed) * scale
            negatives = torch.cat([negatives, own], dim=1)
        margin = (negatives.logsumexp(dim=1, keepdim=True) - positive).squeeze(1)
        losses = F.softplus(margin)
        if self.focal_gamma == 0:
            return losses
        weights = (self.focal_gamma * F.logsigmoid(margin)).exp()
        return (weights.detach() if self.detach_focal else weights) * losses

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings that a model card lists."""
        mixing = None if self.mixing is None else vars(self.mixing.settings)
        return {"focal_gamma": self.focal_gamma, "detach_focal": self.detach_focal, "mixing": mixing}


def gather_documents(columns: Sequence[Tensor], *, gather_across_devices: bool) -> tuple[Tensor, Tensor, int]:
    """Concatenate the documents of the batch, over all processes if asked.

    Args:
        columns: Positives, then each column of hard negatives, all (B, D).
        gather_across_devices: Include the other processes' documents, with gradient.

    Returns:
        Documents (N, D); the index of each of this process's positives (B,); the queries in the global batch.
    """
    start, size = 0, len(columns[0])
    if gather_across_devices:
        columns = [all_gather_with_grad(column) for column in columns]
        start = get_rank() * size
    positives = torch.arange(start, start + size, device=columns[0].device)
    return torch.cat(list(columns)), positives, len(columns[0])
