from __future__ import annotations

from tests.study.report.pages import small, table, text_of


def test_cost_has_what_was_measured_and_says_why_the_rest_was_not(report):
    rows = table(report, "Cost-of-inference")
    assert rows[0][1:] == [
        "Backbone",
        "Adapter",
        "Pooling",
        "Index bytes per text",
        *(f"{u} {n} tokens" for u in ("GFLOPs", "ms") for n in (32, 512)),
    ]
    assert rows[3] == [
        "causal · EOS · last_layer",
        "8,400,000",
        "0",
        "300,000",
        "1,024",
        "0.541",
        "8.653",
        "2.1",
        "33.3",
    ]
    assert "4096 tokens: the model reads 2048 tokens at most." in (report / "index.html").read_text()
    assert (report / "figures" / "quality_against_cost.png").is_file()


def test_runs_without_curves_cost_and_layers_leave_these_out(tmp_path):
    empty = {"training": {"steps": 0}, "machine": {}, "data": {}}
    page, folder = small(
        tmp_path, **{f"builtin_{d}_seed{s}": empty for d in ("5", "mean-bidirectional") for s in (0, 1)}
    )
    assert "The layers of these runs were not analysed." in page
    assert "Inference cost was not measured in these runs" in page
    assert sorted(file.name for file in (folder / "figures").iterdir()) == ["forest.png"]


def test_under_trained_runs_and_idle_poolings_are_named(report):
    page = text_of((report / "index.html").read_text())
    names = {design: ", ".join(f"builtin_{design}_seed{seed}" for seed in range(3)) for design in "23"}
    assert f"Still rising : 3 of 21 runs: {names['3']} (" in page
    assert f"The pooling did nothing : 3 of 21 runs: {names['2']} (" in page
    assert "Under-trained, validation still rose at the end: 3 of 21 runs" in page[: page.index("Results")]
    rising = {row[0]: row[5] for row in table(report, "Convergence")[1:]}
    assert rising == dict.fromkeys(rising, "0 of 3") | {"causal · EOS · multi_layer": "3 of 3"}


def test_stages_stand_with_what_their_accuracy_is_to_be_measured_by(tmp_path):
    accuracy = {"adapted": 0.1755, "base": 0.05, "causal": 0.2, "no_context": 0.03}
    stage = {"stage": "1-mntp", "steps": 20, "wall_seconds": 41.6, "masked_accuracy": accuracy, "losses": []}
    _, folder = small(tmp_path, builtin_5_seed1={"stages": [stage]})
    rows = table(folder, "Stages-before-the-training")
    assert rows[1:] == [["builtin_5_seed1", "1-mntp", "20", "42", "0.175", "0.050", "0.200", "0.030"]]
