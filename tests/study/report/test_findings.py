from __future__ import annotations

import re

from st_llmpool.stats import compare
from st_llmpool.study.report.findings import outcomes
from tests.study.report.pages import named, small, table, text_of
from tests.study.synthetic_study import synthetic_records, synthetic_results, synthetic_study


def test_scores_are_means_of_the_runs_and_marked_where_a_difference_was_planted(report):
    records = synthetic_records(synthetic_study())
    scores = synthetic_results(records).scores
    found = table(report, "Mean-score-over-tasks")
    for kind, heading in enumerate(found[0][1:], start=1):
        own = scores[scores["task_type"] == heading.split()[0]]
        for row in found[1:]:
            design, _, option = row[0].partition(": ")[2].partition(" (")
            mean = own[(own["design"] == design) & (own["option"] == option.rstrip(")"))]["score"].mean()
            assert row[kind].split(" ")[0] == f"{mean:.4f}"
    cells = {
        row[0][0]: dict(zip(("STS", "Retrieval", "Classification", "Clustering"), row[1:], strict=True))
        for row in found[1:]
    }
    assert cells["f"]["STS"].endswith("> a b d e (c)")  # 5 above mean, 1, 3, 4 as named, and above 2
    assert not any(">" in row["Classification"] for row in cells.values())
    assert " > d f (" in cells["b"]["Clustering"]


def test_verdicts_say_what_was_planted_and_what_cannot_be_seen(report):
    page = text_of((report / "index.html").read_text())
    rows = {row["Contrast"]: row for row in named(report, "Pre-registered-comparisons")}
    assert re.fullmatch(r"better \+0\.0[34]\d+, p 0\.00\d+", rows["5 - mean-bidirectional"]["STS"])
    assert all(row["Classification"].startswith("no significant difference (detectable: 0.0") for row in rows.values())
    assert rows["5 - 1"]["Clustering"].startswith("worse -0.0")
    power = page.index("Smallest p Holm")
    assert power < page.index("the outcome is that of the first design")  # what could be found comes before what was
    assert f"{6 * 2.0**-11:.3g}" in page[power:]


def test_options_are_compared_with_their_plain_design_as_exploratory(report):
    (row,) = table(report, "Options-against-their-plain-design")[1:]
    assert row[0] == "5 (last 4 layers) - 5"
    assert re.fullmatch(r"below \(exploratory\) -0\.0[34]\d+, p 0\.0\d+", row[2])  # 0.04 is planted on retrieval
    assert all(cell.startswith("no significant difference") for cell in row[3:])


def test_too_few_tasks_are_labelled_and_get_no_marks(tmp_path):
    page, folder = small(tmp_path, tasks=5)
    assert "Significance cannot be reached whatever the scores are, so there are no marks: STS: pre-registered" in page
    (row,) = named(folder, "Pre-registered-comparisons")
    assert row["STS"].startswith("undecided, 5 tasks cannot give a significant result")
    assert not any(">" in cell for row in table(folder, "Mean-score-over-tasks") for cell in row)


def test_claims_of_the_paper_stand_beside_what_the_tests_say(report):
    rows = named(report, "Claims-and-results")
    answers = {(row["Contrast"], kind): row[kind] for row in rows for kind in row if row[kind] != "-"}
    assert answers["5 - 1", "STS"].startswith("better +0.0")
    assert answers["5 - 1", "Clustering"].startswith("worse -0.0")
    assert answers["5 - 1", "Classification"].startswith("no significant difference (detectable: 0.0")
    assert answers["3 - 2", "Retrieval"].startswith("better (exploratory)") or answers["3 - 2", "Retrieval"].startswith(
        "above"
    )
    assert answers["3 - 2", "STS"].startswith("no significant difference")


def test_an_outcome_is_that_of_the_first_design_whichever_way_the_pair_was_tested(report):
    comparison = compare(synthetic_results(synthetic_records(synthetic_study())), ["5:1"])
    (row,), (turned,) = (list(outcomes(comparison, [pair], ["STS"])) for pair in (("5", "1"), ("1", "5")))
    assert row["STS"].startswith("better\n+0.0")
    assert turned["STS"] == row["STS"].replace("better\n+", "worse\n-")
