"""sentence-transformers' ranking losses, plain and with gradient caching, with focal weights and mixed negatives."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor

from ..modules.errors import InputError
from .hard_negative_mixing import HardNegativeMixing
from .ranking_objective import RankingObjective, gather_documents


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
