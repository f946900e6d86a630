"""The settings of the loss in a recipe; importing them needs neither torch nor sentence-transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..utils.settings import NonNegativeInt, PositiveInt, Range, Settings


@dataclass
class MixingSettings(Settings):
    """New negatives that are mixed from a query's hardest ones; :class:`HardNegativeMixing` says how.

    Attributes:
        hardest: The k highest-scoring documents that are not the positive, which are mixed.
        pairwise: Number of random blends of two of them per query.
        listwise: Add the blend of all of them, weighted by similarity.
        start_step: Mix from this step on; 0 is the first.
        detach: Detach mixed negatives (stop-gradient).
    """

    where = "loss.mixing"

    hardest: Annotated[int, Range(2)] = 8
    pairwise: NonNegativeInt = 2
    listwise: bool = True
    start_step: NonNegativeInt = 0
    detach: bool = True

    @property
    def count(self) -> int:
        """Mixed negatives of a query."""
        return self.pairwise + self.listwise


@dataclass
class LossSettings(Settings):
    """The loss.

    Attributes:
        name: A name in ``st_llmpool.losses.build.LOSSES``.
        scale: Inverse temperature, which multiplies cosine similarities.
        num_negatives: Hard negatives per query; None uses all that a dataset has.
        mini_batch_size: Number of texts per forward pass with gradient caching (Gao et al. 2021, arXiv 2101.06983),
            so that memory no longer grows with the batch; None embeds the batch at once.
        gather_across_devices: Use the texts of all processes as negatives.
        focal_gamma: Weight each query by (1 - P)^gamma, P its probability of finding its positive, so that hard queries
            count more (KaLM-Embedding-V2, arXiv 2506.20923, uses 0.5); 0 weights all equally.
        focal_detach: Detach the focal weights (stop-gradient).
        mixing: Mix new negatives from the hardest ones; None mixes none, ``{}`` uses the defaults.
        guide: For ``gist``, the model (name or folder) that says which texts of a batch are no negatives.
        teacher: For ``distill``, the model (name or folder) whose similarities are learned.
        matryoshka_dims: Train the first N dimensions as an embedding of their own, for each N in the list and the full
            size (Matryoshka, Kusupati et al. 2022, arXiv 2205.13147). Evaluation on held-out pairs
            reports every size; ``model.truncate_dim`` says which one the saved model gives.
    """

    where = "loss"

    name: str = "infonce"
    scale: Annotated[float, Range(0, 1e4, is_open=True)] = 20.0
    num_negatives: NonNegativeInt | None = None
    mini_batch_size: PositiveInt | None = None
    gather_across_devices: bool = True
    focal_gamma: Annotated[float, Range(0, 100)] = 0.0
    focal_detach: bool = True
    mixing: MixingSettings | None = None
    guide: str | None = None
    teacher: str | None = None
    matryoshka_dims: list[int] | None = None
