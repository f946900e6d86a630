"""What the training did to the models: convergence, cost, and the layers before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ...analysis.layers import LayerAnalysis, LayerProfile
from ...model_card.figures import draw_layers
from ...stats.results import label
from ...stats.tables import Sheet, number
from ...training.report import NEGLIGIBLE
from ...utils.files import slug
from ...utils.words import counted, listed
from ..records import RunRecord
from .document import Document
from .findings import agreement
from .runs import run_facts

_LENGTH = 512  # tokens of the texts that scores are plotted against
_FIGURES = {"flops": ("GFLOPs", ".3f", 1e9), "latency_ms": ("ms", ".1f", 1), "peak_memory_mb": ("MiB", ",.1f", 1)}
_LINES = ("-", "--", ":", "-.")

Curve = Sequence[tuple[float, float]]
_CURVES: dict[str, tuple[str, Callable[[RunRecord], Curve], str]] = {
    "loss": ("training loss", lambda run: run.training.get("losses") or [], "lower is better"),
    "validation": ("validation", lambda run: run.validation, "a curve that still rises at the end was cut short"),
    "pooling_change": (
        "change by the pooling ‖e - r‖ / ‖r‖",
        lambda run: run.training.get("pooling_share") or [],
        "below the dotted line, 1 %, the pooling does nothing",
    ),
}


def write_convergence(document: Document, records: Sequence[RunRecord]) -> None:
    """Add the curves of loss, validation and pooling effect, and the runs that did not converge."""
    if not records:
        return
    flags = {
        ("Diverged", "validation ended below its start; left out of every score"): lambda run: run.diverged,
        ("Still rising", "under-trained: the last validation is the best by over 1 %"): lambda run: run.rising is True,
        ("Unknown", "fewer than three evaluations"): lambda run: run.rising is None,
        ("The pooling did nothing", f"it changes the embedding by less than {100 * NEGLIGIBLE:.0f} %"): lambda run: (
            run.training.get("pooling_did_nothing") is True
        ),
    }
    items = []
    for (what, why), flagged in flags.items():
        names = [record.id for record in records if flagged(record)]
        number_of = f"{len(names)} of {counted(len(records), 'run')}" + (": " if names else "")
        items.append((what, f"{number_of}{listed(names)} ({why})."))
    document.bullets(items)
    rows = []
    for design, runs in run_facts(records).groupby("design", sort=False):
        known = runs["rising"].dropna()
        means = runs[["loss", "first", "validation", "change"]].astype(float).mean()
        rows.append(
            {
                "Design": str(design),
                "Runs": str(len(runs)),
                "Last loss": number(means["loss"]),
                "First validation": number(means["first"]),
                "Last validation": number(means["validation"]),
                "Rising": f"{sum(known)} of {len(known)}" if len(known) else "-",
                "Change by pooling": number(means["change"], ".3f"),
            }
        )
    below = (
        "Means over the runs of a design. Validation: held-out nDCG@10, else the first metric. Change by pooling: "
        "‖e - r‖ / ‖r‖ of the embedding e and the plain readout r at the end; - without a trained pooling."
    )
    document.table(Sheet.of("Convergence", rows, below))
    below = (
        "Masked accuracy on held-out texts: after the stage; of the base, with the same attention; of the base with "
        "causal attention from the unmasked text before the token; of the most frequent token."
    )
    document.table(Sheet.of("Stages before the training", _stages(records), below))
    for base, own in _by_base(records).items():
        designs = list(dict.fromkeys(label(record.design, record.option) for record in own))
        for name, (words, curve, meaning) in _CURVES.items():
            curves: dict[str, list[Curve]] = {}
            for record in own:
                if curve(record):
                    curves.setdefault(label(record.design, record.option), []).append(curve(record))
            if curves:
                _draw_curves(document, curves, designs, name + (f"_{base}" if base else ""), words, meaning)


def _by_base(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Return the runs of each base, under an empty name if there is only one."""
    bases = list(dict.fromkeys(record.base for record in records))
    return {base if len(bases) > 1 else "": [run for run in records if run.base == base] for base in bases}


