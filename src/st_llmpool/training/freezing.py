"""Freeze the lowest layers of a backbone, whose general features rarely need to change, or weights of a pooling."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..modules.attention import decoder_layers
from ..modules.errors import ConfigurationError, nearest


def freeze_lowest_layers(backbone: nn.Module, count: int) -> None:
    """Freeze the embeddings and the first `count` layers (Telly-k, Shi et al. 2023, arXiv 2304.05216).

    With a `count` of 0 nothing is frozen. What lies above them trains as before: the other layers and the final norm,
    or their adapters. An adapter that is frozen before its first step has no effect, since its product starts at zero.
    """
    layers = decoder_layers(backbone)
    check_freezing(count, len(layers))
    if count == 0:
        return
    for layer in layers[:count]:
        layer.requires_grad_(False)
    in_layers = set(layers.parameters())
    for name, module in backbone.named_modules():
        # By name too: BERT has a norm among its embeddings.
        if isinstance(module, nn.Embedding) or "embed" in name.rpartition(".")[2]:
            for parameter in module.parameters():
                parameter.requires_grad_(parameter.requires_grad and parameter in in_layers)


def check_freezing(count: int, layers: int) -> None:
    """Check that freezing `count` of `layers` layers leaves one to train."""
    if count >= layers:
        raise ConfigurationError(
            f"model.freeze_layers={count} leaves none of {layers} layers to train. Use at most {layers - 1}, or "
            f"model.tune=pooling."
        )


def freeze_pooling(pooling: nn.Module, names: Iterable[str]) -> None:
    """Freeze weights of a pooling, such as its ``latents``, at the values that they start from.

    Raises:
        ConfigurationError: If it has no weight or part of that name, or nothing is left to train.
    """
    weights = {name: parameter for name, parameter in pooling.named_parameters() if parameter.requires_grad}
    known = sorted({part for name in weights for part in name.split(".")} - {"weight", "bias"})
    for wanted in names:
        if wanted not in known:
            hint = nearest(wanted, known)
            raise ConfigurationError(f"model.freeze_pooling: no part {wanted!r}; there are {', '.join(known)}.{hint}")
        for name, parameter in weights.items():
            parameter.requires_grad_(parameter.requires_grad and wanted not in name.split("."))
    if weights and not any(parameter.requires_grad for parameter in weights.values()):
        raise ConfigurationError("model.freeze_pooling leaves no weight of the pooling to train. Name fewer parts.")
