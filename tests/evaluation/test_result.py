from __future__ import annotations

import json

from rich.console import Console

from st_llmpool.evaluation import evaluate
from st_llmpool.evaluation.result import EvaluationResult, TaskScore

STS_ONLY = {"name": "TinySts", "type": "STS", "folder": "sts"}


def test_tables_show_every_task(suite_of, tmp_path, model):

    result = evaluate(model, suite=suite_of(STS_ONLY), output_dir=tmp_path, show_progress=False)
    console = Console(record=True, width=100)
    console.print(result.to_rich())
    score = f"{result.scores['TinySts']:.4f}"
    for shown in (console.export_text(), result.to_markdown()):
        assert "TinySts" in shown
        assert score in shown
    assert json.loads(result.to_json())["rows"][0]["metric"] == "cosine_spearman"


def test_score_that_is_not_defined_is_null_in_json():
    result = EvaluationResult("local/m", "1", (TaskScore("Sts", "STS", "cosine_spearman", float("nan")),))
    assert json.loads(result.to_json())["rows"][0]["score"] is None
