"""Generalized mean (GeM): a learned power moves each feature from the mean towards its strongest values."""

from __future__ import annotations

from typing import Literal

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

    the strong positive values against the strong negative ones. The form is continuous, odd, of the scale of its
    inputs, and at p = 1 the mean. Each M_p is divided by its largest value before the power is taken, so nothing
    overflows, and no gradient by a value exceeds 1; where all values are 0 it is 0. The other candidates fail at
    that: the root of the signed mean power, sign(m) |m|^(1/p), has an infinite gradient wherever the values cancel;
    clamping below at a small number throws the negative half away and is not the mean at p = 1; log-mean-exp and the
    Lehmer mean are no power means.

    By default embedding = r + U · y, where r is the plain readout of the last layer and U (D, D) starts at zero: an
    untrained module gives exactly r.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        num_groups: G groups of D / G neighbouring features; 1 is GeM, D a power for each feature.
        power: Where the powers start, at least 1. They cannot fall below 1: there they turn back.
        reads: ``"tokens"`` of the last layer, or ``"layers"``: the layers' summaries.
        num_layers: How many layers L the backbone hands over, for ``reads="layers"``.
        readout_skip: False: embedding = y, as in the papers.

    Raises:
        ConfigurationError: If a setting is unknown, missing or out of range, or the features do not fit.

    Inputs, Outputs:
        As :class:`SetPooling`.

    Example:
        >>> pooling = GeneralizedMeanPooling(embedding_dimension=2, power=2, readout_skip=False)
        >>> tokens, mask = torch.tensor([[[1.0, -3.0], [7.0, 3.0]]]), torch.ones(1, 2)
        >>> pooling({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"].detach()
        tensor([[5., 0.]])
    """

    config_keys = [*SetPooling.config_keys, "num_groups", "power"]

    def __init__(
        self,
        embedding_dimension: int,
        *,
        num_groups: int = 1,
        power: float = 3.0,
        reads: Literal["tokens", "layers"] = "tokens",
        num_layers: int | None = None,
        readout_skip: bool = True,
    ) -> None:
        super().__init__(embedding_dimension, reads=reads, num_layers=num_layers, readout_skip=readout_skip)
        check_sizes(num_groups=num_groups)
        if embedding_dimension % num_groups:
            fitting = [size for size in range(1, embedding_dimension + 1) if embedding_dimension % size == 0]
            raise ConfigurationError(
                f"num_groups={num_groups} does not divide embedding_dimension={embedding_dimension}; "
                f"these do: {fitting}."
            )
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
        """Returns y (B, D)."""
        powers = self.powers.repeat_interleave(self.embedding_dimension // self.num_groups)
        positive = vectors.clamp(min=0)
        return _power_mean(positive, powers, mask) - _power_mean(positive - vectors, powers, mask)


def _power_mean(values: Tensor, powers: Tensor, mask: Tensor) -> Tensor:
    """Returns the power means (B, D) of values (B, K, D) that are not negative, and 0 where `mask` is False."""
    # M_p is homogeneous, so the scale may be taken for a constant: its own gradient would cancel.
    scale = values.detach().amax(dim=1)
    is_zero = scale == 0
    moments = masked_mean((values / scale.masked_fill(is_zero, 1.0).unsqueeze(1)) ** powers, mask)
    return scale * moments.masked_fill(is_zero, 1.0) ** (1 / powers)
