"""Interpolate between the weights of a base and of a model that was trained from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..modules.errors import ConfigurationError


def interpolate(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) · base + alpha · tuned, computed in float32 at least, in the dtype of `tuned`."""
    if alpha == 1:
        return tuned.clone()
    computed = torch.promote_types(tuned.dtype, torch.float32)
    return torch.lerp(base.to(tuned.device, computed), tuned.to(computed), alpha).to(tuned.dtype)


@torch.no_grad()
def merge_with_base(
    model: nn.Module, base: Mapping[str, Tensor], alphas: Sequence[float], score: Callable[[], float]
) -> tuple[float, dict[float, float]]:
    """Give `model` weights between its own and those of its base (as WiSE-FT, Wortsman et al. 2021, arXiv 2109.01903).

    BidirLM (arXiv 2604.02045) keeps what a base knew this way after it was adapted to bidirectional attention.

    Args:
        model: The trained model; changed in place.
        base: Its base's weights, by the same names; buffers and what is not there stay as trained. With 1 as the only
            weight it is not used.
        alphas: Weights of the trained model. With more than one, each is tried and the best is kept; of equal ones the
            smaller, which is nearer to the base.
        score: Scores `model` as it is; called only if there is a choice.

    Returns:
        The chosen weight, and the score of each that was tried.
    """
    if list(alphas) == [1]:
        return alphas[0], {}
    tuned = {name: weight for name, weight in model.named_parameters() if name in base}
    if not tuned:
        raise ConfigurationError("The model has no weight that its base has too, so there is nothing to merge.")
    for name, weight in tuned.items():
        if weight.shape != base[name].shape:
            raise ConfigurationError(
                f"The weight {name!r} is {tuple(weight.shape)}, and {tuple(base[name].shape)} in its base: drop merge."
            )
    several = len(alphas) > 1
    # On the CPU: a GPU may have no space for a second copy.
    kept = {name: weight.detach().to("cpu", copy=True) if several else weight for name, weight in tuned.items()}

    def use(alpha: float) -> None:
        for name, weight in tuned.items():
            weight.copy_(interpolate(base[name], kept[name].to(weight.device), alpha))

    scores: dict[float, float] = {}
    for alpha in sorted(alphas) if several else ():
        use(alpha)
        scores[alpha] = score()
    chosen = max(scores, key=lambda alpha: scores[alpha], default=alphas[0])
    use(chosen)
    return chosen, scores
