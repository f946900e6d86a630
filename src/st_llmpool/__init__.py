"""st_llmpool turns decoder LLMs into text-embedding models, as a plugin for sentence-transformers."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from .modules.errors import __version__

if TYPE_CHECKING:
    from .attention_proof import AttentionReport, verify_attention
    from .designs import DESIGNS, POOLINGS, build_embedder
    from .fast_inference import optimize_inference
    from .modules.attention import set_attention

__all__ = [
    "DESIGNS",
    "POOLINGS",
    "AttentionReport",
    "__version__",
    "build_embedder",
    "optimize_inference",
    "set_attention",
    "verify_attention",
]

# A missing optional kernel, which no user can act on.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_FILES = {
    "DESIGNS": ".designs",
    "POOLINGS": ".designs",
    "build_embedder": ".designs",
    "optimize_inference": ".fast_inference",
    "set_attention": ".modules.attention",
    "AttentionReport": ".attention_proof",
    "verify_attention": ".attention_proof",
}


def __getattr__(name: str) -> object:
    if name in _FILES:  # on first use: importing torch and sentence-transformers takes seconds
        return getattr(importlib.import_module(_FILES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
