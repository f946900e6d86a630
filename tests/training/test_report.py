"""training.json says what the trainer's log holds, and what only the run knows."""

import json
from importlib.metadata import version
from types import SimpleNamespace

from st_llmpool.modules.errors import __version__
from st_llmpool.training.callbacks import ElapsedTimeCallback
from st_llmpool.training.report import write_report

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
