"""results.parquet alone is enough: to report, to go on, and to reuse runs in another study."""

from __future__ import annotations

import dataclasses
import shutil

import pandas as pd
import pytest
from rich.console import Console

from st_llmpool.modules.errors import DataError
from st_llmpool.stats.readers import read_results
from st_llmpool.stats.results import COLUMNS, Results
from st_llmpool.study.records import (
    RunStore,
    finished,
    read_scores,
    registration,
    reuse_runs,
    write_record,
    write_results,
    write_study,
)
from st_llmpool.study.runner import StudyRunner
from st_llmpool.study.settings import Study
from tests.study.synthetic_study import synthetic_records, synthetic_results, synthetic_study

STUDY = synthetic_study(seeds=[0, 1], layers=False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What is committed of a study: its file and its results. And the folder with all runs that they are from."""
    out, other = tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("kept")
    results = synthetic_results(records := synthetic_records(STUDY), tasks=6)
    trained = (results.table["step"] == "") & (results.table["design"] != "bm25")
    table = results.table[trained].assign(dataset_revision="7", mteb_version="2.26.24", languages="eng-Latn")
    for record in records:
        own = table[(table["design"] == record.design) & (table["option"] == record.option)]
        write_record(record, Results(own[own["seed"] == str(record.seed)]), out)
    write_results(finished(STUDY.runs(), out), read_scores(records, out), out)
    shutil.copy(out / "results.parquet", other)
    return out, other


def test_results_file_gives_the_records_and_scores_of_the_run_folders(kept):
    folders, file = kept
    records = finished(STUDY.runs(), folders)
    assert finished(STUDY.runs(), file) == records
    assert records[0].validation
    assert records[0].cost
    one, other = read_scores(records, folders), read_scores(records, file)
    pd.testing.assert_frame_equal(one.scores, other.scores, check_exact=True)
    pd.testing.assert_frame_equal(one.items, other.items, check_exact=True)
    assert set(one.scores["dataset_revision"]) == {"7"}


def test_results_file_is_a_table_that_anyone_can_compare(kept):
    scores = read_results([kept[1] / "results.parquet"]).scores
    assert set(scores["design"]) == {design.design for design in STUDY.designs}
    assert list(scores) == COLUMNS
    factors = scores[scores["design"] == "1"][["attention", "readout", "pooling"]].drop_duplicates()
    assert factors.to_numpy().tolist() == [["causal", "eos", "plain"]]


def test_a_clone_with_the_results_alone_has_nothing_left_to_run(kept, monkeypatch):
    runner = StudyRunner(STUDY, kept[1], report_only=True, console=Console(quiet=True))
    monkeypatch.setattr(runner, "run_worker", None)  # would fail if it were called
    assert len(runner.run()) == len(STUDY.runs())


@pytest.mark.parametrize("source", ["runs", "folder with results", "file"])
def test_runs_are_taken_over_from_run_folders_and_from_a_results_file(kept, tmp_path, source):
    folders, file = kept
    other = {"runs": folders, "folder with results": file, "file": file / "results.parquet"}[source]
    wanted = synthetic_study(seeds=[1]).runs()[:2]
    changed = dataclasses.replace(wanted[1], recipe={**wanted[1].recipe, "model": {"tune": "lora"}})
    assert reuse_runs([wanted[0], changed], other, tmp_path) == [wanted[0].id]
    (record,) = finished(wanted, tmp_path)
    (original,) = finished(wanted[:1], folders)
    assert record == original
    pd.testing.assert_frame_equal(
        read_scores([record], tmp_path).scores, read_scores([record], folders).scores, check_exact=True
    )


def test_a_folder_without_runs_is_refused_and_not_taken_for_an_empty_study(tmp_path):
    with pytest.raises(DataError, match=r"holds no runs of a study: neither a folder 'runs' nor a results.parquet"):
        reuse_runs(STUDY.runs(), tmp_path / "none", tmp_path)


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "results.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"results.parquet is not the results of a study"):
        RunStore(tmp_path)


def test_report_is_made_again_from_study_file_and_results_alone(kept, tmp_path, monkeypatch):
    pytest.importorskip("scikit_posthocs", reason="the extra 'plots' is not installed")
    monkeypatch.setattr("st_llmpool.stats.plots.DPI", 20)
    tables = []
    for number, source in enumerate(kept):
        out = tmp_path / str(number)
        shutil.copytree(source, out)
        page = StudyRunner(STUDY, out, report_only=True, console=Console(quiet=True)).report()
        files = [
            *(page.parent / "tables").iterdir(),
            *(page.parent / "comparison").glob("*.[cjm]*"),
            out / "summary.md",
        ]
        tables.append({file.name: file.read_text() for file in files})
        assert len(list(out.glob("*.png"))) <= 4
    assert tables[0] == tables[1]
    assert "Convergence.csv" in tables[0]


def test_registration_keeps_the_time_of_the_first_run_of_each_version_of_the_settings(tmp_path):
    study, path = STUDY, tmp_path / "study.yaml"
    assert registration(study, tmp_path).endswith("of unknown time.")
    write_study(study, path)
    first = path.read_text()
    write_study(dataclasses.replace(study, description="Other words."), path)
    assert path.read_text().splitlines()[0] == first.splitlines()[0]
    assert first.splitlines()[0].split()[-1] in registration(study, tmp_path)
    changed = dataclasses.replace(study, seeds=[0, 7])
    write_study(changed, path)
    assert len([line for line in path.read_text().splitlines() if line.startswith("# registered")]) == 2
    assert "1 other version in study.yaml" in registration(changed, tmp_path)
    assert Study.load(path).seeds == [0, 7]


def test_registration_survives_in_a_clone_that_has_the_results_alone(tmp_path):
    out, clone = tmp_path / "out", tmp_path / "clone"
    for folder in (out, clone):
        folder.mkdir()
    write_study(STUDY, out / "study.yaml")
    before = registration(STUDY, out)
    shutil.copy(write_results([], Results(pd.DataFrame(columns=COLUMNS)), out), clone)
    assert registration(STUDY, clone) == before
    write_study(STUDY, clone / "study.yaml")
    (clone / "results.parquet").unlink()
    assert registration(STUDY, clone) == before
