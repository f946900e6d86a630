"""Figures of cards and runs, written as PNG; each function returns whether it drew, which takes matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.files import atomic_file
from .layer_use import LayerUse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNMOVED = "No layer changes the embedding:\nthe pooling is untrained."
_BLUE, _PALE, _EDGE = "#2b6cb0", "#e8eef5", "#1a365d"


def draw_curve(file: Path, points: Sequence[Sequence[float]], label: str, evaluations: Sequence[Any] = ()) -> bool:
    """Draw (step, value) points as a line, and the first metric of (step, metrics) on an axis of its own."""
    if not points:
        return False
    metric = next((name for _, metrics in evaluations for name in metrics), None)

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), color=_BLUE, marker="o" if len(points) == 1 else None)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if metric is not None:
            scores = [(step, metrics[metric]) for step, metrics in evaluations if metric in metrics]
            right = axes.twinx()
            right.plot(*zip(*scores, strict=True), "o--", color=_EDGE)
            right.set_ylabel(metric, color=_EDGE)

    return _draw(file, (6, 3.5), draw)


def draw_layer_use(file: Path, use: LayerUse) -> bool:
    """Draw the change of the embedding without each layer; return whether there is one and it was drawn."""
    if not any(use.moved):
        return False

    def draw(axes: Axes) -> None:
        axes.bar([str(layer) for layer in use.layers], use.moved, color=_BLUE)
        axes.set(xlabel="layer", ylabel="1 - cosine", title="Change without one layer")
        axes.grid(axis="y", alpha=0.3)

    return _draw(file, (max(4.0, 0.3 * len(use.layers)), 3.2), draw)


def draw_layers(file: Path, report: Mapping[str, Any]) -> bool:
    """Draw the similarity (linear CKA) between layers, the score of each alone, and its use by the pooling."""
    looks = {name: report[name] for name in ("before", "after") if report[name] is not None}
    layers = range(1, len(report["after"]["search"]) + 1)
    edges = (0.5, len(layers) + 0.5)

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        panels = list(figure.subplots(1, len(looks) + 2))
        for axes, (name, look) in zip(panels, looks.items(), strict=False):
            cells = [[float("nan") if value is None else value for value in line] for line in look["cka"]]
            image = axes.imshow(cells, vmin=0, vmax=1, cmap="Blues", origin="lower", extent=(*edges, *edges))
            axes.set(xlabel="layer", ylabel="layer", title=f"linear CKA{f', {name}' if len(looks) > 1 else ''}")
        figure.colorbar(image, ax=panels[: len(looks)], shrink=0.7)
        for name, look in looks.items():
            style = "-" if name == "after" else ":"
            when = f", {name}" if len(looks) > 1 else ""
            for probe, colour in (("similarity", _BLUE), ("search", _EDGE)):
                values = [float("nan") if value is None else value for value in look[probe]]
                panels[-2].plot(layers, values, style, marker=".", color=colour, label=f"{probe}{when}")
        panels[-2].set(xlabel="layer", title="each layer alone")
        panels[-2].legend(fontsize=7)
        highest = 0.0
        for name, label in (("attention", "attention weight"), ("moved", "change without it")):
            if report[name] and sum(report[name]) > 0:
                fractions = [value / sum(report[name]) for value in report[name]]
                panels[-1].plot(report["read"], fractions, marker=".", label=label)
                highest = max(highest, *fractions)
        panels[-1].set(xlabel="layer", title="use by the pooling (fraction)", ylim=(0, 1.3 * highest or 1), xlim=edges)
        if panels[-1].lines:
            panels[-1].legend(fontsize=7)
        if not report["moved"] or not any(report["moved"]):
            note = _UNMOVED if report["moved"] else "The pooling reads only the last layer."
            place = {"transform": panels[-1].transAxes, "ha": "center", "va": "center"}
            panels[-1].text(0.5, 0.5, note, fontsize=8, wrap=True, **place)
        for panel in panels:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _draw_figure(file, (3.6 * (len(looks) + 2), 3.4), draw)


def draw_design(file: Path, *, attention: str, read: str, pooling: str, num_layers: int, layers: Sequence[int]) -> bool:
    """Draw the model from text to embedding, with the layers that the pooling reads filled."""
    from_which = set(layers)

    def draw(axes: Axes) -> None:
        height = 4.0 / num_layers
        for layer in range(1, num_layers + 1):
            chosen = layer in from_which
            bottom = (layer - 1) * height
            _box(axes, 2.0, bottom, 2.4, 0.8 * height, "", filled=chosen)
            if chosen:
                axes.plot([4.4, 5.4], [bottom + 0.4 * height, 2.0], color=_BLUE, lw=0.8, alpha=0.6)
        axes.text(3.2, 4.15, f"{num_layers} layers, {attention} attention", ha="center", va="bottom", fontsize=9)
        axes.text(3.2, -0.25, "filled: read by the pooling", ha="center", va="top", fontsize=8)
        _box(axes, 0.0, 1.6, 1.4, 0.8, "text\n+ EOS")
        _box(axes, 5.4, 1.4, 2.0, 1.2, pooling, filled=True)
        axes.text(6.4, 1.2, read, ha="center", va="top", fontsize=8)
        _box(axes, 8.2, 1.6, 1.6, 0.8, "embedding")
        for start, end in ((1.4, 2.0), (7.4, 8.2)):
            axes.annotate("", (end, 2.0), (start, 2.0), arrowprops={"arrowstyle": "->", "color": _EDGE})
        axes.set(xlim=(-0.2, 10.0), ylim=(-0.8, 4.7))
        axes.set_axis_off()

    return _draw(file, (7.5, 3.6), draw)


def _box(axes: Axes, left: float, bottom: float, width: float, height: float, text: str, filled: bool = False) -> None:
    from matplotlib.patches import Rectangle

    colour = _BLUE if filled else _PALE
    axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, edgecolor=_EDGE, lw=0.8))
    ink = "white" if filled else "black"
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9, color=ink)


def _draw(file: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> bool:
    return _draw_figure(file, size, lambda figure: draw(figure.add_subplot()))


def _draw_figure(file: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        figure.savefig(partial, format="png", dpi=120)
    return True
