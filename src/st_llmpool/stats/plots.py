"""Figures of a comparison: a heat map of all pairs and a diagram of mean ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..utils.extras import require
from ..utils.files import atomic_file
from ..utils.words import counted
from .comparison import TypeComparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
_LEAST_SCALE = 0.02  # smallest difference in full colour, so that small ones look small
_SMALL = 0.002


def require_libraries() -> None:
    """Check that the libraries that draw are installed.

    Raises:
        MissingExtraError: If matplotlib or scikit-posthocs is not installed.
    """
    require("plots", "matplotlib", "scikit_posthocs", purpose="Drawing")


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure as PNG, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")


def draw_ranks(kind: TypeComparison, path: Path) -> None:
    """Draw the mean ranks of all designs; bars join designs without a significant pair (after Demšar 2006).

    Args:
        kind: A task type with `ranks`.
        path: The PNG.
    """
    from matplotlib.figure import Figure
    from scikit_posthocs import critical_difference_diagram

    ranks = kind.ranks
    if ranks is None:
        raise ValueError(f"{kind.title} has no ranks to draw: it needs three models and two tasks.")
    names = list(ranks.mean_ranks)
    alike = pd.DataFrame(1.0, index=names, columns=names)
    for pair in kind.pairs:
        if pair.significant and {pair.first, pair.second} <= set(names):
            alike.loc[pair.first, pair.second] = alike.loc[pair.second, pair.first] = 0.0
    width = 5 + 0.16 * max(map(len, names))  # names stand on both sides, 0.08 inches a letter
    figure = Figure(figsize=(width, 1.6 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    critical_difference_diagram(
        ranks.mean_ranks,
        alike,
        ax=axes,
        label_fmt_left="{label} ({rank:.2f})",
        label_fmt_right="({rank:.2f}) {label}",
        text_h_margin=0.05,
        label_props={"fontsize": 8},
        elbow_props={"color": "0.2", "linewidth": 1},
        marker_props={"color": "black", "s": 18},
        crossbar_props={"color": "tab:blue", "linewidth": 4, "solid_capstyle": "round"},
    )
    title = [
        f"{kind.title}: mean rank over {kind.size}, 1 is best",
        "bars join designs that the corrected pair tests do not separate",
    ]
    if not any(pair.reachable for pair in kind.pairs):
        title.append("so few units cannot separate any two designs")
    axes.set_title("\n".join(title), fontsize=9)
    save_figure(figure, path)


def draw_pairs(kind: TypeComparison, path: Path) -> None:
    """Draw the mean difference of every pair, row minus column, with the marks of the corrected tests.

    Args:
        kind: A task type.
        path: The PNG.
    """
    import matplotlib
    from matplotlib.figure import Figure

    models = [str(model) for model in kind.means.index]
    place = {model: position for position, model in enumerate(models)}
    differences = np.full((len(models), len(models)), np.nan)
    texts: dict[tuple[int, int], str] = {}
    for pair in (pair for pair in kind.pairs if {pair.first, pair.second} <= place.keys()):
        row, column = place[pair.first], place[pair.second]
        mark = "*" if pair.significant else ""
        frame = "[{}]" if pair.confirmatory and len(models) > 2 else "{}"
        for at, sign in (((row, column), 1), ((column, row), -1)):
            differences[at] = sign * pair.mean
            texts[at] = frame.format(f"{_signed(differences[at])}{mark}")
    size = 0.85 * len(models)  # small, so that the numbers are legible where the picture is as wide as a page
    figure = Figure(figsize=(2.4 + size, 1.5 + 0.55 * size), layout="constrained")
    axes = figure.add_subplot()
    limit = max(float(np.nanmax(abs(differences))), _LEAST_SCALE)
    colours = matplotlib.colormaps["RdBu"].with_extremes(bad="0.92")
    image = axes.imshow(differences, cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), text in texts.items():
        dark = abs(differences[row, column]) > 0.6 * limit
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(models)), models, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(models)), models, fontsize=8)
    counts = [family.plan.tests for family in kind.families]
    tests = " and ".join([*map(str, counts[:-1]), counted(counts[-1], "test")])
    named = "; [ ] pre-registered" if len(models) > 2 and any(pair.confirmatory for pair in kind.pairs) else ""
    axes.set_title(
        f"{kind.title}: mean difference, row minus column (blue: row is better)\n"
        f"* significant after Holm over {tests}{named}",
        fontsize=9,
    )
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)
    save_figure(figure, path)


def _signed(difference: float) -> str:
    """Return a signed difference with three decimals, or four if it is small."""
    if round(difference, 4) == 0:
        return "0"
    return f"{difference:+.3f}" if abs(difference) >= _SMALL else f"{difference:+.4f}"


def draw(kind: TypeComparison, folder: Path, name: str) -> Iterator[Path]:
    """Draw every figure of a task type, and yield the files; ranks of designs that always tie are not drawn."""
    path = folder / f"{name}_pairs.png"
    draw_pairs(kind, path)
    yield path
    if kind.ranks is not None and len(set(kind.ranks.mean_ranks.values())) > 1:
        path = folder / f"{name}_ranks.png"
        draw_ranks(kind, path)
        yield path
