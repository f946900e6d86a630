"""What is committed of studies: little, and enough to report, compare and go on from."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("statsmodels", reason="the extra 'eval' is not installed")

from st_llmpool.study.records import RunStore
from st_llmpool.study.settings import Study

CARDS = Path(__file__).parents[1] / "model_cards"
STUDIES = sorted(file.parent for file in CARDS.glob("studies/*/study.yaml"))


def committed() -> list[Path]:
    """Files that git tracks, or all of them where there is no git."""
    found = subprocess.run(["git", "ls-files", "-z", "."], cwd=CARDS, capture_output=True, text=True, check=False)
    names = found.stdout.split("\0")[:-1] or [str(path.relative_to(CARDS)) for path in CARDS.rglob("*")]
    return [CARDS / name for name in names if (CARDS / name).is_file()]


def test_a_study_is_kept_as_its_file_its_results_a_summary_and_at_most_four_pictures():
    for study in STUDIES:
        names = [file.name for file in committed() if file.is_relative_to(study)]
        pictures = [name for name in names if name.endswith(".png")]
        assert sorted(set(names) - set(pictures)) == ["results.parquet", "study.yaml", "summary.md"]
        assert len(pictures) <= 4
        assert set(re.findall(r"\]\(([^)/]+\.png)\)", (study / "summary.md").read_text())) == set(pictures)


def test_all_cards_and_studies_are_under_three_megabytes():
    assert sum(file.stat().st_size for file in committed()) < 3_000_000


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_the_results_of_a_study_hold_facts_and_scores_of_all_its_runs(folder):
    study, store = Study.load(folder / "study.yaml"), RunStore(folder)
    records = [store.record(run.id) for run in study.runs()]
    assert None not in records
    assert all(record.validation and record.training["losses"] for record in records)
    assert any(record.cost and record.layers for record in records)
    scores = store.results(records).scores
    main = scores[scores["metric"] == "main_score"]
    assert len(main) == len(records) * main["task"].nunique()
    assert not re.search(r"/(work|root|home|tmp)/", json.dumps([asdict(record) for record in records]))
