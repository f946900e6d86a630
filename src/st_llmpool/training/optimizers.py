"""The optimizers that a recipe can name: those of transformers, and LAMB."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from transformers.training_args import OptimizerNames

from ..modules.errors import ConfigurationError, nearest
from ..utils.extras import require


def lamb() -> type[Optimizer]:
    """Returns LAMB, Adam with a step of each tensor that is in proportion to its length (You et al. 2019, 1904.00962).

    For every tensor x with gradient g, as algorithm 2 in version 3 of the paper has it, with φ the identity::

        m = β₁ m + (1 − β₁) g        v = β₂ v + (1 − β₂) g²
        u = m / (√v + ε) + λ x       x = x − η ‖x‖ / ‖u‖ · u

    and ‖x‖ / ‖u‖ = 1 where one of them is 0. Later versions divide m and v by 1 − βᵗ first, which without weight decay
    λ cancels in u / ‖u‖ up to ε. It is ``pytorch_optimizer.Lamb`` with these settings; as it comes, that one
    bounds ‖x‖ by 10, divides the step by 1 − β₁ᵗ, and keeps the decay out of u.

    A step moves a tensor by the fraction η of its length, so η is larger than Adam's, such as 0.01, and tensors that
    start at zero, an adapter's B and the pooling's U, grow slowly: it is for ``model.tune: full`` and large batches.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> x.sum().backward()
        >>> lamb()([x], lr=0.1).step()
        >>> (torch.tensor([3.0, 4.0]) - x).norm()  # a tenth of its length, which is 5
        tensor(0.5000, grad_fn=<...>)
    """
    from pytorch_optimizer import Lamb

    class PaperLamb(Lamb):
        clamp = math.inf

        def __init__(self, params: Iterable[Any], lr: float) -> None:
            super().__init__(params, lr=lr, weight_decouple=False, adam_debias=True)

    return PaperLamb


#: Name in a recipe -> what returns the class, for optimizers that transformers has no name for.
OPTIMIZERS: dict[str, Callable[[], type[Optimizer]]] = {"lamb": lamb}


def trainer_optimizer(name: str) -> str:
    """Returns the name to give to the trainer, whose optimizer one of ours replaces.

    Example:
        >>> trainer_optimizer("adamw_8bit"), trainer_optimizer("lamb")
        ('adamw_8bit', 'adamw_torch')
    """
    return "adamw_torch" if name in OPTIMIZERS else name


def check_optimizer(name: str) -> None:
    """Refuses an optimizer that is unknown or not installed.

    Raises:
        ConfigurationError: With the nearest known name.
        MissingExtraError: With what to install.
    """
    known = [*OPTIMIZERS, *(option.value for option in OptimizerNames)]
    if name not in known:
        raise ConfigurationError(f"training.optim={name!r} is unknown; known: {known}.{nearest(name, known)}")
    is_quantised = any(part in name for part in ("8bit", "paged", "bnb"))
    library, extra = ("pytorch_optimizer", "lamb") if name in OPTIMIZERS else ("bitsandbytes", "train")
    if name in OPTIMIZERS or is_quantised:
        require(extra, library, purpose=f"training.optim={name}")
