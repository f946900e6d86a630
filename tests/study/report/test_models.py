from __future__ import annotations

from tests.study.report.pages import small, table


def test_cost_has_what_was_measured_and_says_why_the_rest_was_not(report):
    rows = table(report, "Cost-of-inference")
    assert rows[0][1:] == [
        "Backbone",
        "Adapter",
        "Pooling",
        *(f"{u} {n} tokens" for u in ("GFLOPs", "ms") for n in (32, 512)),
    ]
    assert rows[3] == ["2", "8,400,000", "0", "300,000", "0.541", "8.653", "2.1", "33.3"]
    assert "4096 tokens: the model reads 2048 tokens at most." in (report / "index.html").read_text()
    assert (report / "figures" / "quality_against_cost.png").is_file()


def test_runs_without_curves_cost_and_layers_leave_these_out(tmp_path):
    empty = {"training": {"steps": 0}, "machine": {}, "data": {}}
    page, folder = small(
        tmp_path, **{f"builtin_{d}_seed{s}": empty for d in ("5", "mean-bidirectional") for s in (0, 1)}
    )
    assert "The layers of these runs were not analysed." in page
    assert "Inference cost was not measured in these runs" in page
    assert sorted(file.name for file in (folder / "figures").iterdir()) == ["runs.png"]
