"""Measure how much an embedding depends on each layer that its pooling reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch.nn.functional import cosine_similarity

from ..modules.errors import ConfigurationError
from ..utils.random_state import preserve_modes

#: Default texts, of several kinds.
SAMPLE_TEXTS = (
    "Interest rates rose for the third time this year, said the bank.",
    "How do I reset the password of my account?",
    "def mean(values): return sum(values) / len(values)",
    "The cat sleeps on the warm stones of the terrace.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "A fast, reliable train connects both cities every half hour.",
    "what is the capital of australia",
    "The court found that the contract had been void from the beginning.",
)


_DECIMALS = 9


@dataclass(frozen=True)
class LayerUse:
    """Change of the embeddings without each layer.

    Attributes:
        layers: Numbers of the layers, from 1.
        moved: For each layer, mean over the texts of 1 - cos(embedding, embedding with this layer's summary replaced by
            its mean over the texts); 0 if the layer is not used or its contribution does not depend on the text.
        total: The same with all layers replaced.
    """

    layers: tuple[int, ...]
    moved: tuple[float, ...]
    total: float

    def to_rich(self) -> Table:
        """Return a table for the terminal, with a bar per layer."""
        table = Table(title="Change of the embedding without a layer", title_justify="left")
        for heading in ("layer", "1 - cosine", ""):
            table.add_column(heading, justify="left" if not heading else "right")
        for layer, moved in zip(self.layers, self.moved, strict=True):
            bar = "█" * round(30 * moved / max(*self.moved, 1e-12))
            table.add_row(str(layer), f"{moved:.4f}", bar)
        table.add_row("all", f"{self.total:.4f}", "")
        return table


def layer_use(model: SentenceTransformer, texts: Sequence[str] = SAMPLE_TEXTS) -> LayerUse:
    """Measure how much the embeddings depend on each layer's summary.

    The backbone runs once. Then the pooling runs with one layer's summaries replaced by their mean over the texts,
    which removes the layer's information about the text and keeps its scale.

    Args:
        model: A model whose pooling reads layers.
        texts: At least two texts.

    Raises:
        ConfigurationError: If the design reads no layers, or fewer than two texts are given.

    Example:
        >>> from st_llmpool import build_embedder
        >>> from st_llmpool.data import builtin_backbone
        >>> use = layer_use(build_embedder(builtin_backbone(), pooling="scalar_mix", verify=False))
        >>> len(use.moved)
        6
    """
    if len(texts) < 2:
        raise ConfigurationError(f"Layer use is measured on at least 2 texts; got {len(texts)}.")
    with preserve_modes(model):
        features = model[0](batch_to_device(model.preprocess(list(texts)), model.device))
        summaries = features.get("layer_summaries")
        if summaries is None:
            raise ConfigurationError(
                "The pooling of this design reads only the last layer, so there is no layer use to measure."
            )
        silent = summaries.mean(dim=0, keepdim=True).expand_as(summaries)
        full = _pool(model, features, summaries)
        moved = []
        for index in range(summaries.shape[1]):
            without = summaries.clone()
            without[:, index] = silent[:, index]
            moved.append(_distance(full, _pool(model, features, without)))
        return LayerUse(tuple(model[0].layers), tuple(moved), _distance(full, _pool(model, features, silent)))


def _pool(model: SentenceTransformer, features: dict[str, object], summaries: torch.Tensor) -> torch.Tensor:
    features = {**features, "layer_summaries": summaries}
    for module in list(model)[1:]:
        features = module(features)
    return features["sentence_embedding"].double()  # type: ignore[attr-defined]


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the mean of 1 - cosine, with rounding errors set to 0."""
    return round((1 - cosine_similarity(first, second)).clamp(min=0).mean().item(), _DECIMALS)
