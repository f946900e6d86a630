"""training.json says what the trainer's log holds, and what only the run knows."""

from __future__ import annotations

import io
import json
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import TrainerControl, TrainerState, TrainingArguments

from st_llmpool.modules import ScalarMixPooling
from st_llmpool.modules.errors import __version__
from st_llmpool.training.report import ElapsedTimeCallback, PoolingChange, RichProgress, write_report

LOG = [
    {"step": 1, "loss": 2.5, "learning_rate": 1e-3, "pooling_share": 0.0, "epoch": 0.1},
    {"step": 2, "loss": 2.0, "learning_rate": 5e-4, "pooling_share": 0.25},
    {"step": 2, "eval_mean": 0.5, "eval_runtime": 3.0, "eval_samples_per_second": 9.0},
    {"step": 2, "train_runtime": 7.0},
]


def trainer(**arguments):
    state = SimpleNamespace(log_history=LOG, global_step=2, stateful_callbacks={})
    given = {"world_size": 2, "device": SimpleNamespace(type="cpu"), "bf16": False, "fp16": False} | arguments
    handler = SimpleNamespace(callbacks=[ElapsedTimeCallback(seconds=12.34)])
    return SimpleNamespace(state=state, args=SimpleNamespace(**given), callback_handler=handler)


def test_curves_are_steps_with_values_and_evaluations_leave_speeds_out(tmp_path):
    report = write_report(tmp_path, trainer(), {"rows": {"a": 8}})
    assert json.loads((tmp_path / "training.json").read_text()) == report
    assert report["losses"] == [[1, 2.5], [2, 2.0]]
    assert report["learning_rates"] == [[1, 1e-3], [2, 5e-4]]
    assert report["pooling_share"] == [[1, 0.0], [2, 0.25]]
    assert report["evaluations"] == [[2, {"mean": 0.5}]]
    assert (report["steps"], report["rows"]) == (2, {"a": 8})
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_machine_time_and_versions_are_those_of_the_run(tmp_path):
    report = write_report(tmp_path, trainer(bf16=True), {})
    assert (report["processes"], report["device"], report["precision"]) == (2, "cpu", "bf16")
    assert report["wall_seconds"] == 12.3
    assert report["versions"]["st_llmpool"] == __version__
    assert report["versions"]["torch"] == version("torch")


def show(monkeypatch, *, is_terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120)
    seconds = [0.0]
    monkeypatch.setattr(console, "get_time", lambda: seconds[0])
    progress = RichProgress(console)
    args, state, control = TrainingArguments(output_dir="unused"), TrainerState(max_steps=4), TrainerControl()
    progress.on_train_begin(args, state, control)
    for step in (1, 2):
        seconds[0] += 60
        state.global_step = step
        progress.on_step_end(args, state, control)
    logs = {"loss": 1.5, "learning_rate": 1e-4, "pooling_share": 0.02}
    state.log_history.append(logs)
    progress.on_log(args, state, control, logs=logs)
    progress.on_log(args, state, control, logs={"eval_ndcg": 0.25, "eval_runtime": 3.0})
    progress.on_log(args, state, control, logs={"train_runtime": 9.0, "train_loss": 1.0})
    progress.on_train_end(args, state, control)
    return console.file.getvalue()


def test_without_a_terminal_each_log_entry_is_one_line_with_the_time_left(monkeypatch):
    assert show(monkeypatch, is_terminal=False).rstrip().splitlines() == [  # rich 14.0 ends with an empty line
        "step 2/4  loss 1.5000  lr 1.0e-04  pooling changes the embedding by 2.0 %  0:02:00 left",
        "step 2/4  ndcg 0.2500  0:02:00 left",
    ]


def test_a_terminal_shows_steps_numbers_and_the_time_left(monkeypatch):
    text = show(monkeypatch, is_terminal=True)
    assert all(
        part in text
        for part in (
            "2/4",
            "loss 1.5000",
            "lr 1.0e-04",
            "pooling changes the embedding by 2.0 %",
            "left",
            "ndcg 0.2500",
        )
    )


def features(summaries, readout):
    return {"layer_summaries": torch.tensor(summaries), "readout": torch.tensor(readout)}


def test_the_change_is_the_mean_over_the_texts_since_the_last_reading():
    pooling = ScalarMixPooling(embedding_dimension=2, num_layers=1)
    change = PoolingChange([pooling])
    # Layer normalisation of (1, 3) is (-1, 1).
    pooling(features([[[1.0, 3.0]], [[1.0, 3.0]]], [[-1.0, 1.0], [-2.0, 2.0]]))  # changes 0 and 1/2
    pooling(features([[[1.0, 3.0]]], [[1.0, 1.0]]))  # difference (-2, 0), change sqrt 2
    assert change.pop_mean() == pytest.approx((0 + 0.5 + 2**0.5) / 3, abs=1e-4)
    assert change.pop_mean() is None


def test_evaluation_does_not_count():
    pooling = ScalarMixPooling(embedding_dimension=2, num_layers=1).eval()
    change = PoolingChange([pooling])
    pooling(features([[[1.0, 3.0]]], [[1.0, 1.0]]))
    assert change.pop_mean() is None


def test_nothing_is_measured_after_remove_or_on_a_pooling_without_weights():
    pooling = ScalarMixPooling(embedding_dimension=2, num_layers=1)
    change = PoolingChange([Pooling(2), pooling])
    change.remove()
    pooling(features([[[1.0, 3.0]]], [[1.0, 1.0]]))
    assert change.pop_mean() is None
