from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from st_llmpool.study import worker
from st_llmpool.study.records import finished, read_scores
from st_llmpool.study.runner import StudyRunner
from st_llmpool.study.settings import DesignSettings
from st_llmpool.study.worker import carry_out
from st_llmpool.training.trainer import TrainingError
from tests.study.conftest import TOPICS


def test_a_stopped_run_goes_on_and_gives_the_numbers_of_one_that_was_not(tiny_study, study_data, tmp_path, monkeypatch):
    run = tiny_study.runs()[1]
    carry_out(tiny_study, run, output_dir=tmp_path / "whole", work=tmp_path / "work-1", data_dir=study_data)

    def stop(folder, stage, **facts):
        if facts.get("step") == 3:
            raise KeyboardInterrupt

    def start():
        carry_out(tiny_study, run, output_dir=tmp_path / "stopped", work=tmp_path / "work-2", data_dir=study_data)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "write_progress", stop)
        with pytest.raises(KeyboardInterrupt):
            start()
    assert not finished([run], tmp_path / "stopped")
    assert (tmp_path / "work-2" / run.id / "training" / "checkpoints" / "checkpoint-2").is_dir()
    start()

    assert_same_results(run, tmp_path / "whole", tmp_path / "stopped")


def test_a_killed_study_in_a_shared_folder_leaves_its_run_to_the_other_with_the_same_results(
    tiny_study, study_data, tmp_path
):
    """Two studies on one output folder: the second is refused the run while the first has it, and resumes it after."""
    run = tiny_study.runs()[1]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tiny_study.to_dict()))
    folders = {"study": tmp_path / "study.yaml", "out": tmp_path / "out", "work": tmp_path / "work", "data": study_data}
    arguments = [f"--run={run.id}", *(f"--{name}={value}" for name, value in folders.items())]
    command = [sys.executable, "-m", "st_llmpool.study.worker", *arguments]
    with (tmp_path / "log.txt").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as first:
        checkpoint = tmp_path / "work" / run.id / "training" / "checkpoints" / "checkpoint-2"
        while not (checkpoint / "trainer_state.json").is_file():
            assert first.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)
        assert worker.main(arguments) == worker.LOCKED
        first.kill()
    assert not finished([run], tmp_path / "out")
    assert worker.main(arguments) == 0
    carry_out(tiny_study, run, output_dir=tmp_path / "alone", work=tmp_path / "other", data_dir=study_data)
    assert_same_results(run, tmp_path / "alone", tmp_path / "out")


def assert_same_results(run, *folders):
    one, other = (read_scores(finished([run], folder), folder) for folder in folders)
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)
    first, second = (finished([run], folder)[0] for folder in folders)
    assert first.training["losses"] == second.training["losses"]
    assert first.validation == second.validation


def test_a_design_without_weights_to_train_is_evaluated_as_it_is_for_every_seed(tiny_study, study_data, tmp_path):
    tiny_study.recipe["model"]["tune"] = "pooling"
    study = dataclasses.replace(tiny_study, untrained=True, frozen=True, seeds=[0, 1])
    folders = {"output_dir": tmp_path / "out", "work": tmp_path / "work", "data_dir": study_data}
    plain = [run for run in [*study.reference_runs(), *study.runs()] if run.design == "mean-bidirectional"]
    records = [carry_out(study, run, **folders) for run in plain]
    assert [(record.seed, record.step, record.training["steps"]) for record in records] == [
        (0, "0", 0),
        (0, "", 0),
        (1, "", 0),
    ]
    scores = read_scores(records, tmp_path / "out").scores
    main = scores[scores["metric"] == "main_score"]
    assert set(main.groupby("task")["score"].agg(["count", "nunique"]).itertuples(index=False, name=None)) == {(3, 1)}
    assert not list((tmp_path / "work").rglob("checkpoints"))
    assert not any(record.diverged for record in records)


