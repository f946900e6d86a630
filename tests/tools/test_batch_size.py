"""The largest batch that fits is found by training with it: the search on a pretended machine, and one real search."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

from st_llmpool.cli import app
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.tools import batch_size
from st_llmpool.tools.batch_size import BatchTrial, largest_batch


@pytest.fixture
def machine(monkeypatch):
    """`machine(96)` pretends that a batch of 96 fits and one of 97 does not; returns the recipes that were tried."""

    def make(limit):
        tried = []

        def pretend(recipe, folder, memory):
            rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
            tried.append((recipe, rows))
            size = recipe.training.batch_size
            return BatchTrial(size, True, size / 10, 1.0) if size <= limit else BatchTrial(size, fits=False)

        monkeypatch.setattr(batch_size, "_try", pretend)
        return tried

    return make


@pytest.mark.parametrize("start", [2, 5, 64, 1000])
@pytest.mark.parametrize("limit", [2, 3, 7, 96, 350])
def test_the_answer_is_within_an_eighth_of_what_fits(machine, make_recipe, start, limit):
    tried = machine(limit)
    trials = largest_batch(make_recipe({"training": {"batch_size": start}}), memory=1, at_most=512)
    best = max(trial.batch_size for trial in trials if trial.fits)
    assert best <= limit <= best + max(1, best // 8)
    assert [trial.batch_size for trial in trials] == sorted({recipe.training.batch_size for recipe, _ in tried})
    assert len(trials) == len(tried) <= 14


def test_it_stops_at_the_largest_that_may_be_tried_and_says_if_none_fits(machine, make_recipe):
    machine(10**6)
    assert largest_batch(make_recipe(), memory=1, at_most=100)[-1] == BatchTrial(100, True, 10.0, 1.0)
    machine(1)
    with pytest.raises(ConfigurationError, match=r"Not even a batch of 2 fits in 1\.5 GiB.*mini_batch_size"):
        largest_batch(make_recipe(), memory=1.5)


def test_what_is_tried_is_the_recipe_on_full_texts_that_all_differ(machine, make_recipe, pairs):
    recipe = make_recipe(
        {
            "training": {"optim": "adamw_8bit", "gradient_checkpointing": True},
            "data": [{"source": pairs, "instruction": "Find: "}],
            "evaluation": {"data": [{"source": pairs}]},
            "stages": [{"kind": "mntp", "texts": [{"source": pairs, "column": "query"}]}],
        }
    )
    tried = machine(4)
    largest_batch(recipe, memory=1)
    found, rows = tried[0]
    assert found.model == recipe.model
    assert (found.training.optim, found.training.gradient_checkpointing) == ("adamw_8bit", True)
    assert (found.data[0].instruction, found.stages, found.evaluation.is_on) == ("Find: ", [], False)
    texts = [text for row in rows for text in row.values()]
    assert len(rows) == 2 * found.training.batch_size
    assert [*rows[0]] == ["query", "positive", "negative_1"]
    assert len(set(texts)) == len(texts)
    assert {len(text.split()) for text in texts} == {recipe.model.max_seq_length}


def test_real_steps_are_measured_and_what_is_too_much_is_stopped(make_recipe, tmp_path):
    recipe = make_recipe({"model": {"tune": "full"}, "training": {"batch_size": 4}})
    (trial,) = largest_batch(recipe, memory=50, at_most=4)
    assert trial.fits
    assert 0.1 < trial.memory < 10  # a process with torch, and a tiny model
    assert trial.seconds > 0
    with pytest.raises(ConfigurationError, match=r"Not even a batch of 2 fits in 0\.1 GiB"):
        largest_batch(recipe, memory=0.1, at_most=2)
    assert not (tmp_path / "run").exists()


def test_a_process_that_the_system_ends_for_its_memory_does_not_fit(make_recipe, tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(batch_size.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ConfigurationError, match="Not even a batch of 2 fits in 50 GiB"):
        largest_batch(make_recipe(), memory=50, at_most=2)


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried", False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)", False),
        ("shapes cannot be multiplied", None),
    ],
)
def test_errors_that_tell_of_memory_are_told_from_others(make_recipe, tmp_path, monkeypatch, words, fits):
    def fail(*args, **kwargs):
        raise RuntimeError(words)

    monkeypatch.setattr(batch_size, "train", fail)
    make_recipe().to_yaml(tmp_path / "recipe.yaml")
    with nullcontext() if fits is False else pytest.raises(RuntimeError, match=words):
        assert batch_size.run_trial(str(tmp_path / "recipe.yaml"), 2**40) == {}


def test_another_failure_is_no_matter_of_memory(make_recipe):
    recipe = make_recipe({"model": {"lora": {"target_modules": ["no_such_layer"]}}})
    with pytest.raises(ConfigurationError, match=r"^A batch of 4 cannot be trained with: model\.lora: .*no_such_layer"):
        largest_batch(recipe, memory=50, at_most=4)


def test_the_command_says_what_to_set(machine, make_recipe, tmp_path):
    machine(50)
    make_recipe().to_yaml(tmp_path / "recipe.yaml")
    result = CliRunner().invoke(app, ["batch-size", str(tmp_path / "recipe.yaml"), "--memory", "7", "--at-most", "48"])
    assert result.exit_code == 0, result.output
    assert "within 7 GiB" in result.output
    assert "training.batch_size=48 (the largest size tried)" in result.output
