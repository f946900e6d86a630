"""sentence-transformers' gradient-caching ranking loss with focal weights and mixed negatives."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor

from .hard_negative_mixing import HardNegativeMixing
from .ranking_objective import RankingObjective, gather_documents


class CachedFocalRankingLoss(CachedMultipleNegativesRankingLoss):
    """:class:`FocalRankingLoss` with gradient caching (Gao et al. 2021, arXiv 2101.06983).

    Texts are embedded, and queries scored, `mini_batch_size` at a time; loss and gradients are those of the plain form.
    With γ = 0 and no mixed negatives it is ``CachedMultipleNegativesRankingLoss``, exactly.

    Args:
        model: The model.
        mini_batch_size: Texts to embed at a time.
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

    Example:
        >>> from st_llmpool.data import builtin_backbone
        >>> from st_llmpool import build_embedder
        >>> model = build_embedder(builtin_backbone(), pooling="mean", device="cpu")
        >>> columns = [model.preprocess(texts) for texts in (["a cat", "the sea"], ["a lion", "a wave"])]
        >>> CachedFocalRankingLoss(model, mini_batch_size=1)(columns, None).backward()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        mini_batch_size: int = 32,
        scale: float = 20.0,
        gather_across_devices: bool = False,
        focal_gamma: float = 0.5,
        detach_focal: bool = True,
        mixing: HardNegativeMixing | None = None,
    ) -> None:
        options = {"scale": scale, "gather_across_devices": gather_across_devices}
        super().__init__(model, mini_batch_size=mini_batch_size, **options)
        self.objective = RankingObjective(focal_gamma, detach_focal, mixing)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Returns the loss of embeddings (column, mini-batch, texts), and propagates back if asked."""
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

    def get_config_dict(self) -> dict[str, Any]:
        """Returns what a model card says of it."""
        return {**super().get_config_dict(), **self.objective.get_config_dict()}
