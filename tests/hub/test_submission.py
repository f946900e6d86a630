"""A submission is what mteb reads back, describes the whole model, and holds results of this very model only."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTask
from mteb.models import ModelMeta
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from st_llmpool import build_embedder
from st_llmpool.cli import app
from st_llmpool.evaluation import evaluate
from st_llmpool.hub.push import push
from st_llmpool.hub.submission import Authorship, meta_source, model_meta, submission
from st_llmpool.modules.errors import ConfigurationError, DataError, InputError
from tests.evaluation.tiny_suite import STS, write_suite

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROMPTS = {"query": "q: ", "document": "d: ", "STSBenchmark": "same: "}


def task_of_mteb(name: str) -> AbsTask:
    """A task that mteb has, with data that are here."""
    task = mteb.get_task(name)
    task.dataset = DatasetDict({"test": Dataset.from_dict(dict(STS))})
    task.data_loaded = True
    return task


@pytest.fixture(autouse=True)
def tiny_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of two tasks; both are read from here."""
    names = ("STSBenchmark", "SICK-R")
    monkeypatch.setattr(mteb, "get_benchmark", lambda _: mteb.Benchmark("Tiny", [task_of_mteb(name) for name in names]))


@pytest.fixture
def no_mock_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves mteb's mock run out, which takes ten seconds."""
    monkeypatch.setattr("st_llmpool.hub.submission._mock_run", lambda encoder, meta: "")


@pytest.fixture
def folder(tiny_llm: str, tmp_path: Path) -> Path:
    model = build_embedder(tiny_llm, prompts=PROMPTS)
    model.model_card_data.license = "apache-2.0"
    model.save_pretrained(str(tmp_path / "embedder"))
    return tmp_path / "embedder"


@pytest.fixture
def results(folder: Path, tmp_path: Path) -> Path:
    """Results of the folder on one task of mteb and on one that it does not have."""
    suite = write_suite(tmp_path / "data", [{"name": "TinySts", "type": "STS", "folder": "sts"}])
    for chosen in ({"benchmark": "Tiny", "tasks": ["STSBenchmark"]}, {"suite": suite}):
        evaluate(folder, output_dir=tmp_path / "results", show_progress=False, trust_remote_code=True, **chosen)
    return tmp_path / "results"


