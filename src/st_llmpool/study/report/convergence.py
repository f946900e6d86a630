"""Did training converge, and did the pooling do anything: curves of every design, and the runs to be wary of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...stats.compare import label
from ...stats.tables import Sheet, file_name
from ...training.pooling_share import NOTHING
from ...utils.words import counted
from ..records import RunRecord
from .document import Block, Bullets, Picture, Table, save_picture

_LINES = ("-", "--", ":", "-.")
_SHOWN = 12

Curve = Sequence[Sequence[float]]


def convergence(records: Sequence[RunRecord], folder: Path) -> list[Block]:
    """Returns the curves of loss, validation and pooling share, and which runs are flagged.

    Args:
        records: Finished runs.
        folder: Of the report.
    """
    if not records:
        return []
    flags: dict[str, tuple[str, Callable[[RunRecord], bool]]] = {
        "Still rising": ("the last validation is the best by over 1 %, so they are under-trained", _rises),
        "Not known whether rising": ("fewer than three evaluations", lambda record: record.rising is None),
        "The pooling did nothing": (
            f"it moved the embedding by less than {100 * NOTHING:.0f} % of the plain readout",
            lambda record: record.training.get("pooling_did_nothing") is True,
        ),
    }
    items = [(what, f"{_named(records, flagged)} ({why}).") for what, (why, flagged) in flags.items()]
    blocks: list[Block] = [Bullets(tuple(items))]
    blocks.append(Table(_sheet(records)))
    if any(record.stages for record in records):
        blocks.append(Table(_stages_sheet(records)))
    bases = list(dict.fromkeys(record.base for record in records))
    for base in bases:
        own = [record for record in records if record.base == base]
        blocks += _pictures(own, f"_{base}" if len(bases) > 1 else "", folder)
    return blocks


def by_design(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Returns the runs of each design (and option), in order."""
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        found.setdefault(label(record.design, record.option), []).append(record)
    return found


def _rises(record: RunRecord) -> bool:
    return record.rising is True


def _named(records: Sequence[RunRecord], flagged: Callable[[RunRecord], bool]) -> str:
    names = [record.id for record in records if flagged(record)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"{len(names)} of {counted(len(records), 'run')}" + (": " if names else "") + ", ".join(names[:_SHOWN]) + more
    )


def _stages_sheet(records: Sequence[RunRecord]) -> Sheet:
    predictors = ("adapted", "base", "causal", "no_context")
    rows = []
    for record in records:
        for stage in record.stages:
            accuracy = stage.get("masked_accuracy") or {}
            cells = (f"{accuracy[name]:.3f}" if name in accuracy else "-" for name in predictors)
            seconds = f"{stage.get('wall_seconds', 0):.0f}"
            rows.append((record.id, stage["stage"], str(stage.get("steps", "-")), seconds, *cells))
    below = (
        "Masked accuracy on held-out texts: of the stage's result; of the base as it is, with the same attention; of "
        "the base with causal attention from the unmasked text before the token; of the most frequent token."
    )
    columns = ("Run", "Stage", "Steps", "Seconds", "Adapted", "Base", "Causal", "No context")
    return Sheet("Stages before the training", columns, tuple(rows), (below,))


def _sheet(records: Sequence[RunRecord]) -> Sheet:
    rows = []
    for name, runs in by_design(records).items():
        known = [run for run in runs if run.rising is not None]
        rows.append(
            (
                name,
                str(len(runs)),
                _mean(run.training.get("losses") or [] for run in runs),
                _mean((run.validation[:1] for run in runs), "{:.4f}"),
                _mean((run.validation for run in runs), "{:.4f}"),
                f"{sum(map(_rises, known))} of {len(known)}" if known else "-",
                _mean((run.training.get("pooling_share") or [] for run in runs), "{:.3f}"),
            )
        )
    columns = ("Design", "Runs", "Last loss", "First validation", "Last validation", "Rising", "Pooling share")
    below = (
        "Means over the runs of a design. Validation: held-out nDCG@10, else the first metric. Pooling share: how far "
        "the pooling moves the embedding from the plain readout at the end, ‖embedding - r‖ / ‖r‖; designs without a "
        "trained pooling have none.",
    )
    return Sheet("Convergence", columns, tuple(rows), below)


def _mean(curves: Any, form: str = "{:.4f}") -> str:
    """Returns the mean of the curves' last values."""
    last = [curve[-1][1] for curve in curves if curve]
    return form.format(float(np.mean(last))) if last else "-"


def _pictures(records: Sequence[RunRecord], suffix: str, folder: Path) -> list[Block]:
    wanted: list[tuple[str, str, Callable[[RunRecord], Curve], str]] = [
        ("loss", "training loss", lambda run: run.training.get("losses") or [], "lower is better"),
        ("validation", "validation", lambda run: run.validation, "a curve that still rises at the end is cut short"),
        (
            "pooling_share",
            "pooling share ‖embedding - r‖ / ‖r‖",
            lambda run: run.training.get("pooling_share") or [],
            "below the dotted line, 1 %, the pooling does nothing",
        ),
    ]
    drawn: list[Block] = []
    for name, words, curve, meaning in wanted:
        curves = {design: [curve(run) for run in runs if curve(run)] for design, runs in by_design(records).items()}
        curves = {design: own for design, own in curves.items() if own}
        if curves:
            drawn.append(_draw(curves, words, meaning, folder / "figures" / f"{file_name(name + suffix)}.png"))
    return drawn


def _draw(curves: dict[str, list[Curve]], words: str, meaning: str, file: Path) -> Picture:
    import matplotlib
    from matplotlib.figure import Figure

    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    figure = Figure(figsize=(8, 3.6 + 0.18 * max(0, len(curves) - 12)), layout="constrained")
    axes = figure.add_subplot()
    for place, (design, runs) in enumerate(curves.items()):
        style = {"color": colours[place % len(colours)], "linestyle": _LINES[place // len(colours) % len(_LINES)]}
        for run in runs:
            axes.plot(*zip(*run, strict=True), linewidth=0.6, alpha=0.35, **style)
        values = [dict[float, float](run) for run in runs]  # type: ignore[arg-type]
        steps = sorted(set.intersection(*map(set, values)))
        means = [np.mean([run[step] for run in values]) for step in steps]
        axes.plot(steps, means, linewidth=1.6, label=design, **style)
    if words.startswith("pooling share"):
        axes.axhline(NOTHING, color="0.3", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel=words)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    last = ", ".join(f"{design} {np.mean([run[-1][1] for run in runs]):.3g}" for design, runs in curves.items())
    return save_picture(
        figure,
        file,
        alt=f"Curves of the {words} over steps by design. At the end: {last}.",
        caption=f"{words[0].upper()}{words[1:]} by design: thick the mean over seeds, thin each seed; {meaning}.",
    )
