"""`st-llmpool compare` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from st_llmpool.cli import app
from tests.stats.tiny_results import write_csv, write_json, write_model
from tests.stats.validation import CONTRASTS, DESIGNS, simulated_scores

TASKS = ["SciFact", "NFCorpus", "SCIDOCS", "ArguAna", "FiQA2018", "TRECCOVID", "STS12", "STS13"]


@pytest.fixture
def folders(tmp_path):
    """Foreign results of two models, one folder each."""
    rng = np.random.default_rng(0)
    for name, gain in (("org/small", 0.0), ("org/large", 0.1)):
        scores = dict(
            zip(TASKS, np.linspace(0.3, 0.6, len(TASKS)) + gain + rng.normal(0, 0.01, len(TASKS)), strict=True)
        )
        write_model(tmp_path / name.replace("/", "-") / "results", name, scores)
    return [str(tmp_path / "org-large"), str(tmp_path / "org-small")]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_two_folders_of_foreign_results_are_compared(folders, tmp_path):
    printed = run(*folders, "--json", tmp_path / "all.json")
    assert "org/large scores above org/small in this run, by 0." in " ".join(printed.split())
    assert "6 corpora, 6 tasks" in " ".join(printed.split())  # each of mteb's tasks is one
    assert "cannot reach 0.05" in " ".join(printed.split())  # two STS tasks
    types = json.loads((tmp_path / "all.json").read_text())["types"]
    assert [(kind["task_type"], kind["families"][0]["tasks"]) for kind in types] == [("Retrieval", 6), ("STS", 2)]
    (pair,) = types[0]["families"][0]["pairs"]
    both = [types[0]["scores"][model] for model in ("org/large", "org/small")]
    assert (pair["corpora"], pair["p"]) == (6, 2 / 64)
    differences = [both[0][task] - both[1][task] for task in both[0]]
    assert pair["mean_difference"] == pytest.approx(np.mean(differences), abs=1e-6)


def test_two_results_on_one_task_are_two_scores_and_one_sentence(tmp_path):
    for name, score in (("org/a", 0.4), ("org/b", 0.5)):
        write_model(tmp_path / name.replace("/", "-") / "results", name, {TASKS[0]: score})
    printed = run(tmp_path / "org-a", tmp_path / "org-b")
    words = " ".join(printed.split())
    assert all(part in words for part in ("org/a 0.4000", "org/b 0.5000", "One task cannot decide between models"))
    assert "p Holm" not in words
    assert len([line for line in printed.splitlines() if line.strip()]) <= 10


def test_tables_and_pictures_are_written(tmp_path):
    pytest.importorskip("scikit_posthocs", reason="the extra 'plots' is not installed")
    simulated_scores(np.random.default_rng(0), DESIGNS, tasks=12).to_parquet(tmp_path / "results.parquet")
    contrasts = [part for contrast in CONTRASTS for part in ("--contrast", contrast)]
    printed = run(tmp_path / "results.parquet", *contrasts, "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"comparison.md", "pairs.csv", "scores.csv", "STS_pairs.png", "STS_ranks.png"}
    assert printed.count("Written: ") == 5
    pairs = pd.read_csv(tmp_path / "out/pairs.csv")
    assert len(pairs) == 15
    assert [f"{pair.first}:{pair.second}" for pair in pairs.head(6).itertuples()] == list(CONTRASTS)
    assert len(pd.read_csv(tmp_path / "out/scores.csv")) == 12 * 6


def test_names_types_models_and_metric_can_be_given(tmp_path):
    for run_name, score in (("one", 0.5), ("two", 0.6)):
        scores = {"main_score": score, "recall": score + 0.2, "hf_subset": "default", "languages": []}
        content = {
            "dataset_revision": "1",
            "task_name": "OurSearch",
            "mteb_version": "2.26.24",
            "scores": {"test": [scores]},
        }
        write_json(tmp_path / run_name / "model" / "1" / "OurSearch.json", content | {"evaluation_time": 1.0})
    table = write_csv(tmp_path / "more.csv", "task,task_type,model,score,metric", "OurSearch,Retrieval,x,0.9,recall")
    (tmp_path / "types.yaml").write_text("OurSearch: Retrieval")
    paths = [f"one={tmp_path / 'one'}", f"two={tmp_path / 'two'}", table]
    out = tmp_path / "all.json"
    run(*paths[:2], "--task-types", tmp_path / "types.yaml", "--metric", "recall", "--json", out)
    assert json.loads(out.read_text())["types"][0]["scores"] == {"one": {"OurSearch": 0.7}, "two": {"OurSearch": 0.8}}


def test_wrong_input_is_one_message_without_a_traceback(tmp_path, refusal):
    table = write_csv(tmp_path / "s.csv", "task,task_type,model", "T,STS,a")
    printed = refusal("compare", str(table))
    assert "Traceback" not in printed
    assert "DataError" in printed
    assert "has no column 'score'" in printed


@pytest.mark.parametrize(
    ("library", "code", "extra"),
    [
        ("statsmodels", "from st_llmpool.stats import compare", "eval"),
        ("scikit_posthocs", "from st_llmpool.stats import plots; plots.require_libraries()", "plots"),
    ],
)
def test_missing_library_is_named_with_the_extra_that_brings_it(library, code, extra):
    code = f"import sys; sys.modules['{library}'] = None; {code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f'pip install "st-llmpool[{extra}]"' in result.stderr


def test_tables_are_compared_without_importing_mteb(tmp_path):
    """It takes seconds, and a table that names its task types needs nothing of it."""
    write_csv(tmp_path / "s.csv", "task,task_type,model,score", "T,STS,a,0.5", "T,STS,b,0.6")
    code = "import sys; from st_llmpool.stats import compare, read_results; compare(read_results(['s.csv']));"
    code += "print([name for name in ('mteb', 'torch', 'matplotlib') if name in sys.modules])"
    run_it = [sys.executable, "-c", code]
    assert subprocess.run(run_it, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "[]\n"
