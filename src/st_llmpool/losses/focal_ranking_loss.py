"""sentence-transformers' ranking losses, plain and with gradient caching, with focal weights and mixed negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import all_gather_with_grad, cos_sim, get_rank
from torch import Tensor
from torch.nn import functional as F

from ..modules.errors import ConfigurationError, InputError
from .hard_negative_mixing import HardNegativeMixing


class _WithObjective:
    """Gives a ranking loss of sentence-transformers a :class:`RankingObjective`."""

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        scale: float = 20.0,
        gather_across_devices: bool = False,
        focal_gamma: float = 0.5,
        detach_focal: bool = True,
        mixing: HardNegativeMixing | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, scale=scale, gather_across_devices=gather_across_devices, **options)  # type: ignore[call-arg]
        self.objective = RankingObjective(focal_gamma, detach_focal, mixing)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings that a model card lists."""
        return {**super().get_config_dict(), **self.objective.get_config_dict()}  # type: ignore[misc]


class FocalRankingLoss(_WithObjective, MultipleNegativesRankingLoss):
    """InfoNCE with focal weights on hard queries and, optionally, mixed hard negatives (arXiv 2506.20923; 2010.01028).

    ``L = mean_i (1 − P_i)^γ (−log P_i)``, where P_i is the probability that query i gives to its positive among all
    documents of the batch and its own mixed negatives. With γ = 0 and no mixed negatives it is
    ``MultipleNegativesRankingLoss``, exactly. Scores are scaled cosine similarities of queries to documents.

    Args:
        model: The model.
        scale: Inverse temperature, which multiplies cosine similarities.
        gather_across_devices: Also use the other processes' texts as negatives.
        focal_gamma: γ.
        detach_focal: Detach the focal weights (stop-gradient).
        mixing: Mixes negatives from the hardest ones; also add it to the trainer's callbacks, for the current step.

    Raises:
        ConfigurationError: If γ is negative or not finite.

    Inputs:
        Columns query, positive and any number of hard negatives; no labels.

    Relations:
        :class:`CachedFocalRankingLoss` has the same gradients in memory that does not grow with the batch.
        ``MatryoshkaLoss`` may wrap it.

    Example:
        >>> from st_llmpool.data import builtin_backbone
        >>> from st_llmpool import build_embedder
        >>> model = build_embedder(builtin_backbone(), pooling="mean", device="cpu")
        >>> columns = [model.preprocess(texts) for texts in (["a cat", "the sea"], ["a lion", "a wave"])]
        >>> FocalRankingLoss(model)(columns, None).backward()
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Return the loss; embeddings are the columns, each (B, D).

        Raises:
            InputError: If there is no column of positives.
        """
        if self.objective.is_plain:
            return super().compute_loss_from_embeddings(embeddings, labels)
        queries, *columns = embeddings
        if not columns:
            raise InputError("The loss needs at least two columns, queries and positives; found one.")
        documents, positives, batch_size = gather_documents(columns, gather_across_devices=self.gather_across_devices)
        losses = self.objective.losses(queries, documents, positives, scale=self.scale, batch_size=batch_size)
        return losses.mean()


class CachedFocalRankingLoss(_WithObjective, CachedMultipleNegativesRankingLoss):
    """:class:`FocalRankingLoss` with gradient caching (Gao et al. 2021, arXiv 2101.06983).

    Texts are embedded, and queries scored, `mini_batch_size` at a time; loss and gradients are those of the plain form.
    With γ = 0 and no mixed negatives it is ``CachedMultipleNegativesRankingLoss``, exactly. Inputs, errors and all
    other arguments are those of :class:`FocalRankingLoss`.

    Args:
        mini_batch_size: Number of texts per forward pass, by default 32.

    Example:
        >>> from st_llmpool.data import builtin_backbone
        >>> from st_llmpool import build_embedder
        >>> model = build_embedder(builtin_backbone(), pooling="mean", device="cpu")
        >>> columns = [model.preprocess(texts) for texts in (["a cat", "the sea"], ["a lion", "a wave"])]
        >>> CachedFocalRankingLoss(model, mini_batch_size=1)(columns, None).backward()
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of embeddings (column, mini-batch, texts), and propagate back if asked."""
        if self.objective.is_plain:
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        queries, *columns = (torch.cat(parts) for parts in reps)
        documents, positives, batch_size = gather_documents(columns, gather_across_devices=self.gather_across_devices)
        total = queries.new_zeros(())
        for begin in range(0, len(queries), self.mini_batch_size):
            part = slice(begin, begin + self.mini_batch_size)
            options = {"scale": self.scale, "batch_size": batch_size}
            loss = self.objective.losses(queries[part], documents, positives[part], **options).sum() / len(queries)
            if with_backward:  # part by part, so that one part's scores are alive at a time
                loss.backward()
                loss = loss.detach()
            total = total + loss
        return total


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
