"""Layer analysis: similarity and probe scores of single layers before and after training, and use by the pooling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from scipy.stats import rankdata, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..model_card.layer_use import layer_use
from ..modules.errors import ConfigurationError, DataError
from ..modules.layer_readout import TokenSpans
from ..summary_cache.cached_backbone import layers_below_the_last
from ..utils.random_state import preserve_modes
from ..utils.settings import from_mapping

Matrix = list[list[float | None]]

#: A text, a paraphrase, and another text of the same topic on each line.
_TRIPLES = Path(__file__).with_name("probes.tsv")
_LEGEND = (
    "similarity, search: score of the layer alone on the built-in probes, 0 to 1. CKA to last: likeness to the last "
    "layer, 0 to 1. Of the layers that the pooling reads, attention: its weight on the layer; |W|: norm of the layer's "
    "trained weights; moves by: change of the embedding without the layer (1 - cosine)."
)
_OF_READ_LAYERS = {"attention": "attention", "weight_norms": "|W|", "moved": "moves by"}


@dataclass(frozen=True)
class Probes:
    """Texts that single layers are scored on.

    Args:
        pairs: First text, second text, human similarity score.
        queries: Queries.
        documents: Document i answers query i; further documents answer none.
    """

    pairs: tuple[tuple[str, str, float], ...]
    queries: tuple[str, ...]
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.pairs) < 2 or not 0 < len(self.queries) <= len(self.documents):
            raise DataError(
                f"{len(self.pairs)} pairs, {len(self.queries)} queries, {len(self.documents)} documents are too "
                f"few: give two pairs, one query and a document for each query."
            )

    @property
    def texts(self) -> list[str]:
        """All distinct texts."""
        pairs = [text for first, second, _ in self.pairs for text in (first, second)]
        return list(dict.fromkeys([*pairs, *self.queries, *self.documents]))


@dataclass(frozen=True)
class LayerProfile:
    """The layers of one model, each by its layer readout alone.

    Args:
        cka: (L, L) linear CKA between layers.
        correlation: (L, L) Spearman correlation between layers of the cosine similarities of all pairs of texts.
        similarity: Spearman correlation of each layer on the similarity probe.
        search: nDCG@10 of each layer on the search probe.
        norms: Mean norm of each layer's embeddings.
    """

    cka: Matrix
    correlation: Matrix
    similarity: list[float | None]
    search: list[float | None]
    norms: list[float | None]


@dataclass(frozen=True)
class LayerAnalysis:
    """The layers of a model. What is undefined, or does not exist in its design, is None.

    Args:
        texts: Number of texts that similarities between layers are computed on.
        readout: Layer readout.
        after: The model.
        before: The model before training; None if none was given.
        change: Linear CKA of each layer with itself before training.
        read: Numbers of the layers that the pooling reads, from 1.
        attention: The pooling's weight of each of these, mean over texts.
        weight_norms: Norm of each of these layers' rows in the trained layer weights W.
        moved: Change of the embedding without each of these, see `layer_use`.
    """

    texts: int
    readout: str
    after: LayerProfile
    before: LayerProfile | None
    change: list[float | None] | None
    read: list[int]
    attention: list[float] | None
    weight_norms: list[float] | None
    moved: list[float] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LayerAnalysis:
        """Return the analysis from the output of `to_dict`."""
        return from_mapping(cls, content)

    def to_rich(self) -> Table:
        """Return a table for the terminal, one row per layer."""
        title = f"Each layer ({self.readout} of its tokens, {self.texts} texts)"
        table = Table(title=title, title_justify="left", caption=_LEGEND, caption_justify="left")
        own = {name: dict(zip(self.read, getattr(self, name) or [], strict=False)) for name in _OF_READ_LAYERS}
        for heading in ("layer", "similarity", "search", "CKA to last", *_OF_READ_LAYERS.values()):
            table.add_column(heading, justify="right")
        for index in range(len(self.after.search)):
            values = [self.after.similarity[index], self.after.search[index], self.after.cka[index][-1]]
            values += [own[name].get(index + 1) for name in _OF_READ_LAYERS]
            table.add_row(str(index + 1), *("" if value is None else f"{value:.3f}" for value in values))
        return table


def analyze_layers(
    before: SentenceTransformer | None,
    after: SentenceTransformer,
    texts: Sequence[str] | None = None,
    *,
    probes: Probes | None = None,
    batch_size: int = 32,
) -> LayerAnalysis:
    """Analyse every layer of a model, including those that its design does not read; one forward per text.

    Args:
        before: The model before training, of the same depth; None for none.
        after: The model.
        texts: At least three texts for similarities between layers; by default the probes' texts.
        probes: Probes for single layers; by default the built-in ones.
        batch_size: Batch size.

    Raises:
        ConfigurationError: If there are too few texts, a backbone is no `LLMTransformer`, or the depths differ.

    Example:
        >>> from st_llmpool import build_embedder
        >>> from st_llmpool.data import builtin_backbone
        >>> report = analyze_layers(None, build_embedder(builtin_backbone(), verify=False))
        >>> len(report.after.cka), round(sum(report.attention), 6)
        (6, 1.0)
    """
    probes = probes or sample_probes()
    texts = probes.texts if texts is None else list(texts)
    if len(texts) < 3:
        raise ConfigurationError(f"{len(texts)} texts: similarities between layers compare texts; give at least 3.")
    wanted = list(dict.fromkeys([*texts, *probes.texts]))
    row = {text: number for number, text in enumerate(wanted)}
    chosen = [row[text] for text in texts]
    embeddings = layer_embeddings(after, wanted, batch_size=batch_size)
    look, earlier, change = _look(embeddings, chosen, row, probes), None, None
    if before is not None:
        first = layer_embeddings(before, wanted, batch_size=batch_size)
        if first.shape[1] != embeddings.shape[1]:
            raise ConfigurationError(
                f"before has {first.shape[1]} layers and after {embeddings.shape[1]}: not one base."
            )
        earlier = _look(first, chosen, row, probes)
        change = _numbers(linear_cka(first[chosen], embeddings[chosen]).diagonal())
    read, table = list(after[0].layers), getattr(after[1], "layer_table", None)
    return LayerAnalysis(
        texts=len(texts),
        readout=after[0].layer_readout,
        after=look,
        before=earlier,
        change=change,
        read=read,
        attention=_attention(after, texts, batch_size) if read else None,
        weight_norms=None if table is None else table.detach().float().norm(dim=1).tolist(),
        moved=list(layer_use(after, texts).moved) if read else None,
    )


def layer_embeddings(model: SentenceTransformer, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
    """Return the layer readout of every layer of the backbone, (N, L, D) in float32 on the CPU.

    The last layer is after the final norm, as the poolings read it.
    """
    backbone = model[0]
    if not hasattr(backbone, "layer_readout"):
        raise ConfigurationError(f"the backbone is a {type(backbone).__name__}; layers are read from LLMTransformer.")
    runner = getattr(backbone, "batch_runner", None)
    backbone.batch_runner = None  # the hooks are for padded batches
    try:
        with preserve_modes(model):
            return torch.cat([_read_layers(backbone, features) for features in _batches(model, texts, batch_size)])
    finally:
        backbone.batch_runner = runner


def _read_layers(backbone: Any, features: dict[str, Any]) -> Tensor:
    spans = TokenSpans.of(features, include_prompt=backbone.include_prompt)
    with layers_below_the_last(backbone, spans, [backbone.layer_readout]) as rows:
        last = backbone(features)["readout"].float().cpu()
    return torch.stack([*(row[:, 0] for row in rows), last], dim=1)


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Return linear CKA (L, M) between all layers of (N, L, D) and (N, M, E).

    Kornblith et al. 2019, arXiv 1905.00414, eq. 3-4: ⟨K, L⟩ / (‖K‖ ‖L‖) with the Gram matrices of the
    centred embeddings; NaN where one is constant over the texts.
    """

    def grams(embeddings: Tensor) -> Tensor:
        centred = embeddings.double().transpose(0, 1)
        centred = centred - centred.mean(dim=1, keepdim=True)
        flat = (centred @ centred.mT).flatten(1)
        return flat / flat.norm(dim=1, keepdim=True)

    return grams(first) @ grams(second).T


