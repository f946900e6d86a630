from __future__ import annotations

from tests.study.report.pages import table


def test_claims_of_the_paper_are_answered(report):
    rows = table(report, "Claims-and-results")[1:]
    answers = {(designs, task): here for _, designs, task, _, _, here in rows}
    assert answers["5 - 1", "STS"] == "Holds."
    assert answers["5 - 1", "Clustering"] == "Holds: it is worse."
    assert answers["5 - 1", "Classification"].startswith("Not contradicted; minimal detectable difference 0.0")
    assert answers["3 - 2", "Retrieval"] == "Holds."
    assert answers["3 - 2", "STS"].startswith("Not seen; minimal detectable difference 0.0")
    assert rows[-1][-1] == "Holds: 5 is above 1 on STS, and below it on Clustering."
