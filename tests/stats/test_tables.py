from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from st_llmpool.stats import compare
from st_llmpool.stats.tables import ONE_CORPUS, Sheet, to_frame, to_json, to_markdown, to_rich
from tests.stats.test_comparison import table_of
from tests.stats.validation import CONTRASTS, DESIGNS, Setting


def test_json_holds_every_statistic_and_only_json(study):
    content = json.loads(to_json(compare(study, CONTRASTS)), parse_constant=pytest.fail)
    (kind,) = content["types"]
    pair = kind["families"][0]["pairs"][0]
    keys = {"tasks", "corpora", "seeds", "p", "p_holm", "p_equivalent", "equivalent", "interval_low", "mean_difference"}
    assert keys <= pair.keys()
    assert kind["families"][0]["smallest_p_holm"] == 6 * 2**-11
    assert kind["ranks"]["mean_ranks"].keys() == set(DESIGNS)
    assert {design: row["runs"] for design, row in kind["means"].items()} == dict.fromkeys(DESIGNS, 3)
    assert content["rope"] == 0.01


def test_undefined_numbers_are_null_in_json():
    content = json.loads(to_json(compare(table_of({"a": [0.1], "b": [0.2]}))), parse_constant=pytest.fail)
    pair = content["types"][0]["families"][0]["pairs"][0]
    assert (pair["interval_low"], pair["standard_error"], pair["items"]) == (None, None, None)


def test_screen_and_document_say_the_same(study):
    comparison = compare(study, CONTRASTS)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_rich(comparison))
    for text in (console.export_text(), to_markdown(comparison)):
        for pair in comparison.types[0].pairs:
            assert f"{pair.mean:+.4f}" in text
            assert not pair.confirmatory or pair.verdict in " ".join(text.split())
        for wanted in ("pre-registered", "exploratory", "Power: 1 corpus, 12 tasks", "Friedman", "±", "*"):
            assert wanted in text
        assert ONE_CORPUS in " ".join(text.split())


def test_several_corpora_are_in_every_heading_and_the_multilevel_model_stands_beside():
    comparison = compare(Setting(7, 2).scores(np.random.default_rng(0), "abc"), ["a:b"])
    text = to_markdown(comparison)
    headings = [line for line in text.splitlines() if line.startswith("## STS") and "model" not in line]
    assert len(headings) == 2
    assert all("7 corpora, 14 tasks" in line for line in headings)
    assert "STS: multilevel model" in text
    assert ONE_CORPUS not in text


def test_screen_fits_eighty_columns(study):
    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_rich(compare(study, CONTRASTS)))
    text = console.export_text()
    assert "…" not in text
    assert "mean-bidirectional" in text


def test_names_are_shown_beside_the_means_of_four_types_on_eighty_columns(study):
    kinds = ("Classification", "Retrieval", "Clustering", "STS")
    table = pd.concat([study.assign(task_type=kind, task=kind + study["task"]) for kind in kinds])
    console = Console(record=True, width=80, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(to_rich(compare(table)))
    means = console.export_text().partition("exploratory")[0].splitlines()
    assert sum(line.split()[0] in DESIGNS for line in means if "0." in line) == len(DESIGNS)
    assert "12 tasks" in " ".join(means)


def test_frame_has_a_row_for_every_pair(study):
    frame = to_frame(compare(study, CONTRASTS))
    assert len(frame) == 15
    assert frame["confirmatory"].sum() == 6


def test_columns_of_numbers_are_aligned_at_the_right_and_markup_is_escaped():
    rows = [{"Name": "a|b", "Score": "+0.1 [0.0, 0.2]*", "Design": "5"}, {"Name": "<b>", "Design": "5 (last 4 layers)"}]
    lines = Sheet.of("T", rows).to_markdown().splitlines()
    assert lines[3] == "| --- | ---: | --- |"
    assert lines[4:6] == [r"| a\|b | +0.1 [0.0, 0.2]\* | 5 |", r"| \<b> | - | 5 (last 4 layers) |"]
