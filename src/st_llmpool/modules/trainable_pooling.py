"""What all trainable poolings share: float32 whatever the backbone's dtype, a plain start, and checked settings."""

from __future__ import annotations

import math
import reprlib
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from .errors import ConfigurationError, check_choice
from .layer_readout import unflatten
from .portable import PortableModule

#: Limits that no sensible pooling reaches: of one size, and of the numbers in one weight matrix (16 GiB in float32).
_LARGEST_SIZE, _LARGEST_MATRIX = 2**20, 2**32


class TrainablePooling(PortableModule):
    """Base of the poolings with parameters: a subclass defines in ``pool`` how features become (B, D).

    Parameters stay float32 when the model is cast, as sentence-transformers does at load, and autocast is off inside:
    in bfloat16 nearly all updates of size 1e-5 would round to nothing.

    Args:
        embedding_dimension: Hidden size D of the backbone and size of the embedding.
        readout_skip: Embedding = r + U · pooled, where r is the plain readout of the last layer. A subclass makes
            U, ``to_embedding``, by :func:`zero_linear`, so that training starts from the plain baseline.
    """

    #: What trainers use by default: these parameters start from scratch, the backbone's do not.
    default_learning_rate: float = 1e-3

    def __init__(self, embedding_dimension: int, *, readout_skip: bool = False) -> None:
        super().__init__()
        check_sizes(embedding_dimension=embedding_dimension)
        check_choice("readout_skip", readout_skip, (True, False))
        self.embedding_dimension = embedding_dimension
        self.readout_skip = readout_skip
        self.to_embedding: nn.Module = nn.Identity()

    @abstractmethod
    def pool(self, features: dict[str, Any]) -> Tensor:
        """Return the embeddings (B, D); runs without autocast."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add ``sentence_embedding`` (B, D) to the features; `kwargs` are other modules'."""
        device = next(iter(self.parameters()), torch.empty(0)).device.type  # "meta" has no autocast
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            features["sentence_embedding"] = self.pool(features)
        return features

    def embeddings_from(self, features: dict[str, Any], pooled: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return r + U · pooled in the dtype of ``readout`` r (B, D); without the skip U · pooled in `dtype`."""
        projected = self.to_embedding(pooled)
        if not self.readout_skip:
            return projected.to(dtype)
        readout = self._require(features, "readout")
        return (readout.float() + projected).to(readout.dtype)

    def tokens(self, features: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the last layer's tokens (B, T, D) and True for the real ones (B, T); pads flat input on the right."""
        tokens = self._require(features, "token_embeddings")
        if "cu_seq_lens_q" in features:
            return unflatten(tokens, features["cu_seq_lens_q"])
        return tokens, self._require(features, "attention_mask").bool()

    def layer_summaries(self, features: dict[str, Any], num_layers: int) -> Tensor:
        """Return the layers' summaries (B, L, D)."""
        summaries = self._require(features, "layer_summaries")
        if (found := summaries.shape[1]) != num_layers:
            built = f"{type(self).__name__} was built with num_layers={num_layers}, but the backbone gives {found}"
            raise ConfigurationError(f"{built} layers. Build it with num_layers={found}.")
        return summaries

    def _require(self, features: dict[str, Any], key: str) -> Tensor:
        if key not in features:
            reads = f"{type(self).__name__} reads the feature {key!r}, which no earlier module gives"
            raise ConfigurationError(f"{reads}. Use LLMTransformer with layers, or readout_skip=False.")
        if key != "attention_mask" and (found := features[key].shape[-1]) != self.embedding_dimension:
            built = f"{type(self).__name__} was built with embedding_dimension={self.embedding_dimension}"
            raise ConfigurationError(f"{built}, but the backbone gives {found}. Build it with that.")
        return features[key]

    def get_embedding_dimension(self) -> int:
        """Return D."""
        return self.embedding_dimension

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as asked but keep float32; ``to``, ``half``, ``bfloat16``, ``cuda`` and ``float`` all end here."""

        def keep_float32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            half = result.is_floating_point() and result.dtype != torch.float32
            return tensor.to(device=result.device, dtype=torch.float32) if half else result

        return super()._apply(keep_float32, recurse)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a projection without bias whose weights are zero."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def check_sizes(**sizes: Any) -> None:
    """Raise ConfigurationError if a size is no positive integer, or a matrix of all of them would not be sensible."""
    for name, value in sizes.items():
        if type(value) is not int or not 0 < value <= _LARGEST_SIZE:
            shown = reprlib.repr(value)
            raise ConfigurationError(f"{name}={shown} must be a positive integer up to {_LARGEST_SIZE:,}.")
    if math.prod(sizes.values()) > _LARGEST_MATRIX:
        product = " x ".join(f"{name}={value}" for name, value in sizes.items())
        raise ConfigurationError(f"{product}: a matrix may hold {_LARGEST_MATRIX:,} numbers. Use smaller sizes.")


def check_number(name: str, value: Any, lowest: float, highest: float) -> None:
    """Raise ConfigurationError unless `value` is a number from `lowest` to `highest`."""
    if type(value) not in (int, float) or not lowest <= value <= highest:
        raise ConfigurationError(f"{name}={reprlib.repr(value)} must be a number from {lowest:g} to {highest:g}.")
