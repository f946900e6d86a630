from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("matplotlib", reason="the extra 'plots' is not installed")
pytest.importorskip("scikit_posthocs", reason="the extra 'plots' is not installed")

from matplotlib import image
from matplotlib.figure import Figure

from st_llmpool.stats import compare
from st_llmpool.stats.plots import draw, draw_pairs, draw_ranks
from tests.stats.validation import CONTRASTS, DESIGNS, simulated_scores


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved, so that a test can read what they say."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def texts(figure: Figure) -> str:
    (axes, *_) = figure.axes
    ticks = [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    return "\n".join([axes.get_title(), *(text.get_text() for text in axes.texts), *ticks])


def test_pictures_are_written_and_not_empty(tmp_path):
    (kind,) = compare(simulated_scores(np.random.default_rng(0), DESIGNS, tasks=12), CONTRASTS).types
    files = list(draw(kind, tmp_path, "STS"))
    assert [file.name for file in files] == ["STS_pairs.png", "STS_ranks.png"]
    for file in files:
        pixels = image.imread(file)
        assert pixels.shape[1] > 600
        assert 0.005 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.9


def test_heatmap_shows_every_difference_with_its_mark(tmp_path, drawn):
    table = simulated_scores(np.random.default_rng(0), DESIGNS, tasks=12, effect=0.03)
    (kind,) = compare(table, CONTRASTS).types
    list(draw(kind, tmp_path, "STS"))
    shown = texts(drawn[0]).splitlines()
    for pair, sign in itertools.product(kind.pairs, (1, -1)):
        decimals = 3 if abs(pair.mean) >= 0.002 else 4
        text = f"{sign * pair.mean:+.{decimals}f}" + ("*" if pair.significant else "")
        assert (f"[{text}]" if pair.confirmatory else text) in shown
    assert any(pair.significant for pair in kind.pairs)
    assert set(DESIGNS) <= set(shown)


def test_diagram_joins_designs_without_a_significant_pair(tmp_path, drawn):
    table = simulated_scores(np.random.default_rng(0), DESIGNS, tasks=12, effect=0.2)
    (kind,) = compare(table).types
    draw_ranks(kind, tmp_path / "x.png")
    shown = texts(drawn[0])
    for design, rank in kind.ranks.mean_ranks.items():
        assert f"{design} ({rank:.2f})" in shown or f"({rank:.2f}) {design}" in shown
    bars = [line for line in drawn[0].axes[0].lines if line.get_linewidth() == 4]
    ranks = kind.ranks.mean_ranks
    apart = {frozenset((pair.first, pair.second)) for pair in kind.pairs if pair.significant}
    assert 0 < len(apart) < len(kind.pairs)
    joined = {
        (a, b)
        for bar in bars
        for a, b in itertools.combinations(ranks, 2)
        if min(bar.get_xdata()) <= ranks[a] <= ranks[b] <= max(bar.get_xdata())
    }
    assert joined == {(a, b) for a, b in itertools.combinations(ranks, 2) if frozenset((a, b)) not in apart}


def test_long_names_leave_room_for_the_axis_of_a_diagram(tmp_path, drawn):
    table = simulated_scores(np.random.default_rng(0), DESIGNS, tasks=12, effect=0.2)
    table["design"] = "bidirectional · mean · multi_layer without " + table["design"]
    draw_ranks(compare(table).types[0], tmp_path / "x.png")
    (figure,) = drawn
    assert figure.axes[0].get_window_extent().width > 0.25 * figure.bbox.width


def test_diagram_says_when_nothing_could_be_told_apart(tmp_path, drawn):
    table = simulated_scores(np.random.default_rng(0), "abc", tasks=2)
    draw_ranks(compare(table).types[0], tmp_path / "x.png")
    assert "so few units cannot separate any two designs" in texts(drawn[0])


def test_two_designs_have_no_diagram(tmp_path):
    (kind,) = compare(simulated_scores(np.random.default_rng(0), "ab", tasks=6)).types
    assert [file.name for file in draw(kind, tmp_path, "STS")] == ["STS_pairs.png"]
    with pytest.raises(ValueError, match="needs three models"):
        draw_ranks(kind, tmp_path / "x.png")


def test_designs_that_always_tie_have_no_ranks_to_draw(tmp_path):
    table = simulated_scores(np.random.default_rng(0), "a", tasks=6)
    table = pd.concat([table.assign(design=name) for name in "abc"])
    assert [file.name for file in draw(compare(table).types[0], tmp_path, "STS")] == ["STS_pairs.png"]


def test_small_differences_look_small_and_are_not_written_as_zeros(tmp_path, drawn):
    table = simulated_scores(np.random.default_rng(0), "a", tasks=8)
    tables = [table.assign(design=name, score=table["score"] + gain) for name, gain in (("a", 0), ("b", 0.0004))]
    draw_pairs(compare(pd.concat(tables)).types[0], tmp_path / "x.png")
    (heat,) = drawn[0].axes[0].images
    assert heat.get_clim() == (-0.02, 0.02)
    assert {"-0.0004*", "+0.0004*"} <= set(texts(drawn[0]).splitlines())
    assert "Holm over 1 test" in texts(drawn[0]).splitlines()[1]


def test_copies_are_zeros_without_a_sign(tmp_path, drawn):
    table = simulated_scores(np.random.default_rng(0), "a", tasks=8)
    draw_pairs(compare(pd.concat([table, table.assign(design="copy")])).types[0], tmp_path / "x.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["0", "0"]
