from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from st_llmpool.evaluation import evaluate, load_suite
from st_llmpool.evaluation.encoder import FiniteEncoder, identify
from st_llmpool.evaluation.run import run_tasks
from st_llmpool.model_card.identity import fingerprint
from st_llmpool.modules.errors import InputError
from tests.evaluation.tiny_suite import TASKS, WORDS, static_model

TYPES = [task["name"] for task in TASKS]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("task", TYPES)
def test_embedding_that_is_not_finite_stops_every_task(suite, tmp_path, task, value):
    model = static_model()
    with torch.no_grad():
        model[0].embedding.weight[WORDS.index("plum")] = value
    with pytest.raises(InputError, match=f"Task {task}: .* not finite; the first is of text .*plum"):
        evaluate(model, suite=suite, tasks=[task], output_dir=tmp_path / "out", show_progress=False)
    assert not list((tmp_path / "out").rglob(f"{task}.json"))


def test_error_names_the_first_text(suite, model):
    with torch.no_grad():
        model[0].embedding.weight[WORDS.index("tram")] = float("nan")
    (task,) = load_suite(suite, tasks=["TinySts"])
    inputs = DataLoader(Dataset.from_dict({"text": ["a", "b", "c", "a tram", "e", "tram"]}), batch_size=2)
    encoder = FiniteEncoder(model, [task])
    with pytest.raises(InputError, match=r"2 of 6 embeddings are not finite; the first is of text 3 \('a tram'\)"):
        encoder.encode(inputs, task_metadata=task.metadata, hf_split="test", hf_subset="default")


class Recorder:
    """Notes the prompt of every call to a model's encode functions."""

    def __init__(self, monkeypatch, model):
        self.prompts = []
        for name in ("encode", "encode_query", "encode_document"):
            monkeypatch.setattr(model, name, self.wrap(name, getattr(model, name)))

    def wrap(self, name, function):
        def call(*args, **kwargs):
            self.prompts.append((name, kwargs.get("prompt")))
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {("encode_query", "suite: "), ("encode_document", None)}),
        ({"query": "", "document": ""}, {("encode_query", "suite: "), ("encode_document", "")}),
        ({"query": "mine: ", "document": "d: "}, {("encode_query", "mine: "), ("encode_document", "d: ")}),
        ({"Retrieval-query": "mine: ", "document": ""}, {("encode_query", "mine: "), ("encode_document", "")}),
    ],
)
def test_prompt_of_the_model_comes_before_that_of_the_suite(monkeypatch, suite_of, model, own, expected):
    suite = suite_of({"name": "TinySearch", "type": "Retrieval", "folder": "search", "prompt": {"query": "suite: "}})
    tasks = load_suite(suite)
    model.prompts = own
    recorder = Recorder(monkeypatch, model)
    run_tasks(FiniteEncoder(model, tasks), tasks, None, 32, show_progress=False)
    assert {(name, prompt) for name, prompt in recorder.prompts if name != "encode"} == expected


def test_prompt_without_a_role_goes_before_every_text(monkeypatch, suite_of, model):
    tasks = load_suite(suite_of({"name": "TinySts", "type": "STS", "folder": "sts", "prompt": "same: "}))
    recorder = Recorder(monkeypatch, model)
    run_tasks(FiniteEncoder(model, tasks), tasks, None, 32, show_progress=False)
    assert set(recorder.prompts) == {("encode", "same: ")}


def test_names_are_local_and_hold_the_folder_or_the_card_name(tmp_path, model):
    assert identify(model)[0] == "local/unnamed"
    model.model_card_data.model_name = "SentenceTransformer based on org/base"
    assert identify(model)[0] == "local/SentenceTransformer-based-on-org-base"
    model.save_pretrained(str(tmp_path / "my model"))
    assert identify(model, str(tmp_path / "my model"))[0] == "local/my-model"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("squad-5/model", "local/squad-5"),
        ("squad-5/checkpoints/checkpoint-60", "local/squad-5-checkpoint-60"),
        ("builtin_5_seed0/training/model", "local/builtin_5_seed0"),
        ("my-model", "local/my-model"),
    ],
)
def test_models_of_different_runs_have_different_names(tmp_path, model, folder, name):
    assert identify(model, str(tmp_path / folder))[0] == name


def test_hub_model_keeps_its_id_and_commit(model):
    model.model_card_data.base_model_revision = "c0ffee"
    assert identify(model, "org/model") == ("org/model", "c0ffee")
    assert identify(model)[1] == fingerprint(model)  # a copy trained further may keep the base's commit
