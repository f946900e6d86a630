from __future__ import annotations

import re
from dataclasses import replace

import pytest

from st_llmpool.stats import compare
from st_llmpool.study.report.findings import headline, outcomes
from tests.study.report.pages import named, small, table, text_of
from tests.study.synthetic_study import synthetic_records, synthetic_results, synthetic_study

CAUSAL, MEAN = "causal · EOS · plain", "bidirectional · mean · plain"
DESIGN_3, DESIGN_5 = "causal · EOS · multi_layer", "bidirectional · mean · multi_layer"


def contrast(rows: list[dict[str, str]], first: str, second: str) -> dict[str, str]:
    return next(row for row in rows if row["Contrast"] == f"{first} - {second}")


def test_scores_are_means_of_the_runs_with_their_spread_and_the_untrained_design_below(report):
    results = synthetic_results(synthetic_records(synthetic_study()))
    scores = results.scores[results.scores["design"] == "1"]
    rows = named(report, "Mean-score")
    place = next(place for place, row in enumerate(rows) if row["Design"] == CAUSAL)
    assert rows[place + 1]["Design"] == "- untrained"
    for step, row in (("", rows[place]), ("0", rows[place + 1])):
        for heading in list(row)[1:]:
            own = scores[(scores["task_type"] == heading.split()[0]) & (scores["step"] == step)]
            runs = own.groupby("seed")["score"].mean()
            assert row[heading] == f"{runs.mean():.4f} ± {runs.std():.4f}"
            assert heading.endswith(" 12 corpora, 12 tasks")
    (bm25,) = (row for row in rows if row["Design"] == "BM25")
    assert [cell for cell in bm25.values() if cell != "-"] == ["BM25", "0.5000"]  # on retrieval alone
    assert "before and after training: STS 1.00" in (report / "report.md").read_text()


def test_verdicts_are_better_equivalent_or_undecided_as_planted(report):
    rows = named(report, "Pre-registered-comparisons")
    assert re.fullmatch(r"better \+0\.0[34]\d+, p 0\.00\d+", contrast(rows, DESIGN_5, MEAN)["STS"])
    assert contrast(rows, DESIGN_5, CAUSAL)["Clustering"].startswith("worse -0.0")
    assert {row["Classification"].split()[0] for row in rows} <= {"equivalent", "undecided"}
    assert f"{6 * 2.0**-11:.3g}" in text_of((report / "index.html").read_text())


def test_title_is_the_finding_and_the_abstract_has_five_lines(report):
    markdown = (report / "report.md").read_text()
    assert markdown.startswith(f"# {DESIGN_5} is better than {MEAN} on STS and Retrieval\n")
    abstract = re.findall(r"^- \*\*(\w+)\*\*: ", markdown.partition("## ")[0], re.MULTILINE)
    assert abstract == ["Question", "Base", "Data", "Answer", "Limit"]
    assert "Of 24 named comparisons in 4 task types: " in markdown
    assert not re.search(r"(?<![\w.])[1-5] (?:and|is better|- [1-5])", markdown.partition("## Method")[0])


def test_forest_plot_has_every_contrast_of_every_type(report):
    alt = re.search(r"!\[(Forest plot.*?)\]", (report / "report.md").read_text())[1]
    assert alt.count(" minus ") == 6 * 4
    assert (report / "figures" / "forest.png").is_file()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, f"{DESIGN_5} is better than {MEAN} on STS"),
        ({"corpora": False}, f"{DESIGN_5} scores above {MEAN} on STS, on this corpus"),
        ({"tasks": 3}, "None of 1 named comparison is decided"),
    ],
)
def test_headline_says_no_more_than_the_verdicts(changes, expected):
    study = synthetic_study()
    results = synthetic_results(synthetic_records(study), types=["STS"], items=False, **changes)
    trained = results.table[(results.table["step"] == "") & (results.table["design"] != "bm25")]
    assert headline(compare(trained, ["5:mean-bidirectional"])) == expected


def test_one_corpus_is_said_where_the_reader_starts(tmp_path):
    page, _ = small(tmp_path, corpora=False)
    assert "so the results hold for this corpus" in page[: page.index("<nav")]
    assert "1 corpus, 8 tasks" in text_of(page)


def test_options_are_compared_with_their_plain_design_as_exploratory(report):
    (row,) = table(report, "Options-against-their-plain-design")[1:]
    assert row[0] == f"{DESIGN_5} (last 4 layers) - {DESIGN_5}"
    assert re.fullmatch(r"below \(exploratory\) -0\.0[34]\d+, p 0\.0\d+", row[2])  # 0.04 is planted on retrieval


def test_too_few_tasks_are_labelled_and_get_no_marks(tmp_path):
    page, folder = small(tmp_path, tasks=5)
    assert "Too few corpora or tasks for any verdict: STS." in page
    (row,) = named(folder, "Pre-registered-comparisons")
    assert row["STS"].startswith("undecided")


def test_an_outcome_is_that_of_the_first_design_whichever_way_the_pair_was_tested():
    results = synthetic_results(synthetic_records(synthetic_study()), types=["STS"], items=False)
    comparison = compare(results.table[results.table["step"] == ""], ["5:1"])
    (row,), (turned,) = (list(outcomes(comparison, [pair])) for pair in (("5", "1"), ("1", "5")))
    assert row["STS"].startswith("better\n+0.0")
    assert turned["STS"] == row["STS"].replace("better\n+", "worse\n-")


def test_diverged_runs_are_named_and_left_out_of_the_scores(tmp_path):
    study = synthetic_study()
    record = next(record for record in synthetic_records(study) if record.id == "builtin_5_seed1")
    falling = [[0, {"held_out_cosine_ndcg@10": 0.5}], [200, {"held_out_cosine_ndcg@10": 0.3}]]
    diverged = {"training": {**record.training, "evaluations": falling}}
    assert replace(record, **diverged).diverged
    page, folder = small(tmp_path, builtin_5_seed1=diverged)
    assert "Diverged, left out of every score: 1 of 4 runs: builtin_5_seed1." in text_of(page)
    (row,) = named(folder, "Pre-registered-comparisons")
    assert "in this run" in row["STS"]  # one seed of design 5 is left
