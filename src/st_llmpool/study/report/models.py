"""What the trained models cost, and what their layers hold before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...analysis.layers import LayerAnalysis, LayerProfile
from ...model_card.figures import draw_layers
from ...stats.comparison import Comparison
from ...stats.results import label
from ...stats.tables import Sheet
from ...utils.files import slug
from ..records import RunRecord
from .document import Document
from .runs import by_design

_LENGTH = 512  # tokens of the texts that scores are plotted against
_FIGURES = {
    "flops": ("GFLOPs", "{:.3f}", 1e9),
    "latency_ms": ("ms", "{:.1f}", 1),
    "peak_memory_mb": ("MiB", "{:,.1f}", 1),
}


def write_cost(document: Document, records: Sequence[RunRecord], comparison: Comparison | None) -> None:
    """Add parameters, operations, times and memory of each design, and quality against cost.

    Args:
        document: The report.
        records: Finished runs; a design's cost is that of its first run with a measured one.
        comparison: Where the scores are; None leaves the picture out.
    """
    if records and not any(record.cost for record in records):
        document.text("Inference cost was not measured in these runs; training time was.")
    bases = list(dict.fromkeys(record.base for record in records))
    for base in bases:
        runs = by_design([record for record in records if record.base == base])
        costs = {name: run.cost for name, own in runs.items() for run in reversed(own) if run.cost}
        suffix = f", {base}" if len(bases) > 1 else ""
        if costs:
            document.table(_cost_sheet(costs, suffix))
            if comparison is not None:
                _draw_cost(document, costs, _mean_scores(comparison, base), suffix)
        document.table(_training_sheet(runs, suffix))


def _cost_sheet(costs: dict[str, dict[str, Any]], suffix: str) -> Sheet:
    values = {
        design: {(figure, row["tokens"]): row.get(figure) for row in found["lengths"] for figure in _FIGURES}
        for design, found in costs.items()
    }
    lengths = dict.fromkeys(row["tokens"] for found in costs.values() for row in found["lengths"])
    cells = [(figure, length) for figure in _FIGURES for length in lengths]
    known = [cell for cell in cells if any(own.get(cell) is not None for own in values.values())]
    rows = []
    for design, found in costs.items():
        shown = [f"{found[part]:,}" for part in ("backbone", "adapter", "pooling")]
        for cell in known:
            (_, form, unit), value = _FIGURES[cell[0]], values[design].get(cell)
            shown.append("-" if value is None else form.format(value / unit))
        rows.append((design, *shown))
    machines = dict.fromkeys(f"{one['device']}, {one['dtype']}, {one['threads']} threads" for one in costs.values())
    below = f"Parameters; operations, time and memory on top of the weights for one text, on {'; '.join(machines)}."
    reasons = dict.fromkeys(
        f"{row['tokens']} tokens: {row['reason']}."
        for found in costs.values()
        for row in found["lengths"]
        if row.get("reason")
    )
    columns = ("Design", "Backbone", "Adapter", "Pooling", *(f"{_FIGURES[name][0]}\n{n} tokens" for name, n in known))
    return Sheet(f"Cost of inference{suffix}", columns, tuple(rows), (below, *reasons))


def _training_sheet(runs: dict[str, list[RunRecord]], suffix: str) -> Sheet:
    rows = []
    for name, own in runs.items():
        facts = [run.training for run in own]
        steps = [1000 * fact["wall_seconds"] / fact["steps"] for fact in facts if fact.get("steps")]
        trained = facts[0].get("trained_parameters")
        rows.append(
            (
                name,
                "-" if trained is None else f"{trained:,}",
                f"{np.mean(steps):,.0f}" if steps else "-",
                f"{np.mean([fact.get('wall_seconds', 0) for fact in facts]) / 60:.1f}",
                f"{np.mean([run.evaluation_seconds for run in own]) / 60:.1f}",
            )
        )
    columns = ("Design", "Trained parameters", "ms per step", "Minutes of training", "Minutes of evaluation")
    below = ("Means over the runs of a design; concurrent runs compete for the machine, so times are rough.",)
    return Sheet(f"Cost of training{suffix}", columns, tuple(rows), below)


def _mean_scores(comparison: Comparison, base: str) -> dict[str, float]:
    """Return the mean over task types of the mean over tasks, of designs that have all types."""
    tables = [kind.scores.dropna() for kind in comparison.types if kind.base == base]
    models = [str(model) for model in tables[0]] if tables else []
    return {
        model: float(np.mean([table[model].mean() for table in tables]))
        for model in models
        if all(model in table and len(table) for table in tables)
    }


def _draw_cost(document: Document, costs: dict[str, dict[str, Any]], scores: dict[str, float], suffix: str) -> None:
    from matplotlib.figure import Figure

    for figure_name in ("latency_ms", "flops"):
        unit_name, _, unit = _FIGURES[figure_name]
        points = {
            name: (row[figure_name] / unit, scores[name])
            for name, found in costs.items()
            for row in found["lengths"]
            if row["tokens"] == _LENGTH and row.get(figure_name) is not None and name in scores
        }
        if len(points) > 1:
            break
    else:
        return
    words = f"{unit_name} per text of {_LENGTH} tokens"
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    lowest, highest = (pick(x for x, _ in points.values()) for pick in (min, max))
    for name, (x, y) in points.items():
        axes.plot([x], [y], "o", color="tab:blue")
        side, offset = ("right", (-6, 4)) if x > lowest + 0.6 * (highest - lowest) else ("left", (6, 4))
        axes.annotate(name, (x, y), textcoords="offset points", xytext=offset, ha=side, fontsize=8)
    axes.margins(0.12)
    axes.set(xlabel=words, ylabel="mean score over task types")
    axes.grid(alpha=0.3)
    shown = "; ".join(f"{name}: {x:.3g}, {y:.4f}" for name, (x, y) in points.items())
    document.draw(
        figure,
        f"quality_against_cost{suffix}",
        alt=f"Scatter plot of the mean score against {words}. {shown}.",
        caption=f"Quality against cost: mean score over task types by {words}; up and to the left is better.",
    )


def write_layers(document: Document, records: Sequence[RunRecord]) -> None:
    """Add similarities between layers before and after training, scores of single layers, and the use of each."""
    analysed = [(record, LayerAnalysis.from_dict(record.layers)) for record in records if record.layers]
    if not analysed:
        if records:
            document.text("The layers of these runs were not analysed.")
        return
    several = len({record.base for record, _ in analysed}) > 1
    named = [
        (
            f"{label(record.design, record.option)}, seed {record.seed}" + (f", {record.base}" if several else ""),
            record.id,
            analysis,
        )
        for record, analysis in analysed
    ]
    document.text(
        "Similarity compares the readouts of two layers on the same texts: linear CKA (Kornblith et al. 2019), and "
        "Spearman's correlation of the cosine similarities of all pairs of texts. A single layer is scored by its "
        "readout without the pooling, on pairs and queries of the suite."
    )
    kinds = {"cka": "linear CKA", "correlation": "rank correlation"}
    columns = ("Run", *(f"{words}\n{when}" for words in kinds.values() for when in ("before", "after")))
    rows = tuple(
        (name, *(_number(_similarity(look, kind)) for kind in kinds for look in (analysis.before, analysis.after)))
        for name, _, analysis in named
    )
    below = ("Mean over all pairs of different layers: 1 if all layers agree.",)
    document.table(Sheet("Similarity between layers, before and after training", columns, rows, below))
    depth = max(len(analysis.after.search) for _, _, analysis in named)
    rows = tuple(
        (f"{name}: {probe}", *map(_number, values), *[""] * (depth - len(values)))
        for name, _, analysis in named
        for probe in ("similarity", "search")
        for values in [getattr(analysis.after, probe)]
    )
    columns = ("Run", *(f"Layer {number}" for number in range(1, depth + 1)))
    below = ("Similarity: Spearman with human scores; search: nDCG@10.",)
    document.table(Sheet("Single layers, after training", columns, rows, below))
    for name, run_id, analysis in named:
        file = document.folder / "figures" / f"layers_{slug(run_id)}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if draw_layers(file, analysis.to_dict()):
            words = _in_words(analysis)
            document.picture(file, alt=f"Layers of {name}: {words}.", caption=f"{name}: {words}.")


def _similarity(look: LayerProfile | None, kind: str) -> float | None:
    if look is None:
        return None
    matrix = np.asarray(getattr(look, kind), dtype=float)
    return float(np.nanmean(matrix[~np.eye(len(matrix), dtype=bool)]))


def _in_words(analysis: LayerAnalysis) -> str:
    """Say which single layer is best and which one the pooling uses most."""
    said = [f"layer {1 + int(np.nanargmax(np.asarray(analysis.after.search, dtype=float)))} alone searches best"]
    if analysis.attention:
        said.append(f"the pooling's weight is largest on layer {analysis.read[int(np.argmax(analysis.attention))]}")
    if analysis.moved:
        said.append(f"the embedding changes most without layer {analysis.read[int(np.argmax(analysis.moved))]}")
    return "; ".join(said)


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"
