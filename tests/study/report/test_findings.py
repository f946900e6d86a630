from __future__ import annotations

import re

from tests.study.report.pages import small, table, text_of
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
    assert re.search(r"STS : 5 is better than mean-bidirectional \(by 0\.0\d+\), 4 ", page)
    assert "Classification : no significant difference in any pre-registered comparison (minimal detectable" in page
    assert "Classification : of 15 pairs, none is significant." in page
    power = page.index("Smallest p Holm")
    assert power < page.index("5 is better than")  # what could be found comes before what was
    assert f"{6 * 2.0**-11:.3g}" in page[power:]


def test_options_are_compared_with_their_plain_design_as_exploratory(report):
    (row,) = table(report, "Options-against-their-plain-design")[1:]
    assert row[0] == "5 (last 4 layers)"
    assert re.fullmatch(r"-0\.0[34]\d+\* p 0\.0\d+", row[2])  # 0.04 is planted on retrieval
    assert "*" not in "".join(row[3:])


def test_too_few_tasks_are_labelled_and_get_no_marks(tmp_path):
    page, folder = small(tmp_path, tasks=5)
    assert "Significance cannot be reached whatever the scores are, so there are no marks: STS: pre-registered" in page
    assert "STS</strong>: undecided; 5 tasks cannot give a significant result." in page
    assert not any(">" in cell for row in table(folder, "Mean-score-over-tasks") for cell in row)
