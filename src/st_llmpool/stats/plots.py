"""Pictures of a comparison: the critical-difference diagram and the heatmap of all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..utils.extras import require
from ..utils.words import counted
from .comparison import TypeComparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
_LEAST_SCALE = 0.02  # difference that has the full colour at least: smaller ones must look small
_SMALL = 0.002


def require_libraries() -> None:
    """Raises what says how to install the libraries that draw, if one of them is not there.

    Raises:
        MissingExtraError: If matplotlib or scikit-posthocs is not installed.
    """
    require("plots", "matplotlib", "scikit_posthocs", purpose="Drawing")


def save_figure(figure: Figure, path: Path) -> None:
    """Saves a figure as PNG; the folder is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, bbox_inches="tight", facecolor="white")


def draw_critical_difference(kind: TypeComparison, path: Path) -> None:
    """Draws the mean ranks of all designs; bars join those that Nemenyi's test does not separate (Demšar 2006).

    Args:
        kind: A task type with `ranks`.
        path: Where the PNG goes.
    """
    from matplotlib.figure import Figure
    from scikit_posthocs import critical_difference_diagram

    ranks = kind.ranks
    if ranks is None:
        raise ValueError(f"{kind.title} has no ranks to draw: it needs three models and two tasks.")
    figure = Figure(figsize=(8, 1.6 + 0.3 * len(ranks.mean_ranks)), layout="constrained")
    axes = figure.add_subplot()
    critical_difference_diagram(
        ranks.mean_ranks,
        ranks.p_nemenyi,
        alpha=ranks.alpha,
        ax=axes,
        label_fmt_left="{label} ({rank:.2f})",
        label_fmt_right="({rank:.2f}) {label}",
        text_h_margin=0.05,
        elbow_props={"color": "0.2", "linewidth": 1},
        marker_props={"color": "black", "s": 18},
        crossbar_props={"color": "tab:blue", "linewidth": 4, "solid_capstyle": "round"},
    )
    title = [
        f"{kind.title}: mean rank over {counted(ranks.tasks, 'task')}, 1 is best",
        f"bars join what the Nemenyi test does not separate (critical difference {ranks.critical_difference:.2f})",
    ]
    if not ranks.reachable:
        title.append(f"ranks differ by {len(ranks.mean_ranks) - 1} at most: these tasks cannot separate any two")
    axes.set_title("\n".join(title), fontsize=9)
    save_figure(figure, path)


def draw_pairs(kind: TypeComparison, path: Path) -> None:
    """Draws the mean difference of every pair, row minus column, with the marks of the corrected tests.

    Args:
        kind: A task type.
        path: Where the PNG goes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    models = [str(model) for model in kind.scores]
    place = {model: position for position, model in enumerate(models)}
    differences = np.full((len(models), len(models)), np.nan)
    texts: dict[tuple[int, int], str] = {}
    for pair in kind.pairs:
        row, column = place[pair.first], place[pair.second]
        mark = "*" if pair.significant else ""
        frame = "[{}]" if pair.confirmatory and len(models) > 2 else "{}"
        for at, sign in (((row, column), 1), ((column, row), -1)):
            differences[at] = sign * pair.test.mean_difference
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


def has_ranks(kind: TypeComparison) -> bool:
    """Returns whether there are ranks to draw: those of designs that always tie say nothing."""
    return kind.ranks is not None and len(set(kind.ranks.mean_ranks.values())) > 1


def _signed(difference: float) -> str:
    """Returns a difference with its sign: three decimals, four where these would be zeros."""
    if round(difference, 4) == 0:
        return "0"
    return f"{difference:+.3f}" if abs(difference) >= _SMALL else f"{difference:+.4f}"


def draw(kind: TypeComparison, folder: Path, name: str) -> Iterator[Path]:
    """Draws every picture that a task type has, and yields the files."""
    path = folder / f"{name}_pairs.png"
    draw_pairs(kind, path)
    yield path
    if has_ranks(kind):
        path = folder / f"{name}_critical_difference.png"
        draw_critical_difference(kind, path)
        yield path
