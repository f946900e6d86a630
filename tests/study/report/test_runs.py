from __future__ import annotations

import re

from tests.study.report.pages import named, small, table, text_of


def test_equal_training_is_shown_setting_by_setting(report):
    rows = table(report, "Settings-that-differ-from-those-of-the-first-design")[1:]
    assert [
        "bidirectional · mean · multi_layer (last 4 layers)",
        "model.layers",
        "(not set)",
        "[-4, -3, -2, -1]",
    ] in rows
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
    (row,) = named(folder, "Pre-registered-comparisons")
    assert row["STS"].startswith("above in this run +0.0")  # one seed of both is there
