"""Online hard-negative mixing: each query gets new negatives that are blends of its hardest ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback

from .settings import MixingSettings


class HardNegativeMixing(TrainerCallback):
    """Makes negatives from the k hardest of each query (MoCHi, Kalantidis et al. 2020, 2010.01028, eq. 3; 2506.20923).

    With the documents d_1..d_k that score highest for query q without being its positive, all of length 1:

    * pair-wise: ``h = λ d_a + (1 − λ) d_b`` with a ≠ b at random and λ uniform in (0, 1);
    * list-wise: ``h = Σ_j w_j d_j`` with ``w = softmax_j(s cos(q, d_j))``, s the loss's scale;

    and each h is scaled to length 1. A query's mixed negatives are its own: among the documents that they are made of
    may be the positives of others.

    It is also a trainer callback, to know the current step. Random draws depend only on the seed, the step and the
    query's position in the global batch: not on the number of processes, on mini-batches or on resuming.

    Args:
        settings: How many of which kind, from which step, with gradient or not.
        seed: Seed of the random draws.

    Example:
        >>> mixing = HardNegativeMixing(MixingSettings(hardest=2, pairwise=1, listwise=True))
        >>> documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> scores = torch.tensor([[-torch.inf, 0.0, 0.0]])  # of one query, whose positive is the first
        >>> mixing.mix(documents, scores, rows=torch.tensor([0]), batch_size=1).norm(dim=2)
        tensor([[1., 1.]])
    """

    def __init__(self, settings: MixingSettings, *, seed: int = 0) -> None:
        self.settings = settings
        self.seed = seed
        self.step = 0

    @property
    def is_on(self) -> bool:
        """Whether this step mixes."""
        return self.settings.count > 0 and self.step >= self.settings.start_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the trainer's step."""
        self.step = state.global_step

    def mix(self, documents: Tensor, scores: Tensor, *, rows: Tensor, batch_size: int) -> Tensor:
        """Return the mixed negatives (Q, M, D), of length 1; M is 0 where there are not two negatives to mix.

        Args:
            documents: (N, D).
            scores: (Q, N), scaled; -inf for a query's positive.
            rows: (Q,) position of each query in the global batch, over all processes.
            batch_size: Queries in the global batch.
        """
        if self.settings.detach:
            documents, scores = documents.detach(), scores.detach()
        hardest = min(self.settings.hardest, len(documents) - 1)
        if hardest < 2:
            return documents.new_zeros(len(scores), 0, documents.shape[1])
        top = scores.topk(hardest, dim=1)
        chosen = F.normalize(documents, dim=1)[top.indices]
        mixed = [self._pairs(chosen, rows, batch_size)]
        if self.settings.listwise:
            mixed.append(torch.einsum("qk,qkd->qd", top.values.softmax(dim=1), chosen).unsqueeze(1))
        return F.normalize(torch.cat(mixed, dim=1), dim=2)

    def draw(self, batch_size: int, hardest: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a, b and λ of every pair of this step, each (batch_size, pairwise)."""
        generator = np.random.default_rng([self.seed, self.step])
        size = (batch_size, self.settings.pairwise)
        first = generator.integers(hardest, size=size)
        second = (first + generator.integers(1, hardest, size=size)) % hardest
        return torch.from_numpy(first), torch.from_numpy(second), torch.from_numpy(generator.random(size))

    def _pairs(self, chosen: Tensor, rows: Tensor, batch_size: int) -> Tensor:
        """Return the pair-wise mixed negatives (Q, pairwise, D), not yet of length 1."""
        first, second, weight = (part.to(rows.device)[rows] for part in self.draw(batch_size, chosen.shape[1]))
        query = torch.arange(len(chosen), device=chosen.device).unsqueeze(1)
        return torch.lerp(chosen[query, second], chosen[query, first], weight.unsqueeze(2).to(chosen.dtype))
