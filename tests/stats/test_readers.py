from __future__ import annotations

import shutil

import pandas as pd
import pytest

from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.stats.readers import read_results, read_task_types
from st_llmpool.stats.results import COLUMNS, DEFAULTS
from tests.stats.tiny_results import REVISION, main_scores, task_result, write_csv, write_json, write_model

SCORES = {"SciFact": 0.5, "STS12": 0.7}


@pytest.fixture
def repository(tmp_path):
    """A results repository with two models."""
    write_model(tmp_path / "results", "org/a", SCORES)
    write_model(tmp_path / "results", "org/b", {"SciFact": 0.6, "STS12": 0.8}, meta=False)
    write_json(tmp_path / "paths.json", {"not": "a result"})
    return tmp_path


TWO_MODELS = {
    ("org/a", "", "SciFact"): 0.5,
    ("org/a", "", "STS12"): 0.7,
    ("org/b", "", "SciFact"): 0.6,
    ("org/b", "", "STS12"): 0.8,
}


def test_repository_is_read_with_the_types_that_mteb_knows(repository):
    results = read_results([repository])
    assert main_scores(results) == TWO_MODELS
    assert list(results.scores) == COLUMNS
    assert set(results.scores["dataset_revision"]) == {"1"}
    assert set(results.scores["mteb_version"]) == {"2.26.24"}
    assert dict(zip(results.scores["task"], results.scores["task_type"], strict=True)) == {
        "SciFact": "Retrieval",
        "STS12": "STS",
    }
    assert set(results.scores["split"]) == {"test"}
    assert results.items.empty


def test_results_folder_itself_and_the_folders_of_single_models_are_the_same(repository):
    results = repository / "results"
    assert main_scores(read_results([results])) == TWO_MODELS
    assert main_scores(read_results([results / "org__a", results / "org__b" / REVISION])) == TWO_MODELS


