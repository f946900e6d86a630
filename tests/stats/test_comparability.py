"""What `compare` must not do in silence: mix evaluations, take numbers that are no scores, or rank copies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from st_llmpool.cli import app
from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.stats import Results, compare, read_results
from tests.stats.test_comparison import table_of
from tests.stats.tiny_results import task_result, write_csv, write_json, write_model

TASKS = [f"STS{number}" for number in (12, 13, 14, 15, 16, 17, 22)]
RISING = list(np.linspace(0.3, 0.6, 8))


def two_models(tmp_path, second: dict, **more) -> list:
    """Two folders of results; `second` is what the files of the second one say beside their scores."""
    for model, gain, changes in (("org/a", 0.1, {}), ("org/b", 0.0, second)):
        for place, task in enumerate(TASKS):
            content = task_result(task, 0.3 + 0.03 * place + gain + 0.002 * place * (model == "org/a"), **more)
            write_json(tmp_path / model.replace("/", "-") / "results" / "1" / f"{task}.json", content | changes)
        write_json(tmp_path / model.replace("/", "-") / "results/1/model_meta.json", {"name": model, "revision": "1"})
    return [tmp_path / "org-a", tmp_path / "org-b"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset_revision": "2"}, r"dataset revision of STS12, .*\(STS12: org/a 1, org/b 2\)"),
        ({"mteb_version": "1.14.0"}, r"mteb version of STS12, .*org/a 2.26.24, org/b 1.14.0"),
    ],
)
def test_results_of_different_revisions_are_compared_only_on_request(tmp_path, change, words):
    paths = two_models(tmp_path, change)
    with pytest.raises(DataError, match=f"evaluated differently: {words}.*--allow-mixed-revisions") as refused:
        compare(read_results(paths))
    assert "\n" not in str(refused.value)
    comparison = compare(read_results(paths), allow_mixed_revisions=True)
    assert comparison.types[0].pairs[0].leader == "org/a"
    assert any("Evaluated differently, accepted" in note and "STS12" in note for note in comparison.notes)


def test_the_command_has_the_same_option(tmp_path):
    paths = [str(path) for path in two_models(tmp_path, {"dataset_revision": "2"})]
    assert isinstance(CliRunner().invoke(app, ["compare", *paths]).exception, DataError)
    accepted = CliRunner().invoke(app, ["compare", *paths, "--allow-mixed-revisions"])
    assert accepted.exit_code == 0
    assert "Evaluated differently, accepted" in " ".join(accepted.output.split())


def test_a_revision_of_a_task_that_only_one_model_has_does_not_matter(tmp_path):
    paths = two_models(tmp_path, {})
    write_json(paths[1] / "results/1/BIOSSES.json", task_result("BIOSSES", 0.5) | {"dataset_revision": "9"})
    assert compare(read_results(paths)).types[0].pairs[0].plan.tasks == len(TASKS)


def test_unknown_revisions_are_said(tmp_path):
    paths = two_models(tmp_path, {})
    table = write_csv(
        tmp_path / "c.csv", "task,model,score", *(f"{task},c,0.{place + 1}" for place, task in enumerate(TASKS))
    )
    notes = compare(read_results([*paths, table])).notes
    assert "The dataset revision is not known of c." in notes


def test_different_queries_of_one_task_are_named():
    table = table_of({"a": RISING, "b": [score - 0.1 for score in RISING]})
    items = pd.DataFrame(
        {**row, "item": f"q{item}", "metric": "ndcg_at_10", "score": 0.5}
        for row in table.to_dict("records")
        for item in range(10 if row["design"] == "a" or row["task"] != "T3" else 6)
    )
    with pytest.raises(DataError, match=r"queries or texts of T3 \(T3: a 10, b 6\) differ"):
        compare(Results(pd.concat([table, items])))
    assert compare(Results(table, items), allow_mixed_revisions=True).types[0].pairs


def test_different_languages_of_one_subset_are_named(tmp_path):
    paths = two_models(tmp_path, {})
    for task in TASKS:
        path = paths[1] / f"results/1/{task}.json"
        path.write_text(path.read_text().replace("eng-Latn", "deu-Latn"))
    with pytest.raises(DataError, match=r"languages of STS12, .*org/a eng-Latn, org/b deu-Latn"):
        compare(read_results(paths))


@pytest.mark.parametrize(
    ("task_type", "score", "limit"),
    [
        ("Retrieval", 1.2, "from 0 to 1"),
        ("Retrieval", 54.3, "from 0 to 1"),
        ("Retrieval", -0.1, "from 0 to 1"),
        ("STS", -1.5, "from -1 to 1"),
        ("Classification", float("nan"), "from 0 to 1"),
    ],
)
def test_what_is_no_score_is_refused_with_file_task_and_value(tmp_path, task_type, score, limit):
    folder = write_model(tmp_path / "results", "org/a", {"T1": 0.5, "T2": 0.6})
    write_model(tmp_path / "results", "org/b", {"T1": 0.5, "T2": 0.7})
    write_json(folder / "T2.json", task_result("T2", score))
    results = read_results([tmp_path], task_types=dict.fromkeys(("T1", "T2"), task_type))
    with pytest.raises(DataError, match=rf"T2.json: main_score of org/a on T2 is {score:g}, expected .*{limit}"):
        compare(results)


def test_correlations_may_be_negative():
    assert compare(table_of({"a": [-0.5, 0.2], "b": [-0.1, 0.3]})).types
    frame = table_of({"a": [-0.5, 0.2], "b": [-0.1, 0.3]}, task_type="Classification", metric="matthews")
    assert compare(frame, metric="matthews").types


def test_nan_in_a_table_is_refused_and_an_empty_score_is_none(tmp_path):
    lines = ["task,task_type,model,score", "T,STS,a,0.5", "T,STS,b,nan"]
    with pytest.raises(DataError, match="column 'score' holds 'nan' in row 2"):
        read_results([write_csv(tmp_path / "s.csv", *lines)])
    path = tmp_path / "s.parquet"
    table_of({"a": [0.5, 0.6], "b": [0.6, float("nan")]}).to_parquet(path)
    with pytest.raises(DataError, match=r"s.parquet: main_score of b on T1 is nan"):
        compare(read_results([path]))


def test_a_constant_scorer_gets_no_verdict_and_is_named():
    comparison = compare(table_of({"a": [0.9] * 8, "b": RISING}))
    (pair,) = comparison.types[0].pairs
    assert pair.p_holm < 0.05
    assert (pair.winner, pair.significant) == (None, False)
    assert pair.verdict == "a and b: undecided, a has one and the same score, 0.9, on all of its tasks."
    assert any("a has one and the same score, 0.9" in note for note in comparison.notes)


def test_copies_are_called_identical_and_not_alike():
    comparison = compare(table_of({"a": RISING, "copy": RISING, "b": [score - 0.1 for score in RISING]}))
    verdicts = {frozenset((pair.first, pair.second)): pair.verdict for pair in comparison.types[0].pairs}
    assert verdicts[frozenset(("a", "copy"))] == "a and copy: identical scores."
    assert any("a and copy: identical scores" in note for note in comparison.notes)
    assert sum("identical" in verdict for verdict in verdicts.values()) == 1


def test_equal_means_of_different_seeds_are_not_identical():
    low, high = [score - 0.05 for score in RISING], [score + 0.05 for score in RISING]
    runs = [table_of({"a": low, "b": high}, seed="0"), table_of({"a": high, "b": low}, seed="1")]
    (pair,) = compare(pd.concat(runs)).types[0].pairs
    assert (abs(pair.units).max() < 1e-9, pair.identical) == (True, False)


def test_main_scores_of_different_metrics_are_refused():
    tables = [
        table_of({"a": RISING, "b": RISING}, metric="main_score"),
        table_of({"a": RISING}, metric="ndcg_at_10"),
        table_of({"a": [score / 2 for score in RISING]}, metric="recall_at_10"),
        table_of({"b": RISING}, metric="recall_at_10"),
        table_of({"b": [score / 2 for score in RISING]}, metric="ndcg_at_10"),
    ]
    with pytest.raises(ConfigurationError, match=r"main scores of T0 .*a: ndcg_at_10; b: recall_at_10.*--metric"):
        compare(pd.concat(tables))
    assert compare(pd.concat(tables), metric="recall_at_10").types[0].pairs[0].plan.tasks == 8


def test_two_designs_with_one_label_are_refused():
    tables = [table_of({"5": RISING}, option="last 4"), table_of({"5 (last 4)": RISING})]
    with pytest.raises(DataError, match=r"two designs are both called '5 \(last 4\)'"):
        compare(pd.concat(tables))


def test_seeds_with_different_tasks_are_named():
    tables = [
        table_of({"a": RISING, "b": RISING[::-1]}, seed="0"),
        table_of({"a": RISING[:5], "b": RISING[::-1]}, seed="1"),
    ]
    notes = " ".join(compare(pd.concat(tables)).notes)
    assert "the seeds of a were scored on different numbers of tasks (seed 0 8, seed 1 5)" in notes
