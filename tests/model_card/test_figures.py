"""What the pictures of cards and of `st-llmpool layers` say, also where there is little to show."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="the extra 'plots' is not installed")

from matplotlib.figure import Figure

from st_llmpool import build_embedder
from st_llmpool.analysis.layers import analyze_layers
from st_llmpool.model_card.figures import draw_curve, draw_layer_use, draw_layers
from st_llmpool.model_card.layer_use import LayerUse, layer_use


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def legend(axes) -> list[str]:
    return [] if axes.get_legend() is None else [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.fixture(scope="module")
def untrained(tiny_llm):
    return build_embedder(tiny_llm, pooling="multi_layer", verify=False)


def test_rounding_errors_of_an_untrained_pooling_are_not_drawn_as_fractions(untrained, tmp_path, drawn):
    report = analyze_layers(None, untrained)
    assert report.moved == [0.0] * len(report.read)
    assert draw_layers(tmp_path / "layers.png", report.to_dict())
    *_, alone, read = [axes for axes in drawn[0].axes if axes.get_title()]
    assert legend(read) == ["attention weight"]
    assert "the pooling is untrained" in read.texts[0].get_text()
    assert read.get_ylim()[0] == 0
    assert read.get_ylim()[1] > max(report.attention)
    assert legend(alone) == ["similarity", "search"]  # there is no "before" that "after" could be told from


def test_before_and_after_are_told_apart(untrained, tmp_path, drawn):
    draw_layers(tmp_path / "layers.png", analyze_layers(untrained, untrained).to_dict())
    assert {"similarity, before", "similarity, after"} <= {name for axes in drawn[0].axes for name in legend(axes)}


def test_a_pooling_that_reads_no_layers_says_so(tiny_llm, tmp_path, drawn):
    model = build_embedder(tiny_llm, pooling="mean", verify=False)
    draw_layers(tmp_path / "layers.png", analyze_layers(None, model).to_dict())
    assert any("reads only the last layer" in text.get_text() for axes in drawn[0].axes for text in axes.texts)


def test_layer_use_of_an_untrained_model_is_not_drawn(untrained, tmp_path, drawn):
    use = layer_use(untrained)
    assert set(use.moved) == {0.0}
    assert not draw_layer_use(tmp_path / "use.png", use)  # an empty figure helps nobody; the card says why
    assert not drawn
    assert draw_layer_use(tmp_path / "use.png", LayerUse((1, 2), (0.0, 0.1), 0.1))
    assert drawn[0].axes[0].get_ylim()[0] == 0


def test_a_curve_of_one_point_can_be_seen_and_one_of_none_is_not_drawn(tmp_path, drawn):
    assert draw_curve(tmp_path / "one.png", [[10, 0.5]], "loss")
    assert drawn[0].axes[0].lines[0].get_marker() == "o"
    assert draw_curve(tmp_path / "two.png", [[1, 0.5], [2, 0.4]], "loss", [[0, {"ndcg": 0.1}], [2, {"ndcg": 0.2}]])
    _, scores = drawn[1].axes
    assert scores.get_ylabel() == "ndcg"
    assert scores.lines[0].get_xydata().tolist() == [[0, 0.1], [2, 0.2]]
    assert not draw_curve(tmp_path / "none.png", [], "loss")
    assert not (tmp_path / "none.png").exists()