def _stages(records: Sequence[RunRecord]) -> Iterator[dict[str, str]]:
    for record in records:
        for stage in record.stages:
            accuracy = stage.get("masked_accuracy") or {}
            yield {
                "Run": record.id,
                "Stage": stage["stage"],
                "Steps": str(stage.get("steps", "-")),
                "Seconds": f"{stage.get('wall_seconds', 0):.0f}",
                **{
                    name.replace("_", " ").capitalize(): number(accuracy.get(name), ".3f")
                    for name in ("adapted", "base", "causal", "no_context")
                },
            }


def _draw_curves(
    document: Document, curves: dict[str, list[Curve]], designs: Sequence[str], name: str, words: str, meaning: str
) -> None:
    """Draw the curves of each design; its colour is the same in all figures."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    figure = Figure(figsize=(8, 3.6 + 0.18 * max(0, len(curves) - 12)), layout="constrained")
    axes = figure.add_subplot()
    for design, runs in curves.items():
        place = designs.index(design)
        style = {"color": colours[place % len(colours)], "linestyle": _LINES[place // len(colours) % len(_LINES)]}
        for run in runs:
            axes.plot(*zip(*run, strict=True), linewidth=0.6, alpha=0.35, **style)
        means = pd.DataFrame({seed: dict(run) for seed, run in enumerate(runs)}).dropna().sort_index().mean(axis=1)
        axes.plot(means.index, means, linewidth=1.6, label=design, **style)
    if name.startswith("pooling_change"):
        axes.axhline(NEGLIGIBLE, color="0.3", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel=words)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    whose = "by design" if len(curves) > 1 else f"of {next(iter(curves))}"
    last = ", ".join(f"{design} {np.mean([run[-1][1] for run in runs]):.3g}" for design, runs in curves.items())
    starts = {design: np.mean([run[0][1] for run in runs]) for design, runs in curves.items() if runs[0][0][0] == 0}
    if len(starts) > 2 and name.startswith("validation"):
        ends = [np.mean([run[-1][1] for run in curves[design]]) for design in starts]
        order = ", ".join(sorted(starts, key=lambda design: -starts[design])[:3])
        alike = number(agreement(np.array(list(starts.values())), np.array(ends)), ".2f")
        meaning += f"; at step 0 the best are {order}; rank correlation of the designs with the end {alike}"
    document.draw(
        figure,
        name,
        alt=f"Curves of the {words} over steps by design. At the end: {last}.",
        caption=f"{words[0].upper()}{words[1:]} {whose}: thick the mean over seeds, thin each seed; {meaning}.",
    )


def write_cost(document: Document, records: Sequence[RunRecord], scores: Mapping[str, float]) -> None:
    """Add parameters, operations, times and memory of each design, and quality against cost.

    Args:
        document: The report.
        records: Finished runs; a design's cost is that of its first run with a measured one.
        scores: Mean score of each design over task types; without any there is no figure.
    """
    if records and not any(record.cost for record in records):
        document.text("Inference cost was not measured in these runs; training time was.")
    for base, runs in _by_base(records).items():
        costs = {label(run.design, run.option): run.cost for run in reversed(runs) if run.cost}
        costs = {name: costs[name] for name in dict.fromkeys(label(r.design, r.option) for r in runs) if name in costs}
        suffix = f", {base}" if base else ""
        if costs:
            document.table(_cost_sheet(costs, suffix))
            _draw_cost(document, costs, scores, suffix)
        rows = []
        for design, own in run_facts(runs).groupby("design", sort=False):
            means = own[["ms", "seconds", "evaluation", "trained"]].astype(float).mean()
            rows.append(
                {
                    "Design": str(design),
                    "Trained parameters": number(means["trained"], ",.0f"),
                    "ms per step": number(means["ms"], ",.0f"),
                    "Minutes of training": number(means["seconds"] / 60, ".1f"),
                    "Minutes of evaluation": number(means["evaluation"] / 60, ".1f"),
                }
            )
        below = "Means over the runs of a design; concurrent runs compete for the machine, so times are rough."
        document.table(Sheet.of(f"Cost of training{suffix}", rows, below))


def _cost_sheet(costs: dict[str, dict[str, Any]], suffix: str) -> Sheet:
    lengths = [(design, length) for design, found in costs.items() for length in found["lengths"]]
    known = {
        (figure, length["tokens"]): None
        for figure in _FIGURES
        for _, length in lengths
        if length.get(figure) is not None
    }
    rows = []
    for design, found in costs.items():
        own = {length["tokens"]: length for length in found["lengths"]}
        row = {"Design": design} | {
            part.capitalize(): f"{found[part]:,}" for part in ("backbone", "adapter", "pooling")
        }
        if found.get("dimension"):
            row["Index\nbytes per text"] = f"{4 * found['dimension']:,}"
        for figure, tokens in known:
            unit_name, form, unit = _FIGURES[figure]
            value = own.get(tokens, {}).get(figure)
            row[f"{unit_name}\n{tokens} tokens"] = number(None if value is None else value / unit, form)
        rows.append(row)
    machines = dict.fromkeys(f"{one['device']}, {one['dtype']}, {one['threads']} threads" for one in costs.values())
    below = f"Parameters; float32 index; operations, time and extra memory for one text, on {'; '.join(machines)}."
    reasons = dict.fromkeys(f"{one['tokens']} tokens: {one['reason']}." for _, one in lengths if one.get("reason"))
    return Sheet.of(f"Cost of inference{suffix}", rows, below, *reasons)


def _draw_cost(document: Document, costs: dict[str, dict[str, Any]], scores: Mapping[str, float], suffix: str) -> None:
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
    several = len({record.base for record in records}) > 1
    analysed = {}
    for record in records:
        if record.layers:
            where = f", {record.base}" if several else ""
            name = f"{label(record.design, record.option)}, seed {record.seed}{where}"
            analysed[name] = record.id, LayerAnalysis.from_dict(record.layers)
    if not analysed:
        if records:
            document.text("The layers of these runs were not analysed.")
        return
    document.text(
        "Similarity compares the readouts of two layers on the same texts: linear CKA (Kornblith et al. 2019), and "
        "Spearman's correlation of the cosine similarities of all pairs of texts. A single layer is scored by its "
        "readout without the pooling, on pairs and queries of the suite."
    )
    kinds = {"cka": "linear CKA", "correlation": "rank correlation"}
    rows = [
        {"Run": name}
        | {
            f"{words}\n{when}": number(_similarity(look, kind), ".3f")
            for kind, words in kinds.items()
            for when, look in (("before", analysis.before), ("after", analysis.after))
        }
        for name, (_, analysis) in analysed.items()
    ]
    below = "Mean over all pairs of different layers: 1 if all layers agree."
    document.table(Sheet.of("Similarity between layers, before and after training", rows, below))
    rows = [
        {"Run": f"{name}: {probe}"} | {f"Layer {n}": number(value, ".3f") for n, value in enumerate(values, start=1)}
        for name, (_, analysis) in analysed.items()
        for probe, values in (("similarity", analysis.after.similarity), ("search", analysis.after.search))
    ]
    below = "Similarity: Spearman with human scores; search: nDCG@10."
    document.table(Sheet.of("Single layers, after training", rows, below))
    for name, (run_id, analysis) in analysed.items():
        file = document.folder / "figures" / f"layers_{slug(run_id)}.png"
        if draw_layers(file, analysis.to_dict()):
            words = _in_words(analysis)
            document.picture(file, alt=f"Layers of {name}: {words}.", caption=f"{name}: {words}.")


def _similarity(look: LayerProfile | None, kind: str) -> float | None:
    if look is None:
        return None
    matrix = np.asarray(getattr(look, kind), dtype=float)
    return float(np.nanmean(matrix[~np.eye(len(matrix), dtype=bool)]))


def _in_words(analysis: LayerAnalysis) -> str:
    """Return which single layer is best and which one the pooling uses most."""
    words = [f"layer {1 + int(np.nanargmax(np.asarray(analysis.after.search, dtype=float)))} alone searches best"]
    if analysis.attention:
        words.append(f"the pooling's weight is largest on layer {analysis.read[int(np.argmax(analysis.attention))]}")
    if analysis.moved:
        words.append(f"the embedding changes most without layer {analysis.read[int(np.argmax(analysis.moved))]}")
    return "; ".join(words)
