"""The optimizers that a recipe can name, those of transformers and LAMB, and a dry run of optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from ..modules.errors import ConfigurationError, check_choice
from ..utils.extras import require
from ..utils.random_state import preserve_rng_state


def lamb() -> type[Optimizer]:
    """Return LAMB, Adam with a step of each tensor that is in proportion to its length (You et al. 2019, 1904.00962).

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
    """Return the name to give to the trainer, whose optimizer one of ours replaces.

    Example:
        >>> trainer_optimizer("adamw_8bit"), trainer_optimizer("lamb")
        ('adamw_8bit', 'adamw_torch')
    """
    return "adamw_torch" if name in OPTIMIZERS else name


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that is unknown or not installed."""
    known = [*OPTIMIZERS, *(option.value for option in OptimizerNames)]
    check_choice("training.optim", name, known)
    is_quantised = any(part in name for part in ("8bit", "paged", "bnb"))
    library, extra = ("pytorch_optimizer", "lamb") if name in OPTIMIZERS else ("bitsandbytes", "train")
    if name in OPTIMIZERS or is_quantised:
        require(extra, library, purpose=f"training.optim={name}")


def check_optimization(arguments: TrainingArguments, steps: int) -> None:
    """Make an optimizer step on one small layer, and follow the schedule over all `steps` of a run.

    Example:
        >>> options = {"lr_scheduler_type": "polynomial", "warmup_steps": 4, "report_to": "none", "use_cpu": True}
        >>> check_optimization(TrainingArguments("run", **options), steps=5)
    """
    with preserve_rng_state():
        layer: Any = nn.Linear(64, 64, device=arguments.device)  # bitsandbytes has other code for fewer weights
    layer(torch.ones(1, 64, device=arguments.device)).sum().backward()
    with refused_by_name("training.optim", arguments.optim):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
        if {"params", "model", "optimizer_dict"}.isdisjoint(options):
            kind(layer.parameters(), **options).step()
    schedule_options: Any = arguments.lr_scheduler_kwargs
    optimizer, warmup = (
        torch.optim.SGD(layer.parameters(), lr=arguments.learning_rate),
        arguments.get_warmup_steps(steps),
    )
    setting = f"training.warmup_steps={warmup} of {steps} steps with training.lr_scheduler_type"
    with refused_by_name(setting, arguments.lr_scheduler_type):
        schedule = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=schedule_options,
        )
        if not hasattr(schedule, "lr_lambdas"):
            raise ValueError("it follows the loss of an evaluation, and evaluations here measure rankings. Use linear")
        for step in sorted({0, warmup - 1, warmup, warmup + 1, steps // 2, steps - 1, steps} & {*range(steps + 1)}):
            factor = schedule.lr_lambdas[0](step)
            if isinstance(factor, complex) or not 0 <= factor < math.inf:
                raise ValueError(f"its learning rate at step {step} is {factor * arguments.learning_rate}")


@contextmanager
def refused_by_name(setting: str, value: Any) -> Iterator[None]:
    """Re-raises what libraries say of an optimizer or a schedule as a ConfigurationError that names the setting."""
    try:
        yield
    except (ImportError, ValueError, TypeError, ArithmeticError, AssertionError, RuntimeError, LookupError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigurationError(
            f"{setting}={getattr(value, 'value', value)} cannot be used here: {reason}. Change it, or its options."
        ) from error
