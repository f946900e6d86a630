"""sentence-transformers' ranking loss with focal weights and mixed negatives."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor

from ..modules.errors import InputError
from .hard_negative_mixing import HardNegativeMixing
from .ranking_objective import RankingObjective, gather_documents


class FocalRankingLoss(MultipleNegativesRankingLoss):
    """InfoNCE that weighs hard queries more, and may make harder negatives (arXiv 2506.20923; 2010.01028).

    ``L = mean_i (1 − P_i)^γ (−log P_i)``, where P_i is the probability that query i gives to its positive among all
    documents of the batch and its own mixed negatives. With γ = 0 and no mixed negatives it is
    ``MultipleNegativesRankingLoss``, exactly. Scores are scaled cosine similarities of queries to documents.

    Args:
        model: The model.
        scale: By which cosine similarities are multiplied, the inverse temperature.
        gather_across_devices: Use the other processes' texts as negatives too.
        focal_gamma: γ.
        detach_focal: Take the weights for constants; else they have a gradient too.
        mixing: Makes negatives from the hardest ones; give it to the trainer as a callback too, which tells it the
            step.

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

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        scale: float = 20.0,
        gather_across_devices: bool = False,
        focal_gamma: float = 0.5,
        detach_focal: bool = True,
        mixing: HardNegativeMixing | None = None,
    ) -> None:
        super().__init__(model, scale=scale, gather_across_devices=gather_across_devices)
        self.objective = RankingObjective(focal_gamma, detach_focal, mixing)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """Returns the loss; embeddings are the columns, each (B, D).

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

    def get_config_dict(self) -> dict[str, Any]:
        """Returns what a model card says of it."""
        return {**super().get_config_dict(), **self.objective.get_config_dict()}
