"""Generalized mean (GeM): a learned power moves each feature from the mean towards its strongest values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules.errors import ConfigurationError
from ..modules.trainable_pooling import check_number, check_sizes
from .set_pooling import SetPooling, masked_mean


class GeneralizedMeanPooling(SetPooling):
    """Pools a set by power means with a learned power for each group of features, in a form for signed values.

    GeM (Radenović et al. 2017, arXiv 1711.02512, eq. 3) is ``M_p(x) = (1/K Σ_k x_k^p)^(1/p)`` for a feature's values
    x_1..x_K ≥ 0: the mean at p = 1, the maximum as p grows. The group form (Ko et al. 2022, arXiv 2212.04114) shares a
    power p_g among the features of a group. Hidden states have both signs, so here

        y = M_p(x⁺) − M_p(x⁻),    x⁺ = max(x, 0),  x⁻ = max(−x, 0):

    which is continuous, odd, of the scale of its inputs, and at p = 1 the mean. Values are divided by the largest one
    before the power is taken, so nothing overflows and no gradient by a value exceeds 1. The root of the signed mean
    power, sign(m) |m|^(1/p), has an infinite gradient where values cancel; clamping drops the negative half.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        num_groups: G groups of D / G neighbouring features; 1 is GeM, D a power for each feature.
        power: Where the powers start, at least 1. They cannot fall below 1: there they turn back.
        **settings: As :class:`SetPooling`; the papers have ``readout_skip=False``.

    Raises, Inputs, Outputs:
        As :class:`SetPooling`.

    Example:
        >>> pooling = GeneralizedMeanPooling(embedding_dimension=2, power=2, readout_skip=False)
        >>> tokens, mask = torch.tensor([[[1.0, -3.0], [7.0, 3.0]]]), torch.ones(1, 2)
        >>> pooling({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"].detach()
        tensor([[5., 0.]])
    """

    config_keys = [*SetPooling.config_keys, "num_groups", "power"]

    def __init__(self, embedding_dimension: int, *, num_groups: int = 1, power: float = 3.0, **settings: Any) -> None:
        super().__init__(embedding_dimension, **settings)
        check_sizes(num_groups=num_groups)
        if embedding_dimension % num_groups:
            fitting = [size for size in range(1, embedding_dimension + 1) if embedding_dimension % size == 0]
            unfit = f"num_groups={num_groups} does not divide embedding_dimension={embedding_dimension}"
            raise ConfigurationError(f"{unfit}; these do: {fitting}.")
        check_number("power", power, 1, 1e6)
        self.num_groups = num_groups
        self.power = power
        self.excess = nn.Parameter(torch.full((num_groups,), float(power) - 1))

    @property
    def powers(self) -> Tensor:
        """The powers (G,), 1 + |excess|."""
        # Not abs(), whose gradient at 0 is 0: a power that starts at 1 would stay there.
        return 1 + torch.where(self.excess < 0, -self.excess, self.excess)

    def pool_set(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Return y (B, D)."""
        powers = self.powers.repeat_interleave(self.embedding_dimension // self.num_groups)
        positive = vectors.clamp(min=0)
        return _power_mean(positive, powers, mask) - _power_mean(positive - vectors, powers, mask)


def _power_mean(values: Tensor, powers: Tensor, mask: Tensor) -> Tensor:
    """Return the power means (B, D) of values (B, K, D) that are not negative, and 0 where `mask` is False."""
    # M_p is homogeneous, so the scale may be taken for a constant: its own gradient would cancel.
    scale = values.detach().amax(dim=1)
    is_zero = scale == 0
    moments = masked_mean((values / scale.masked_fill(is_zero, 1.0).unsqueeze(1)) ** powers, mask)
    return scale * moments.masked_fill(is_zero, 1.0) ** (1 / powers)