def similarity_correlation(embeddings: Tensor) -> Tensor:
    """Return Spearman's correlation between layers (N, L, D) of the similarities of all pairs of texts, (L, L).

    NaN where all similarities of a layer are equal.
    """
    units = normalize(embeddings.double(), dim=-1).transpose(0, 1)
    first, second = torch.triu_indices(units.shape[1], units.shape[1], offset=1)
    ranks = torch.from_numpy(rankdata((units @ units.mT)[:, first, second].numpy(), axis=1))
    return torch.atleast_2d(torch.corrcoef(ranks))


def _look(embeddings: Tensor, chosen: list[int], row: Mapping[str, int], probes: Probes) -> LayerProfile:
    first, second, scores = zip(*probes.pairs, strict=True)
    pairs = [embeddings[[row[text] for text in side]] for side in (first, second)]
    search = [embeddings[[row[text] for text in side]] for side in (probes.queries, probes.documents)]
    layers = range(embeddings.shape[1])
    return LayerProfile(
        cka=[_numbers(line) for line in linear_cka(embeddings[chosen], embeddings[chosen])],
        correlation=[_numbers(line) for line in similarity_correlation(embeddings[chosen])],
        similarity=_numbers(similarity_score(pairs[0][:, n], pairs[1][:, n], scores) for n in layers),
        search=_numbers(search_score(search[0][:, n], search[1][:, n]) for n in layers),
        norms=_numbers(embeddings[chosen].norm(dim=-1).mean(dim=0)),
    )


