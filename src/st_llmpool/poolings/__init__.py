"""Poolings of the neighbouring literature; a shared model that uses one carries its file beside those of modules/."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attsets_pooling import AttSetsPooling
    from .generalized_mean_pooling import GeneralizedMeanPooling
    from .hopfield_pooling import HopfieldPooling
    from .ponet_pooling import PoNetPooling
    from .pyramid_pooling import PyramidPooling
    from .set_pooling import SetPooling

__all__ = [
    "AttSetsPooling",
    "GeneralizedMeanPooling",
    "HopfieldPooling",
    "PoNetPooling",
    "PyramidPooling",
    "SetPooling",
]

_FILES = {
    "AttSetsPooling": "attsets_pooling",
    "GeneralizedMeanPooling": "generalized_mean_pooling",
    "HopfieldPooling": "hopfield_pooling",
    "PoNetPooling": "ponet_pooling",
    "PyramidPooling": "pyramid_pooling",
    "SetPooling": "set_pooling",
}


def __getattr__(name: str) -> object:
    if name in _FILES:  # on first use: importing torch and sentence-transformers takes seconds
        return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
