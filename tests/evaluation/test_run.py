from __future__ import annotations

import json
import random

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from mteb.mocks.mock_tasks import MockRetrievalTask, MockSTSTask
from rich.console import Console
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dropout
from typer.testing import CliRunner

from st_llmpool import build_embedder
from st_llmpool.cli import app
from st_llmpool.evaluation import SuiteEvaluator, evaluate
from st_llmpool.evaluation.run import EvaluationResult, TaskScore
from st_llmpool.modules.errors import ConfigurationError, DataError
from tests.evaluation.tiny_suite import STS, static_model, texts, write_table

STS_ONLY = {"name": "TinySts", "type": "STS", "folder": "sts"}


@pytest.fixture
def unloaded(monkeypatch, tmp_path):
    """A folder with a model's list of modules; any attempt to load a model fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("st_llmpool.evaluation.run.SentenceTransformer.__init__", refuse)
    (tmp_path / "unloaded").mkdir()
    (tmp_path / "unloaded" / "modules.json").write_text("[]")
    return tmp_path / "unloaded"


def test_result_files_are_those_of_mteb(suite, tmp_path, model):
    result = evaluate(model, suite=suite, tasks=["TinySts", "TinySearch"], output_dir=tmp_path, show_progress=False)
    assert [row.task for row in result.rows] == ["TinySts", "TinySearch"]
    for row in result.rows:
        found = mteb.TaskResult.from_disk(result.folder / f"{row.task}.json")
        assert found.get_score() == row.score
    assert (result.folder / "model_meta.json").exists()
    by_query = json.loads((result.folder / "TinySearch.json").read_text())["scores"]["test"][0]["ndcg_at_10_by_query"]
    assert np.mean(list(by_query.values())) == pytest.approx(result.scores["TinySearch"], abs=1e-4)


def test_the_command_writes_below_runs_by_default_and_says_so(suite, tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("my/model")
    done = CliRunner().invoke(app, ["evaluate", "my/model", "--suite", str(suite), "--task", "TinySts"])
    assert "Written: runs/results/my-model" in done.output, done.output
    assert (tmp_path / "runs/results/my-model/scores.json").is_file()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_scores_on_cached_summaries_are_those_without_and_a_second_model_encodes_nothing(
    suite, tiny_llm, tmp_path, dtype
):
    scores, written = [], []
    for name, cache in (("plain", None), ("first", tmp_path / "cache"), ("second", tmp_path / "cache")):
        model = build_embedder(tiny_llm, pooling="scalar_mix", verify=False, max_seq_length=32, device="cpu")
        result = evaluate(
            model, suite=suite, output_dir=tmp_path / name, show_progress=False, cache=cache, cache_dtype=dtype
        )
        scores.append(result.scores)
        written.append({file.name for file in tmp_path.glob("cache/*/*.safetensors")})
    assert written[0] == set() != written[1] == written[2]
    assert scores[1] == pytest.approx(scores[0], abs=0.02 if dtype == "float16" else 1e-4)
    assert scores[2] == scores[1]


def test_two_unnamed_models_do_not_share_results(suite_of, tmp_path):
    suite = suite_of(STS_ONLY)
    results = [
        evaluate(static_model(seed), suite=suite, output_dir=tmp_path, show_progress=False) for seed in (0, 1, 0)
    ]
    assert results[0].scores == results[2].scores
    assert results[0].scores != results[1].scores
    assert results[0].folder == results[2].folder != results[1].folder


def test_finished_tasks_are_not_run_again_unless_the_data_changed(suite_of, tmp_path, model, monkeypatch):
    suite = suite_of(STS_ONLY)
    encoded = []
    encode = SentenceTransformer.encode
    monkeypatch.setattr(SentenceTransformer, "encode", lambda self, *a, **k: encoded.append(1) or encode(self, *a, **k))

    def run():
        encoded.clear()
        return evaluate(model, suite=suite, output_dir=tmp_path, show_progress=False).scores["TinySts"], len(encoded)

    first = run()
    assert first[1] > 0
    assert run() == (first[0], 0)
    write_table(suite.parent / "sts/test.parquet", STS | {"score": STS["score"][::-1]})
    changed = run()
    assert changed[1] > 0
    assert changed[0] != first[0]


def test_random_state_is_the_same_after_an_evaluation(suite, tmp_path, model):
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    evaluate(model, suite=suite, tasks=["TinySts", "TinyTopics"], output_dir=tmp_path, show_progress=False)
    assert draw() == expected


def test_saved_model_scores_as_in_memory(suite_of, tmp_path, model):
    suite = suite_of(STS_ONLY)
    model.save_pretrained(str(tmp_path / "saved"))
    saved = evaluate(tmp_path / "saved", suite=suite, output_dir=tmp_path, show_progress=False)
    assert saved.model == "local/saved"
    assert saved.scores == evaluate(model, suite=suite, output_dir=tmp_path, show_progress=False).scores


def test_benchmark_runs_its_tasks_or_the_named_ones(tmp_path, model, monkeypatch):
    benchmark = mteb.Benchmark(name="Tiny", tasks=[MockRetrievalTask(), MockSTSTask()])
    monkeypatch.setattr(mteb, "get_benchmark", lambda name: benchmark)
    everything = evaluate(model, benchmark="Tiny", output_dir=tmp_path, show_progress=False)
    assert [row.type for row in everything.rows] == ["Retrieval", "STS"]
    one = evaluate(model, benchmark="Tiny", tasks=["MockRetrievalTask"], output_dir=tmp_path, show_progress=False)
    assert one.rows == everything.rows[:1]


def test_name_that_the_suite_does_not_have_is_a_task_of_mteb(suite, tmp_path, model, monkeypatch):
    monkeypatch.setattr(mteb, "get_task", lambda name: {"MockSTSTask": MockSTSTask}[name]())
    result = evaluate(model, suite=suite, tasks=["MockSTSTask", "TinySts"], output_dir=tmp_path, show_progress=False)
    assert [row.task for row in result.rows] == ["MockSTSTask", "TinySts"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"suite": "squd"}, DataError, "Did you mean 'squad'"),
        ({"suite": "squad"}, DataError, "--data DIR"),
        ({"benchmark": "MTEB(eng, v2)", "limit": 3}, ConfigurationError, "limit='3' is of a local suite"),
        ({"benchmark": "MTEB(eng, v2)", "suite": "squad"}, ConfigurationError, "suite='squad' .*leave one out"),
        ({"benchmark": "MTEB(eng, v2)", "suite": "builtin"}, ConfigurationError, "suite='builtin'"),
        ({"benchmark": "MTEB(eng, v2)", "data_dir": "x"}, ConfigurationError, "data_dir='x'"),
        ({"tasks": ["SciFct"]}, ConfigurationError, "neither the suite nor mteb.*Did you mean 'SciFact'"),
        ({"tasks": []}, ConfigurationError, "tasks is empty"),
        ({"batch_size": 0}, ConfigurationError, "batch_size=0"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(tmp_path, unloaded, arguments, error, message):
    with pytest.raises(error, match=message):
        evaluate(unloaded, output_dir=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_an_output_place_that_cannot_be_used_is_refused_first(tmp_path, unloaded):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="file is not a folder"):
        evaluate(unloaded, output_dir=tmp_path / "file" / "out", suite="squad")


def test_data_that_cannot_be_downloaded_are_one_line_with_the_way_out(tmp_path, model, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot be downloaded: .*network or a filled cache; a local suite") as error:
        evaluate(model, benchmark="MTEB(eng, v2)", tasks=["STS12"], output_dir=tmp_path, show_progress=False)
    assert "\n" not in str(error.value)


def test_unknown_benchmark_is_refused_with_the_hint_of_mteb(tmp_path, unloaded, monkeypatch):
    def unknown(name):  # as the real one, which takes seconds to build its registry
        raise KeyError(f"'{name}' not found. Did you mean: MTEB(eng, v2)?")

    monkeypatch.setattr(mteb, "get_benchmark", unknown)
    with pytest.raises(
        ConfigurationError, match=r"no benchmark 'MTEB\(eng, v3\)' not found. Did you mean: MTEB\(eng, v2"
    ):
        evaluate(unloaded, benchmark="MTEB(eng, v3)", output_dir=tmp_path)


def test_foreign_code_is_refused_before_data_are_read(unloaded, tmp_path):
    (unloaded / "modules.json").write_text('[{"type": "evil.Evil", "path": ""}]')
    with pytest.raises(ConfigurationError, match=r"type 'evil\.Evil'.*--trust-remote-code"):
        evaluate(unloaded, suite="squad", data_dir=tmp_path / "none", output_dir=tmp_path / "out")


def test_wrong_data_are_refused_before_a_model_is_loaded(tmp_path, suite, unloaded):
    write_table(suite.parent / "sts/test.parquet", {"sentence1": ["a"]})
    with pytest.raises(DataError, match=r"sts/test.parquet has no column 'sentence2'"):
        evaluate(unloaded, suite=suite, output_dir=tmp_path / "out")


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


QUICK = ["TinySearch", "TinySts", "TinyCandidates"]


def test_scores_are_those_of_an_evaluation_with_the_same_limit(suite, tmp_path, model):
    evaluator = SuiteEvaluator(suite, tasks=QUICK, limit=10, name="tiny")
    metrics = evaluator(model)
    result = evaluate(model, suite=suite, tasks=QUICK, limit=10, output_dir=tmp_path, show_progress=False)
    assert metrics["tiny_mean"] == pytest.approx(np.mean(list(result.scores.values())), abs=1e-5)
    for row in result.rows:
        assert metrics[f"tiny_{row.task}_{row.metric}"] == pytest.approx(row.score, abs=1e-5)
    assert evaluator.primary_metric == "tiny_mean"


def test_second_call_gives_the_same_scores(suite, model):
    evaluator = SuiteEvaluator(suite, tasks=["TinyTopics"])
    assert evaluator(model) == evaluator(model)


class SameScore(BaseEvaluator):
    def __call__(self, *args, **kwargs):
        return {"mean": 0.5}


def test_evaluation_does_not_change_the_training(suite, tmp_path):
    pairs = Dataset.from_dict({"anchor": texts(40, 1), "positive": texts(40, 2)})

    def train(evaluator):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        model = SentenceTransformer(modules=[*static_model(), Dropout(0.3)], device="cpu")
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        loss = MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model, arguments, pairs, evaluator=evaluator, loss=loss)
        trainer.train()
        return model[0].embedding.weight.detach(), trainer.state.log_history

    plain, _ = train(SameScore())  # the trainer itself draws a seed for every evaluation
    evaluated, log = train(SuiteEvaluator(suite, tasks=QUICK, limit=10))
    torch.testing.assert_close(evaluated, plain, rtol=0, atol=0)
    assert [entry["step"] for entry in log if "eval_mean" in entry] == [3, 6, 9, 12]


def test_wrong_suite_is_refused_at_construction(suite):
    with pytest.raises(DataError, match="--data DIR"):
        SuiteEvaluator("squad")
    with pytest.raises(ConfigurationError, match="tasks is empty"):
        SuiteEvaluator(suite, tasks=[])