def layer_attention(pooling: Any, features: Mapping[str, Any]) -> Tensor | None:
    """Return the weight of each layer in a pooling over layers, (B, L): attention averaged over latents and heads.

    None for other poolings, and with ``queries="inputs"``, where all layers have equal weight.
    """
    if hasattr(pooling, "layer_scores"):
        return pooling.layer_scores.softmax(dim=0).expand(len(features["layer_summaries"]), -1)
    if not hasattr(pooling, "layer_weights") or pooling.queries == "inputs":
        return None
    rows = features["layer_summaries"].float()
    if getattr(pooling, "layer_norm", False):  # models of before it lack the setting
        rows = torch.nn.functional.layer_norm(rows, rows.shape[-1:])
    rows = rows + pooling.layer_table if pooling.layer_weights else rows
    block = pooling.cross_attention
    return block._scores(block.norm_inputs(rows), None).softmax(dim=1).mean(dim=(2, 3))


def _attention(model: SentenceTransformer, texts: Sequence[str], batch_size: int) -> list[float] | None:
    parts = []
    with preserve_modes(model):
        for features in _batches(model, texts, batch_size):
            weights = layer_attention(model[1], model[0](features))
            if weights is None:
                return None
            parts.append(weights.float().cpu())
    return torch.cat(parts).mean(dim=0).tolist()


def _batches(model: SentenceTransformer, texts: Sequence[str], size: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(texts), size):
        yield batch_to_device(model.preprocess(list(texts[start : start + size])), model.device)


def _numbers(values: Any) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]


def sample_probes() -> Probes:
    """Return the built-in probes, 36 pairs and 12 queries in 24 documents; they show large differences only."""
    rows = [line.split("\t") for line in _TRIPLES.read_text(encoding="utf-8").splitlines()]
    firsts, same, others = (tuple(texts) for texts in zip(*rows, strict=True))
    unrelated = same[1:] + same[:1]
    pairs = [(text, second, 2.0) for text, second in zip(firsts, same, strict=True)]
    pairs += [(text, second, 1.0) for text, second in zip(firsts, others, strict=True)]
    pairs += [(text, second, 0.0) for text, second in zip(firsts, unrelated, strict=True)]
    return Probes(tuple(pairs), firsts, same + others)


def similarity_score(first: Tensor, second: Tensor, scores: Sequence[float]) -> float:
    """Return Spearman's correlation of cosine similarities of (B, D) and (B, D) with scores; NaN if undefined."""
    cosines = cosine_similarity(first.double(), second.double(), dim=-1)
    if cosines.max() == cosines.min():
        return float("nan")
    return float(spearmanr(cosines.numpy(), scores).statistic)


def search_score(queries: Tensor, documents: Tensor) -> float:
    """Return nDCG@10 by cosine, mean over queries (Q, D), where document i of (N, D) is the only answer of query i.

    With one answer nDCG is 1 / log2(1 + rank); the answer ranks last among ties.
    """
    cosines = normalize(queries.double(), dim=-1) @ normalize(documents.double(), dim=-1).T
    ranks = (cosines >= cosines.diagonal().unsqueeze(-1)).sum(dim=-1)
    return float(torch.where(ranks <= 10, 1 / torch.log2(1.0 + ranks), 0.0).mean())
