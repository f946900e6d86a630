"""The losses that a recipe can name, each built from sentence-transformers' own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    DistillKLDivLoss,
    GISTEmbedLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor, nn

from ..fast_inference import optimized_inference
from ..modules.errors import ConfigurationError, DataError, check_choice
from .focal_ranking_loss import CachedFocalRankingLoss, FocalRankingLoss
from .hard_negative_mixing import HardNegativeMixing
from .settings import LossSettings

if TYPE_CHECKING:
    from datasets import Dataset

#: Rows whose teacher embeddings are held in memory at a time.
ROWS_AT_A_TIME = 10_000


@dataclass(frozen=True)
class LossParts:
    """Inputs of a loss other than the model and its settings.

    Attributes:
        gather: Also use the other processes' texts as negatives.
        mixing: Mixes more negatives, for ``infonce``.
        guide: Model that filters false negatives, for ``gist``.
    """

    gather: bool = False
    mixing: HardNegativeMixing | None = None
    guide: SentenceTransformer | None = None


def infonce(model: SentenceTransformer, settings: LossSettings, parts: LossParts) -> nn.Module:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4) over all positives and hard negatives of the batch.

    L = -mean_i log(exp(s cos(q_i, p_i)) / sum_d exp(s cos(q_i, d))), where d runs over the positives and negatives of
    all queries. With ``focal_gamma`` or mixed negatives it is :class:`FocalRankingLoss`.
    """
    options: dict[str, Any] = {"scale": settings.scale, "gather_across_devices": parts.gather}
    if settings.focal_gamma > 0 or parts.mixing is not None:
        options |= {"focal_gamma": settings.focal_gamma, "detach_focal": settings.focal_detach}
        if settings.mini_batch_size is None:
            return FocalRankingLoss(model, mixing=parts.mixing, **options)
        return CachedFocalRankingLoss(model, mini_batch_size=settings.mini_batch_size, mixing=parts.mixing, **options)
    if settings.mini_batch_size is None:
        return MultipleNegativesRankingLoss(model, **options)
    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=settings.mini_batch_size, **options)


def gist(model: SentenceTransformer, settings: LossSettings, parts: LossParts) -> nn.Module:
    """InfoNCE without the negatives that a guide model considers positives (GISTEmbed, Solatorio 2024, 2402.16829).

    A text of the batch that the guide finds closer to the query than the query's positive is left out.
    """
    options: dict[str, Any] = {"temperature": 1 / settings.scale, "gather_across_devices": parts.gather}
    if settings.mini_batch_size is None:
        return GISTEmbedLoss(model, parts.guide, **options)
    return CachedGISTEmbedLoss(model, parts.guide, mini_batch_size=settings.mini_batch_size, **options)


def distill(model: SentenceTransformer, settings: LossSettings, parts: LossParts) -> nn.Module:
    """KL divergence from a teacher's to the model's distribution over a query's own documents (arXiv 2010.11386).

    Both are the softmax of scaled cosine similarities to the positive and the hard negatives; the teacher's are the
    labels that :func:`teacher_scores` adds to the data, so the teacher reads every text once.
    """
    return DistillKLDivLoss(model, similarity_fct=partial(scaled_cosine, scale=settings.scale))


def scaled_cosine(first: Tensor, second: Tensor, *, scale: float) -> Tensor:
    """Return the scaled cosine similarity of each row (B, D) to the other's, (B,)."""
    return pairwise_cos_sim(first, second) * scale


def teacher_scores(pairs: Dataset, teacher: SentenceTransformer, *, scale: float, batch_size: int) -> Dataset:
    """Add the teacher's scaled cosine similarities of each query to its documents as the column ``label``.

    `pairs` has the columns ``query``, ``positive`` and negatives; the teacher reads them with its own prompts.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    labels: list[list[float]] = []
    with optimized_inference(teacher):
        for rows in pairs.iter(batch_size=ROWS_AT_A_TIME):
            queries = teacher.encode_query(rows.pop("query"), **options)
            documents = [teacher.encode_document(texts, **options) for texts in rows.values()]
            scores = [scaled_cosine(queries, column, scale=scale) for column in documents]
            labels += torch.stack(scores, dim=1).tolist()
    return pairs.add_column("label", labels)


@dataclass(frozen=True)
class LossSpec:
    """A loss that a recipe can name.

    Attributes:
        build: Called with model, settings and parts.
        options: The settings that only some losses have.
        needs: The required one among them.
        columns: Minimum number of columns, query and positive included.
    """

    build: Callable[[SentenceTransformer, LossSettings, LossParts], nn.Module]
    options: tuple[str, ...]
    needs: str | None = None
    columns: int = 2


#: Loss name -> spec.
LOSSES: dict[str, LossSpec] = {
    "infonce": LossSpec(infonce, ("mini_batch_size", "focal_gamma", "focal_detach", "mixing")),
    "gist": LossSpec(gist, ("mini_batch_size", "guide"), needs="guide"),
    "distill": LossSpec(distill, ("teacher",), needs="teacher", columns=3),
}


def build_loss(model: SentenceTransformer, settings: LossSettings, parts: LossParts | None = None) -> nn.Module:
    """Build the loss that `settings` describe, with its other inputs, if any."""
    parts = parts or LossParts()
    if parts.guide is not None:
        parts.guide.requires_grad_(False)  # it is a submodule of the loss, whose weights would otherwise train
    loss = LOSSES[settings.name].build(model, settings, parts)
    if settings.matryoshka_dims is None:
        return loss
    size = model.get_embedding_dimension()
    if max(settings.matryoshka_dims) > size:
        raise ConfigurationError(
            f"loss.matryoshka_dims={settings.matryoshka_dims} go beyond the {size} dimensions of the model."
        )
    return MatryoshkaLoss(model, loss, sorted({*settings.matryoshka_dims, size}))


def check_loss(settings: LossSettings) -> None:
    """Check the loss's name, and that its options apply and are complete."""
    check_choice("loss.name", settings.name, tuple(LOSSES))
    spec = LOSSES[settings.name]
    if spec.needs is not None and getattr(settings, spec.needs) is None:
        raise ConfigurationError(
            f"loss.name={settings.name} needs loss.{spec.needs}: the name or folder of a sentence-transformers model."
        )
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        having = [name for name, other in LOSSES.items() if field.name in other.options]
        if value != field.default and having and settings.name not in having:
            raise ConfigurationError(
                f"loss.{field.name}={value!r} does not apply to loss.name={settings.name}. Remove it, or use {having}."
            )


def check_columns(datasets: Mapping[str, Dataset], settings: LossSettings) -> None:
    """Check that datasets have the hard negatives that the loss needs, and no more than it supports."""
    for name, dataset in datasets.items():
        found = len(dataset.column_names)
        if found < LOSSES[settings.name].columns:
            raise DataError(
                f"The set {name!r} has no hard negatives, but loss.name={settings.name} compares a query's positive to "
                f"its own negatives. Name its columns of negatives, as in columns: {{negative: [hard_1, hard_2]}}."
            )
        if settings.name == "gist" and settings.mini_batch_size is None and found > 3:
            raise DataError(
                f"The set {name!r} has {found - 2} hard negatives per query, but loss.name=gist supports one. Set "
                f"loss.num_negatives=1, or loss.mini_batch_size, which supports all."
            )