def test_bm25_is_scored_on_the_search_tasks(tiny_study, study_data, tmp_path):
    tables = {"corpus": {"id": ["a", "b"], "text": ["the ship sails", "dry grass"]}}
    tables["queries"] = {"id": ["q", "r"], "text": ["a ship", "dry"]}
    tables["qrels"] = {"query-id": ["q", "r"], "corpus-id": ["a", "a"]}
    for name, table in tables.items():
        pd.DataFrame(table).to_parquet(study_data / "topics" / f"{name}.parquet")
    suite = yaml.safe_load((study_data / "suite.yaml").read_text())
    suite["tasks"].append({"name": "LocalFind", "type": "Retrieval", "folder": "topics", "corpus": "nature"})
    (study_data / "suite.yaml").write_text(yaml.safe_dump(suite))
    (run,) = tiny_study.reference_runs()
    assert run.id == "bm25"
    runner = StudyRunner(tiny_study, tmp_path / "out", data_dir=study_data)
    record = carry_out(tiny_study, run, output_dir=tmp_path / "out", work=tmp_path / "work", data_dir=study_data)
    assert runner.finished == [record]
    (row,) = read_scores([record], tmp_path / "out").table.to_dict("records")
    names = ("base", "design", "attention", "readout", "pooling", "task", "task_type", "corpus", "metric", "step")
    assert [row[name] for name in names] == [
        *("", "bm25", "", "", "", "LocalFind", "Retrieval", "nature", "main_score", ""),
    ]
    assert row["score"] == pytest.approx((1 + 1 / math.log2(3)) / 2, abs=1e-4)


@pytest.mark.logs_warning
def test_a_run_whose_numbers_are_not_finite_has_diverged_and_has_no_scores(
    tiny_study, study_data, tmp_path, monkeypatch
):
    def stop(*args, **options):
        raise TrainingError("Step 3: the loss is nan.")

    monkeypatch.setattr(worker, "train", stop)
    run = tiny_study.runs()[0]
    record = carry_out(tiny_study, run, output_dir=tmp_path / "out", work=tmp_path / "work", data_dir=study_data)
    assert record.diverged
    assert finished([run], tmp_path / "out") == [record]
    assert read_scores([record], tmp_path / "out").table.empty


def test_designs_see_the_same_texts_in_the_same_order(tiny_study, study_data, tmp_path, monkeypatch):
    from st_llmpool.training.trainer import EmbedderTrainer

    seen: list[list[list[int]]] = []
    original = EmbedderTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        features, _ = self.collect_features(inputs)
        seen[-1].append([column["input_ids"].tolist() for column in features])
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EmbedderTrainer, "compute_loss", spy)
    for run in tiny_study.runs():
        seen.append([])
        carry_out(tiny_study, run, output_dir=tmp_path / "out", work=tmp_path / "work", data_dir=study_data)
    assert len(seen[0]) == 4
    assert seen[0] == seen[1]


def test_the_runs_of_a_study_on_frozen_backbones_encode_each_text_once(tiny_study, study_data, tmp_path):
    """For training, validation and suite, over designs, readouts and seeds; once for each attention."""
    model = {"tune": "pooling", "max_seq_length": 16}
    designs = [
        DesignSettings("mix", change={"model": {"attention": "bidirectional", "pooling": "scalar_mix"}}),
        DesignSettings("5"),
        DesignSettings("5", "eos", change={"model": {"layer_readout": "eos"}}),
    ]
    recipe = {**tiny_study.recipe, "model": model}
    study = dataclasses.replace(tiny_study, designs=designs, recipe=recipe, seeds=[0, 1], contrasts=None, frozen=True)
    counts, records = [], []
    for run in study.runs():
        before = cached_texts(tmp_path / "work" / "cache")
        folders = {"output_dir": tmp_path / "out", "work": tmp_path / "work", "data_dir": study_data}
        records.append(carry_out(study, run, **folders))
        counts.append(cached_texts(tmp_path / "work" / "cache") - before)
    pairs = [json.loads(line) for line in (study_data / "pairs.jsonl").read_text().splitlines()]
    texts = {text for pair in pairs for text in pair.values()} | {text for own in TOPICS.values() for text in own}
    assert len(texts) <= counts[0] <= len(texts) + 10  # of the reload check, the seal and the card
    assert counts[1:] == [0] * 5
    assert all(record.training["steps"] == 4 for record in records)
    first, second = (tmp_path / "work" / run.id / "training" / "model" for run in study.runs()[:2])
    assert (first / "model.safetensors").samefile(second / "model.safetensors")  # one backbone on the disk
    one, two = (SentenceTransformer(str(folder), trust_remote_code=True).encode("a dog") for folder in (first, second))
    assert not np.allclose(one, two)


def cached_texts(folder):
    return sum(len(load_file(file)["keys"]) for file in folder.rglob("*.safetensors"))
