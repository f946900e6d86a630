"""What the layers hold before and after training, and what the pooling reads of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...analysis.layers import LayerAnalysis, LayerProfile
from ...model_card.figures import draw_layers
from ...stats.compare import label
from ...stats.tables import Sheet, file_name
from ..records import RunRecord
from .document import Block, Picture, Table, Text

_SIMILARITIES = {"cka": "linear CKA", "correlation": "rank correlation"}


def layers(records: Sequence[RunRecord], folder: Path) -> list[Block]:
    """Returns similarities between layers before and after training, probes, and what the pooling reads.

    Args:
        records: Finished runs; those without examined layers are passed over.
        folder: Of the report.
    """
    examined = [(record, LayerAnalysis.from_dict(record.layers)) for record in records if record.layers]
    if not examined:
        return [Text("The layers of these runs were not examined.")] if records else []
    several = len({record.base for record, _ in examined}) > 1
    names = [
        f"{label(record.design, record.option)}, seed {record.seed}" + (f", {record.base}" if several else "")
        for record, _ in examined
    ]
    blocks: list[Block] = [
        Text(
            "Similarity is between the embeddings of the same texts at two layers, each the layer's readout: linear "
            "CKA (Kornblith et al. 2019), and Spearman's correlation of the cosine similarities of all pairs of texts. "
            "Alone is a layer's readout without the pooling, on pairs and searches of the suite."
        ),
        Table(_similar(names, [report for _, report in examined])),
        Table(_alone(names, [report for _, report in examined])),
    ]
    for name, (record, report) in zip(names, examined, strict=True):
        file = folder / "figures" / f"layers_{file_name(record.id)}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if draw_layers(file, report.to_dict()):
            blocks.append(Picture(file, f"Layers of {name}: {_in_words(report)}.", f"{name}: {_in_words(report)}."))
    return blocks


def _similar(names: Sequence[str], reports: Sequence[LayerAnalysis]) -> Sheet:
    columns = [f"{words}\n{when}" for words in _SIMILARITIES.values() for when in ("before", "after")]
    rows = [
        (
            name,
            *(_figure(_between(look, what)) for what in _SIMILARITIES for look in (report.before, report.after)),
        )
        for name, report in zip(names, reports, strict=True)
    ]
    below = "Mean over all pairs of different layers: 1 if every layer says the same."
    return Sheet("Similarity between layers, before and after training", ("Run", *columns), tuple(rows), (below,))


def _alone(names: Sequence[str], reports: Sequence[LayerAnalysis]) -> Sheet:
    depth = max(len(report.after.search) for report in reports)
    rows = [
        (f"{name}: {probe}", *(_figure(value) for value in getattr(report.after, probe)))
        for name, report in zip(names, reports, strict=True)
        for probe in ("similarity", "search")
    ]
    columns = ("Run", *(f"Layer {number}" for number in range(1, depth + 1)))
    below = "Similarity: Spearman with people's scores; search: nDCG@10."
    filled = tuple((*row, *[""] * (len(columns) - len(row))) for row in rows)
    return Sheet("Each layer alone, after training", columns, filled, (below,))


def _between(look: LayerProfile | None, what: str) -> float | None:
    if look is None:
        return None
    matrix = np.asarray(getattr(look, what), dtype=float)
    return float(np.nanmean(matrix[~np.eye(len(matrix), dtype=bool)]))


def _in_words(report: LayerAnalysis) -> str:
    """Says which layer is best alone and which the pooling reads most."""
    search = np.asarray(report.after.search, dtype=float)
    said = [f"alone, layer {1 + int(np.nanargmax(search))} searches best"]
    if report.attention:
        said.append(f"the pooling's weight is largest on layer {report.read[int(np.argmax(report.attention))]}")
    if report.moved:
        said.append(f"the embedding moves most without layer {report.read[int(np.argmax(report.moved))]}")
    return "; ".join(said)


def _figure(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"
