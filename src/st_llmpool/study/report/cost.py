"""What each design costs, and what its scores are for that: a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...stats.compare import Comparison
from ...stats.tables import Sheet, file_name
from ..records import RunRecord
from .convergence import by_design
from .document import Block, Picture, Table, Text, save_picture

_LENGTH = 512  # tokens of the texts that scores are set against


def cost(records: Sequence[RunRecord], comparison: Comparison | None, folder: Path) -> list[Block]:
    """Returns parameters, operations, times and memory of each design, and quality against cost.

    Args:
        records: Finished runs; the first one of a design with a measured cost stands for it.
        comparison: Where the scores are; None leaves the picture out.
        folder: Of the report.
    """
    blocks: list[Block] = []
    bases = list(dict.fromkeys(record.base for record in records))
    for base in bases:
        runs = by_design([record for record in records if record.base == base])
        measured = {name: next((run.cost for run in own if run.cost), None) for name, own in runs.items()}
        costs = {name: found for name, found in measured.items() if found}
        several = f", {base}" if len(bases) > 1 else ""
        if costs:
            blocks.append(Table(_sheet(costs, several)))
            scores = _mean_scores(comparison, base) if comparison is not None else {}
            blocks += _pictures(costs, scores, several, folder)
        blocks.append(Table(_training(runs, several)))
    if blocks and not any(record.cost for record in records):
        blocks.insert(0, Text("Inference cost was not measured in these runs; training time was."))
    return blocks


def _sheet(costs: dict[str, dict[str, Any]], several: str) -> Sheet:
    lengths = list(dict.fromkeys(row["tokens"] for found in costs.values() for row in found["lengths"]))
    figures = {
        "flops": ("GFLOPs", "{:.3f}", 1e9),
        "latency_ms": ("ms", "{:.1f}", 1),
        "peak_memory_mb": ("MiB", "{:,.1f}", 1),
    }
    rows, reasons, columns = [], [], ["Design", "Backbone", "Adapter", "Pooling"]
    known = [(name, length) for name in figures for length in lengths if _any(costs, name, length)]
    columns += [f"{figures[name][0]}\n{length} tokens" for name, length in known]
    for design, found in costs.items():
        by_length = {row["tokens"]: row for row in found["lengths"]}
        cells = [f"{found[part]:,}" for part in ("backbone", "adapter", "pooling")]
        for name, length in known:
            value, (_, form, unit) = by_length.get(length, {}).get(name), figures[name]
            cells.append(form.format(value / unit) if value is not None else "-")
        rows.append((design, *cells))
        reasons += [f"{row['tokens']} tokens: {row['reason']}." for row in found["lengths"] if row.get("reason")]
    places = dict.fromkeys(
        f"{found['device']}, {found['dtype']}, {found['threads']} threads" for found in costs.values()
    )
    below = f"Parameters; operations, time and memory beside the weights for one text, on {'; '.join(places)}."
    return Sheet(f"Cost of inference{several}", tuple(columns), tuple(rows), (below, *dict.fromkeys(reasons)))


def _any(costs: dict[str, dict[str, Any]], name: str, length: int) -> bool:
    rows = (row for found in costs.values() for row in found["lengths"] if row["tokens"] == length)
    return any(row.get(name) is not None for row in rows)


def _training(runs: dict[str, list[RunRecord]], several: str) -> Sheet:
    rows = []
    for name, own in runs.items():
        facts = [run.training for run in own]
        steps = [1000 * fact["wall_seconds"] / fact["steps"] for fact in facts if fact.get("steps")]
        trained = facts[0].get("trained_parameters")
        rows.append(
            (
                name,
                f"{trained:,}" if trained is not None else "-",
                f"{sum(steps) / len(steps):,.0f}" if steps else "-",
                f"{sum(fact.get('wall_seconds', 0) for fact in facts) / len(facts) / 60:.1f}",
                f"{sum(run.evaluation_seconds for run in own) / len(own) / 60:.1f}",
            )
        )
    columns = ("Design", "Trained parameters", "ms per step", "Minutes of training", "Minutes of evaluation")
    below = ("Means over the runs of a design; runs at the same time share the machine, so times are rough.",)
    return Sheet(f"Cost of training{several}", columns, tuple(rows), below)


def _mean_scores(comparison: Comparison, base: str) -> dict[str, float]:
    """Returns the mean over task types of the mean over tasks, of designs that have all types."""
    tables = [kind.scores.dropna() for kind in comparison.types if kind.base == base]
    models = [str(model) for model in tables[0]] if tables else []
    return {
        model: sum(table[model].mean() for table in tables) / len(tables)
        for model in models
        if all(model in table and len(table) for table in tables)
    }


def _pictures(costs: dict[str, dict[str, Any]], scores: dict[str, float], several: str, folder: Path) -> list[Picture]:
    wanted = [
        ("latency_ms", f"ms per text of {_LENGTH} tokens", 1.0),
        ("flops", f"GFLOPs per text of {_LENGTH} tokens", 1e9),
    ]
    for what, words, unit in wanted:
        points = {}
        for name, found in costs.items():
            row: dict[str, Any] = next((row for row in found["lengths"] if row["tokens"] == _LENGTH), {})
            if row.get(what) is not None and name in scores:
                points[name] = (row[what] / unit, scores[name])
        if len(points) > 1:
            return [_draw(points, words, folder / "figures" / f"{file_name('quality_against_cost' + several)}.png")]
    return []


def _draw(points: dict[str, tuple[float, float]], words: str, file: Path) -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = max(x for x, _ in points.values()) - min(x for x, _ in points.values())
    right = min(x for x, _ in points.values()) + 0.6 * width
    for name, (x, y) in points.items():
        axes.plot([x], [y], "o", color="tab:blue")
        side, offset = ("right", (-6, 4)) if x > right else ("left", (6, 4))
        axes.annotate(name, (x, y), textcoords="offset points", xytext=offset, ha=side, fontsize=8)
    axes.margins(0.12)
    axes.set(xlabel=words, ylabel="mean score over task types")
    axes.grid(alpha=0.3)
    shown = "; ".join(f"{name}: {x:.3g}, {y:.4f}" for name, (x, y) in points.items())
    return save_picture(
        figure,
        file,
        alt=f"Scatter plot of the mean score against {words}. {shown}.",
        caption=f"Quality against cost: mean score over task types by {words}; up and to the left is better.",
    )
