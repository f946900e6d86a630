from __future__ import annotations

from st_llmpool.stats.readers import read_results
from tests.stats.tiny_results import REVISION, main_scores, task_result, write_json, write_model


def test_folder_without_revisions_is_named_after_the_model(tmp_path):
    """As mteb wrote them before 1.12."""
    write_json(tmp_path / "my-model/SciFact.json", task_result("SciFact", 0.5))
    write_json(tmp_path / "other/SciFact.json", task_result("SciFact", 0.6))
    assert {design for design, _, _ in main_scores(read_results([tmp_path]))} == {"my-model", "other"}
    assert {design for design, _, _ in main_scores(read_results([tmp_path / "other"]))} == {"other"}


def test_results_of_old_mteb_are_read_by_mteb(tmp_path):
    old = {
        "mteb_version": "1.0.2",
        "mteb_dataset_name": "STS12",
        "dataset_revision": "1",
        "test": {"cos_sim": {"pearson": 0.8, "spearman": 0.75}, "evaluation_time": 1.0},
    }
    write_json(tmp_path / "old-model/STS12.json", old)
    assert main_scores(read_results([tmp_path])) == {("old-model", "", "STS12"): 0.75}


def test_files_that_mteb_itself_wrote_are_read(tmp_path):
    from mteb.mocks.mock_tasks import MockSTSTask
    from mteb.results import TaskResult

    scores = {"test": {"default": {"main_score": 0.25, "cosine_spearman": 0.25, "pearson": 0.5}}}
    folder = tmp_path / "results/org__m/1"
    folder.mkdir(parents=True)
    TaskResult.from_task_results(MockSTSTask(), scores, evaluation_time=1.0).to_disk(folder / "MockSTSTask.json")
    table = read_results([tmp_path], task_types={"MockSTSTask": "STS"}).scores
    assert dict(zip(table["metric"], table["score"], strict=True)) == {
        "main_score": 0.25,
        "cosine_spearman": 0.25,
        "pearson": 0.5,
    }


def test_two_revisions_of_one_model_are_told_apart(tmp_path):
    for revision, score in (("aaaaaaaaaaaa", 0.5), ("bbbbbbbbbbbb", 0.6)):
        write_model(tmp_path / "results", "org/a", {"SciFact": score}, revision=revision)
    assert main_scores(read_results([tmp_path])) == {
        ("org/a", "aaaaaaaa", "SciFact"): 0.5,
        ("org/a", "bbbbbbbb", "SciFact"): 0.6,
    }


def test_experiments_of_one_model_are_told_apart(tmp_path):
    folder = write_model(tmp_path / "results", "org/a", {"SciFact": 0.5})
    write_json(folder / "experiments/dim_64/SciFact.json", task_result("SciFact", 0.4))
    assert main_scores(read_results([tmp_path])) == {
        ("org/a", REVISION[:8], "SciFact"): 0.5,
        ("org/a", f"{REVISION[:8]} dim_64", "SciFact"): 0.4,
    }


def test_every_split_and_subset_is_a_row(tmp_path):
    content = task_result("STS12", 0.5)
    content["scores"]["dev"] = [{"main_score": 0.1, "hf_subset": s, "languages": ["eng-Latn"]} for s in ("en", "de")]
    write_json(tmp_path / "m/1/STS12.json", content)
    table = read_results([tmp_path]).scores
    assert set(zip(table["split"], table["subset"], table["score"], strict=True)) == {
        ("test", "default", 0.5),
        ("dev", "en", 0.1),
        ("dev", "de", 0.1),
    }


def test_parts_of_an_aggregate_do_not_count_beside_it(tmp_path):
    scores = {"CQADupstackRetrieval": 0.5, "CQADupstackAndroidRetrieval": 0.6, "SciFact": 0.7}
    write_model(tmp_path / "results", "org/a", scores)
    results = read_results([tmp_path])
    assert set(results.scores["task"]) == {"CQADupstackRetrieval", "SciFact"}
    assert "CQADupstackRetrieval is the mean of CQADupstackAndroidRetrieval" in results.notes[0]


def test_file_that_is_no_result_is_left_out_with_a_note(tmp_path):
    folder = write_model(tmp_path, "org/a", {"SciFact": 0.5})
    write_json(folder / "settings.json", {"batch_size": 32})
    results = read_results([tmp_path])
    assert len(results.scores) == 1
    assert "settings.json: no result of mteb" in results.notes[0]
