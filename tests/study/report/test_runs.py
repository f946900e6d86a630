from __future__ import annotations

import re

from tests.study.report.pages import small, table, text_of


def test_under_trained_runs_and_idle_poolings_are_named(report):
    page = text_of((report / "index.html").read_text())
    names = {design: ", ".join(f"builtin_{design}_seed{seed}" for seed in range(3)) for design in "23"}
    assert f"Still rising : 3 of 21 runs: {names['3']} (" in page
    assert f"The pooling did nothing : 3 of 21 runs: {names['2']} (" in page
    assert "the validation of 3 of 21 runs still rose" in page[: page.index("Set-up")]
    rising = {row[0]: row[5] for row in table(report, "Convergence")[1:]}
    assert rising == dict.fromkeys(rising, "0 of 3") | {"3": "3 of 3"}


def test_equal_training_is_shown_setting_by_setting(report):
    rows = table(report, "Settings-that-differ-from-those-of-the-first-design")[1:]
    assert ["5 (last 4 layers)", "model.layers", "(not set)", "[-4, -3, -2, -1]"] in rows
    assert len(rows) == 7  # six designs, and the layers of the option
    page = text_of((report / "index.html").read_text())
    assert "Not only the design differs" not in page
    assert "differs between runs" not in page


def test_unequal_training_is_said_loudly(tmp_path):
    changed = {"builtin_5_seed1": {"data": {"pairs/train.parquet": "f" * 16}}}
    page, _ = small(tmp_path, change={"training": {"max_steps": 400}}, **changed)
    warnings = " ".join(re.findall(r"<blockquote>(.*?)</blockquote>", page, re.DOTALL))
    assert "Not only the design differs: training.max_steps of 5." in warnings
    assert "pairs/train.parquet differs between runs: it is another file in builtin_5_seed1." in warnings


def test_half_finished_study_says_what_is_missing(tmp_path):
    page, folder = small(tmp_path, finished=3)
    assert "Missing: 1 of 4 runs: builtin_5_seed1." in text_of(page)
    assert [row[0] for row in table(folder, "Missing-runs")] == ["Run", "builtin_5_seed1"]
    assert "The claims of the paper" not in page  # the study has none of its pairs
    # Of two seeds and one, 0.04 is within what seeds can make (t 12.7 with one degree of freedom).
    assert "STS</strong>: no verdict on 5 vs mean-bidirectional: the difference may be seed noise" in page


def test_stages_stand_with_what_their_accuracy_is_to_be_measured_by(tmp_path):
    accuracy = {"adapted": 0.1755, "base": 0.05, "causal": 0.2, "no_context": 0.03}
    stage = {"stage": "1-mntp", "steps": 20, "wall_seconds": 41.6, "masked_accuracy": accuracy, "losses": []}
    _, folder = small(tmp_path, builtin_5_seed1={"stages": [stage]})
    rows = table(folder, "Stages-before-the-training")
    assert rows[1:] == [["builtin_5_seed1", "1-mntp", "20", "42", "0.175", "0.050", "0.200", "0.030"]]