def weights_on_disk(folder: Path) -> int:
    """Counts the numbers in all weight files."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            total += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
    return total


def tree(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_submission_of_a_hub_model_is_complete_and_mteb_reads_it(hub, elsewhere, folder, results, tmp_path, tiny_llm):
    commit = push(folder, native=False).commit  # the results are those of this form
    SentenceTransformer(tiny_llm).push_to_hub("alice/native")
    out = tmp_path / "submission"
    arguments = ["submission", "alice/embedder", "--out", str(out), "--results", str(results), "--trust-remote-code"]
    printed = CliRunner().invoke(app, [*arguments, "--training-dataset", "none", "--contact", "alice"])
    assert printed.exit_code == 0, printed.output + str(printed.exception)
    assert "Left out, as they are not tasks of mteb: TinySts" in printed.output
    place = f"results/alice__embedder/{commit}"
    source = "mteb/models/model_implementations/alice_embedder.py"
    written = {"README.md", "mock_run.md", source}
    written |= {f"{place}/{name}" for name in ("STSBenchmark.json", "model_meta.json", "run_settings.jsonl")}
    assert tree(out) == written
    assert "1 of 2 tasks of MTEB(eng, v2)" in (out / "README.md").read_text()
    assert "Missing: SICK-R." in (out / "README.md").read_text()
    assert "✓ (28/28) | text" in (out / "mock_run.md").read_text()

    read = mteb.ResultCache(out).load_results(models=["alice/embedder"], include_remote=False).model_results[0]
    assert (read.model_name, read.model_revision) == ("alice/embedder", commit)
    original = next(results.rglob("STSBenchmark.json"))
    assert read.task_results[0].scores == mteb.TaskResult.from_disk(original).scores
    described = json.loads((out / place / "model_meta.json").read_text())
    assert described["n_parameters"] == weights_on_disk(folder)
    assert described["training_datasets"] == []
    meta = runpy.run_path(str(out / source))["alice_embedder"]
    assert meta.name == described["name"] == "alice/embedder"

    # The description loads the model by itself, as mteb will: the flag is in it, and so are the prompts.
    answer = elsewhere(f"""
        import runpy, mteb
        meta = runpy.run_path({str(out / source)!r})["alice_embedder"]
        loaded = meta.load_model(device="cpu")
        vectors = loaded.model.encode(["fox", "the quick brown fox"]).tolist()
        answer = [vectors, loaded.model_prompts, loaded.mteb_model_meta.experiment_kwargs]
        # What `mteb run -m` calls: a native model of the Hub it can load; the flag of a portable one it cannot set.
        answer.append(mteb.get_model("alice/native").mteb_model_meta.name)
        for name in ("alice/embedder", {str(folder)!r}):
            try:
                mteb.get_model(name)
            except Exception as error:
                answer.append(str(error))
    """)
    expected = SentenceTransformer(str(folder), trust_remote_code=True).encode(["fox", "the quick brown fox"])
    np.testing.assert_allclose(answer[0], expected, atol=1e-6)
    assert answer[1] == PROMPTS
    assert answer[2] is None  # else mteb would file the results as those of an experiment
    assert answer[3] == "alice/native"
    assert "trust_remote_code=True" in answer[4]
    assert "No model implementation" in answer[5]


def test_a_folder_is_submitted_under_the_name_that_it_was_pushed_as(folder, results, tmp_path, no_mock_run):
    out = submission(folder, tmp_path / "out", name="me/mine", revision=COMMIT, results=results, trust_remote_code=True)
    place = out / "results" / "me__mine" / COMMIT
    assert (place / "STSBenchmark.json").is_file()
    settings = [json.loads(line) for line in (place / "run_settings.jsonl").read_text().splitlines()]
    assert [(entry["task"], entry["encode_kwargs"]["batch_size"]) for entry in settings] == [("STSBenchmark", 32)]


def test_results_that_plain_mteb_made_of_the_folder_count(folder, tmp_path, no_mock_run):
    model = SentenceTransformer(str(folder), trust_remote_code=True)
    mteb.evaluate(model, task_of_mteb("SICK-R"), cache=mteb.ResultCache(tmp_path / "cache"), co2_tracker=False)
    out = submission(
        folder, tmp_path / "out", name="me/mine", revision=COMMIT, results=tmp_path / "cache", trust_remote_code=True
    )
    assert (out / "results" / "me__mine" / COMMIT / "SICK-R.json").is_file()


@pytest.mark.parametrize("change", ["weights", "prompts"])
def test_results_of_another_model_do_not_count(folder, results, tmp_path, change):
    other = SentenceTransformer(str(folder), trust_remote_code=True)
    if change == "weights":
        with torch.no_grad():
            other[1].layer_table += 1
    else:
        other.prompts["query"] = "another: "
    other.save_pretrained(str(tmp_path / "other" / "embedder"))
    with pytest.raises(DataError, match=r"no results of me/mine .*st-llmpool evaluate me/mine"):
        submission(
            tmp_path / "other" / "embedder",
            tmp_path / "out",
            name="me/mine",
            revision=COMMIT,
            results=results,
            trust_remote_code=True,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.update(dataset_revision="old"), "is of revision old"),
        (lambda result: [row.update(main_score=float("nan")) for row in result["scores"]["test"]], "score nan"),
        (lambda result: result.pop("scores"), "not a result that mteb reads"),
    ],
)
def test_a_result_that_would_be_refused_later_is_refused_now(folder, results, tmp_path, change, message):
    file = next(results.rglob("STSBenchmark.json"))
    result = json.loads(file.read_text())
    change(result)
    file.write_text(json.dumps(result))
    with pytest.raises(DataError, match=f"{file}.*{message}"):
        submission(folder, tmp_path / "out", name="me/mine", revision=COMMIT, results=results, trust_remote_code=True)


def test_a_model_that_fails_the_mock_run_is_not_submitted(folder, results, tmp_path, monkeypatch):
    class Report:
        all_passed = False

        def modality_summary(self):
            return [("x", "text", "MockSTSTask")]

        def to_markdown(self):
            return "report"

    monkeypatch.setattr(mteb, "mock_run", lambda model: Report())
    with pytest.raises(InputError, match=r"me/mine fails on MockSTSTask"):
        submission(folder, tmp_path / "out", name="me/mine", revision=COMMIT, results=results, trust_remote_code=True)
    assert not (tmp_path / "out").exists()


def test_what_the_leaderboard_cannot_take_is_said_before_a_model_is_loaded(hub, folder, tmp_path, monkeypatch):
    push(folder, private=True)
    monkeypatch.setattr(SentenceTransformer, "__init__", None)
    out = tmp_path / "out"
    with pytest.raises(ConfigurationError, match=r"alice/embedder is private"):
        submission("alice/embedder", out)
    with pytest.raises(ConfigurationError, match=r"'alice/nothing' is neither a folder.*RepositoryNotFoundError"):
        submission("alice/nothing", out)
    with pytest.raises(ConfigurationError, match=r"is a folder. Push it"):
        submission(folder, out, name="me/mine", revision="main")
    with pytest.raises(ConfigurationError, match=r"exists; choose another folder"):
        submission("alice/embedder", tmp_path)
    with pytest.raises(ConfigurationError, match=r"no task 'SciFct'. Did you mean 'SciFact'"):
        Authorship(training_datasets=["SciFct"])
    assert not out.exists()


def test_the_description_counts_base_adapter_and_pooling(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm, peft_config="paper")
    meta = model_meta(model, "me/mine", COMMIT, Authorship(license="mit"))
    model.save_pretrained(str(tmp_path / "adapter"))
    base = weights_on_disk(Path(tiny_llm))
    assert meta.n_parameters == base + weights_on_disk(tmp_path / "adapter")
    assert meta.n_embedding_parameters == model.tokenizer.vocab_size * 32
    assert meta.memory_usage_mb == round(4 * meta.n_parameters / 2**20, 1)


def test_the_description_says_how_the_model_is_loaded(tiny_llm, tmp_path):
    native = SentenceTransformer(tiny_llm)
    given = Authorship(license="mit", training_datasets=["SciFact"], citation="@misc{x,\n title={'\"}}")
    meta = model_meta(native.bfloat16(), "me/mine", COMMIT, given, card={"base_model": ["me/mine"]})
    assert meta.loader_kwargs == {}
    assert meta.use_instructions is False
    assert meta.adapted_from is None  # no model is its own base
    assert meta.output_dtypes == mteb.types.OutputDType.BF16
    (tmp_path / "mine.py").write_text(meta_source(meta))
    assert runpy.run_path(str(tmp_path / "mine.py"))["me_mine"] == meta
    portable = model_meta(build_embedder(tiny_llm, prompts=PROMPTS), "me/mine", COMMIT, given, {"base_model": "a/b"})
    assert portable.loader_kwargs == {"trust_remote_code": True}
    assert portable.use_instructions is True
    assert portable.adapted_from == "a/b"


def test_a_licence_that_is_missing_or_unknown_is_refused(tiny_llm):
    model = build_embedder(tiny_llm)
    with pytest.raises(ConfigurationError, match=r"licence of me/mine is unknown.*--license"):
        model_meta(model, "me/mine", COMMIT, Authorship())
    with pytest.raises(
        ConfigurationError, match=r"mteb rejects .*: license='none of them': Input should be 'not specified', 'mit'"
    ):
        model_meta(model, "me/mine", COMMIT, Authorship(license="none of them"))


def test_every_description_is_a_model_meta_of_mteb(tiny_llm):
    assert isinstance(model_meta(build_embedder(tiny_llm), "me/mine", COMMIT, Authorship(license="mit")), ModelMeta)