def test_cache_with_downloaded_results_is_read_whole(repository, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    shutil.copytree(repository / "results/org__a", cache / "results/org__a")
    shutil.copytree(repository / "results/org__b", cache / "remote/results/org__b")
    shutil.copytree(repository / "results/org__a", cache / "remote/results/org__a")  # the same twice is once
    assert main_scores(read_results([cache])) == TWO_MODELS


def test_folders_of_one_name_in_different_runs_are_models_of_their_own(tmp_path):
    """Without a revision nothing says that both are one model; the second has a task that the first lacks."""
    write_json(tmp_path / "one/model/SciFact.json", task_result("SciFact", 0.5))
    write_json(tmp_path / "two/model/STS12.json", task_result("STS12", 0.6))
    write_json(tmp_path / "two/model/SciFact.json", task_result("SciFact", 0.7))
    paths = [tmp_path / "one/model", tmp_path / "two/model"]
    assert main_scores(read_results(paths)) == {
        ("model", str(paths[0]), "SciFact"): 0.5,
        ("model", str(paths[1]), "STS12"): 0.6,
        ("model", str(paths[1]), "SciFact"): 0.7,
    }
    assert {option for _, option, _ in main_scores(read_results(paths[:1]))} == {""}


def test_model_can_be_given_another_name(tmp_path):
    for run, score in (("first", 0.5), ("second", 0.6)):
        write_model(tmp_path / run / "results", "local/model", {"SciFact": score})
    results = read_results([f"before={tmp_path / 'first'}", f"after={tmp_path / 'second'}"])
    assert main_scores(results) == {("before", "", "SciFact"): 0.5, ("after", "", "SciFact"): 0.6}


def test_other_name_for_two_models_is_refused(repository, tmp_path):
    with pytest.raises(ConfigurationError, match=r"the name must be of one model, there are org/a @ 01234567, org/b"):
        read_results([f"mine={repository}"])
    table = write_csv(tmp_path / "s.csv", "task,task_type,model,score", "T,STS,a,1", "T,STS,b,1")
    with pytest.raises(ConfigurationError, match="there are a, b"):
        read_results([f"mine={table}"])


def test_scores_by_query_become_items(tmp_path):
    content = task_result("SciFact", 0.5, ndcg_at_10=0.5, ndcg_at_10_by_query={"q1": 0.4, "q2": 0.6})
    write_json(tmp_path / "m/1/SciFact.json", content)
    results = read_results([tmp_path])
    assert list(results.items) == COLUMNS
    assert dict(zip(results.items["item"], results.items["score"], strict=True)) == {"q1": 0.4, "q2": 0.6}
    assert set(results.items["metric"]) == {"ndcg_at_10"}
    assert set(results.scores["metric"]) == {"main_score", "ndcg_at_10"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("SciFact.json", "{", "SciFact.json is not JSON"),
        ("SciFact.json", '{"task_name": "SciFact", "mteb_version": "2.0.0"}', "SciFact.json is not a result.*scores"),
        ("SciFact.json", '{"mteb_dataset_name": "Nix", "test": {}}', "SciFact.json is not a result that mteb can read"),
        ("model_meta.json", '{"name": "a"}', "model_meta.json must hold name and revision"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    folder = write_model(tmp_path, "org/a", {"SciFact": 0.5})
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_results([tmp_path])


def test_folder_without_results_and_missing_path_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no result files"):
        read_results([tmp_path / "empty"])
    with pytest.raises(DataError, match=r"emty does not exist. Did you mean 'empty'"):
        read_results([tmp_path / "emty"])
    write_json(tmp_path / "empty/x.json", {})
    with pytest.raises(DataError, match="there are no results"):
        read_results([tmp_path / "empty"])


def test_task_without_a_type_is_named_until_somebody_says_it(tmp_path):
    write_model(tmp_path, "org/a", {"OurSearch": 0.5, "SciFact": 0.6, "LocalSquadRetrieval": 0.7})
    with pytest.raises(DataError, match=r"type of OurSearch is not known .*OurSearch.json.*--task-types"):
        read_results([tmp_path])
    table = read_results([tmp_path], task_types={"OurSearch": "Retrieval"}).scores
    assert set(table["task_type"]) == {"Retrieval"}  # LocalSquadRetrieval is of a shipped suite


def test_minimal_csv_is_enough(tmp_path):
    path = write_csv(tmp_path / "s.csv", "task,task_type,model,score", "T,STS,a,0.5", "T,STS,b,")
    (row,) = read_results([path]).scores[COLUMNS].to_dict("records")  # an empty score is none
    named = {"design": "a", "task": "T", "task_type": "STS", "file": str(path), "score": 0.5}
    assert row == {**DEFAULTS, "diverged": False, **named}


def test_results_of_a_study_fit_in_as_they_are(tmp_path):
    rows = [("qwen", "5", "last 4", seed, "T", "STS", "test", "default", m, 0.5) for seed in (0, 1) for m in ("x", "y")]
    columns = ["base", "design", "option", "seed", "task", "task_type", "split", "subset", "metric", "score"]
    table = pd.DataFrame(rows, columns=columns)
    table.to_parquet(tmp_path / "results.parquet")
    found = read_results([tmp_path / "results.parquet"]).scores[columns]
    pd.testing.assert_frame_equal(found, table.astype({"seed": str}), check_dtype=False)


def test_rows_with_an_item_are_items(tmp_path):
    path = write_csv(tmp_path / "s.csv", "task,task_type,model,score,item", "T,STS,a,0.5,", "T,STS,a,0.4,q1")
    results = read_results([path])
    assert list(results.scores["score"]) == [0.5]
    assert list(results.items["item"]) == ["q1"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["task,task_type,model", "T,STS,a"], r"s.csv has no column 'score'; it has task, task_type, model"),
        (["task,task_type,model,scores", "T,STS,a,1"], r"Did you mean 'scores'"),
        (["task,task_type,score", "T,STS,1"], r"no column 'model' \(or 'design'\)"),
        (["task,task_type,model,design,score", "T,STS,a,a,1"], r"both a column 'model' and a column 'design'"),
        (["task,task_type,model,score", "T,STS,a,1", "T,STS,b,high"], r"column 'score' holds 'high' in row 2"),
        (["task,task_type,model,score", "T,STS,a,inf"], r"column 'score' holds 'inf' in row 1, expected a finite"),
        (["task,task_type,model,score", "T,STS,,1"], r"column 'design' is empty in row 1"),
        (["task,task_type,model,score"], r"s.csv has no rows"),
        (["task,task_type,model,score", "T,STS,a,1", "T,STS,a,2"], r"several scores \(1.0, 2.0\) of design a, task T"),
        (["task,task_type,model,score", "T,STS,a,1", "T,NLI,b,2"], r"task T has several types, NLI, STS"),
        (["task,model,score", "T,a,1"], r"the type of T is not known .*s.csv"),
    ],
)
def test_wrong_table_is_refused_with_file_and_column(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_results([write_csv(tmp_path / "s.csv", *lines)])


def test_damaged_and_foreign_files_are_named(tmp_path):
    for name, text, message in [
        ("a.parquet", "no parquet", "a.parquet cannot be read as a table"),
        ("a.csv", "", "a.csv cannot be read as a table"),
        ("a.txt", "x", "neither a folder nor a .csv or .parquet"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            read_results([tmp_path / name])


def test_only_the_wanted_models_are_read(repository, tmp_path):
    table = write_csv(tmp_path / "s.csv", "task,model,score", "STS12,x,0.5", "STS12,y,0.6")
    (repository / "results/org__b" / REVISION / "STS12.json").write_text("damaged")  # of a model that is not wanted
    results = read_results([repository, table], models=["org/a", "y"])
    assert set(results.scores["design"]) == {"org/a", "y"}
    with pytest.raises(ConfigurationError, match=r"no result is of 'org/aa'; there are .*Did you mean 'org/a'"):
        read_results([repository], models=["org/aa"])


def test_types_come_from_a_suite_or_from_lines(tmp_path):
    lines = tmp_path / "types.yaml"
    lines.write_text("OurSearch: Retrieval\nOurPairs: STS\n")
    assert read_task_types(lines) == {"OurSearch": "Retrieval", "OurPairs": "STS"}
    suite = tmp_path / "suite.yaml"
    suite.write_text("tasks: [{name: OurSearch, type: Retrieval, folder: x}]")
    assert read_task_types(suite) == {"OurSearch": "Retrieval"}
    lines.write_text("- a")
    with pytest.raises(ConfigurationError, match="must be a suite file"):
        read_task_types(lines)
    with pytest.raises(DataError, match=r"nix\.yaml.* cannot be read: No such file"):
        read_task_types(tmp_path / "nix.yaml")
