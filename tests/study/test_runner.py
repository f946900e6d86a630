"""Running a study: a run is done once, a stopped one goes on with the same numbers, workers share the runs out."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock
from rich.console import Console

from st_llmpool import build_embedder
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.stats import compare
from st_llmpool.stats.results import Results
from st_llmpool.study import worker
from st_llmpool.study.records import RunRecord, finished, reuse_runs, write_record
from st_llmpool.study.runner import StudyError, StudyRunner, environment_of_run
from st_llmpool.study.settings import Study
from st_llmpool.study.sweep import sweep_runs
from st_llmpool.study.worker import LOCKED, carry_out, lock_of


def runner_of(study, data, out, **options) -> StudyRunner:
    return StudyRunner(study, out, data_dir=data, console=Console(quiet=True), **options)


def record_of(run, out) -> None:
    """Writes the record of a run that nobody made."""
    names = ("id", "key", "base", "design", "option", "seed", "recipe", "evaluation")
    record = RunRecord(**{name: getattr(run, name) for name in names}, training={}, evaluation_seconds=1.0)
    score = {"task": "T", "task_type": "STS", "split": "test", "subset": "", "metric": "m", "score": 0.5}
    scores = pd.DataFrame([score])
    write_record(record, Results(scores), out)


def test_a_study_is_run_once_and_compared(tiny_study, study_data, tmp_path):
    out = tmp_path / "out"
    records = runner_of(tiny_study, study_data, out, jobs=2).run()
    assert [record.id for record in records] == ["tiny_mean-bidirectional_seed0", "tiny_5_seed0"]
    for record in records:
        assert record.training["steps"] == 4
        assert [step for step, _ in record.validation] == [0, 2, 4]
        assert list(record.data) == ["data/pairs.jsonl"]
        assert record.machine["threads"] == 1
        assert not list((out / "work" / record.id).rglob("optimizer.pt"))
        log = (out / "work" / record.id / "log.txt").read_text()
        assert not re.search(r"\bWARNING\b|Warning:|Padding is computed", log)
    again = runner_of(tiny_study, study_data, out)
    again.run_worker = None  # would fail if it were called
    assert again.run() == records
    rows = pd.read_parquet(again.write_results())
    assert set(rows["task_type"]) == {"Clustering", "STS"}
    assert compare(again.results).verdicts
    written = json.dumps([dataclasses.asdict(record) for record in records])
    assert str(tmp_path) not in written.replace(tiny_study.bases["tiny"], "")


def test_a_run_that_another_process_has_is_left_to_it(tiny_study, study_data, tmp_path):
    runner = runner_of(tiny_study, study_data, tmp_path / "out")
    runner.output_dir.mkdir()
    (runner.output_dir / "study.yaml").write_text(json.dumps(tiny_study.to_dict()))
    run = tiny_study.runs()[0]
    arguments = {
        "study": runner.output_dir / "study.yaml",
        "run": run.id,
        "out": runner.output_dir,
        "work": runner.work,
    }
    with FileLock(lock_of(run.id, runner.output_dir).lock_file):
        assert runner.run_worker(run, slot=0) == LOCKED
        assert worker.main([f"--{name}={value}" for name, value in arguments.items()]) == LOCKED
    assert not runner.work.exists()


def test_another_study_in_the_same_folder_leaves_the_runs_of_this_one_alone(
    tiny_study, study_data, tmp_path, monkeypatch
):
    """Each may have started, and written its study.yaml, since the other did."""
    commands = []

    class Started:
        def __init__(self, command, **options):
            commands.append(dict(part.removeprefix("--").split("=", 1) for part in command if "=" in part))

        def wait(self):
            return 0

    monkeypatch.setattr("st_llmpool.study.runner.subprocess.Popen", Started)
    run = tiny_study.runs()[0]
    runner_of(tiny_study, study_data, tmp_path / "out").run_worker(run, slot=0)
    other = dataclasses.replace(tiny_study, seeds=[7])
    with pytest.raises(StudyError):
        runner_of(other, study_data, tmp_path / "out").run()
    assert Study.load(commands[0]["study"]) == tiny_study
    assert {Path(command["study"]).parent.name for command in commands} == {command["run"] for command in commands}


def test_a_failed_run_is_named_with_the_end_of_its_log(tiny_study, study_data, tmp_path):
    runner = runner_of(tiny_study, study_data, tmp_path / "out")

    def fail(run, slot):
        runner.log(run.id).parent.mkdir(parents=True)
        runner.log(run.id).write_text("ValueError: what went wrong")
        return 1

    runner.run_worker = fail
    with pytest.raises(StudyError, match=r"(?s)2 of 2 runs failed: tiny_mean.*what went wrong"):
        runner.run()


def test_names_of_runs_are_complete_in_a_window_of_80_columns(tiny_study, study_data, tmp_path):
    option = "one that has such a very long name"
    designs = [*tiny_study.designs, dataclasses.replace(tiny_study.designs[1], option=option)]
    study = dataclasses.replace(tiny_study, designs=designs, sweep={"training.learning_rate": [1e-4, 3e-4]})
    shown = io.StringIO()
    console = Console(file=shown, width=80, height=60, force_terminal=True, color_system=None)
    runner = StudyRunner(study, tmp_path / "out", data_dir=study_data, console=console)

    def fail(run, slot):
        runner.log(run.id).parent.mkdir(parents=True)
        runner.log(run.id).touch()
        return 1

    runner.run_worker = fail
    with pytest.raises(StudyError, match="6 of 9 runs failed"):
        runner.run()
    cells = "".join(line.split("│")[1].strip() for line in shown.getvalue().splitlines() if line.count("│") > 3)
    for run in sweep_runs(study):
        assert run.id in cells


def test_equal_runs_of_another_study_are_taken_over_and_no_others(tiny_study, study_data, tmp_path):
    first, second = tiny_study.runs()
    record_of(first, tmp_path / "other")
    record_of(dataclasses.replace(second, seed=8), tmp_path / "other")  # another run under this one's name
    assert reuse_runs([first, second], tmp_path / "other", tmp_path / "out") == [first.id]
    assert [record.key for record in finished([first, second], tmp_path / "out")] == [first.key]


def test_runs_of_other_settings_are_not_taken_for_those_of_the_study(tiny_study, study_data, tmp_path):
    record_of(tiny_study.runs()[0], tmp_path / "out")
    assert finished(tiny_study.runs(), tmp_path / "out")
    tiny_study.recipe["training"]["max_steps"] = 5
    with pytest.raises(ConfigurationError, match=r"training\.max_steps changed"):
        runner_of(tiny_study, study_data, tmp_path / "out")


def test_a_run_has_a_gpu_and_threads_of_its_own_and_no_process_group(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    environment = environment_of_run(slot=1, jobs=2, threads=3)
    assert environment["CUDA_VISIBLE_DEVICES"] == "4"  # the fourth of all runs at a time, on three devices
    assert environment["OMP_NUM_THREADS"] == "3"
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} & set(environment)


def test_a_planted_model_in_a_studys_folder_is_not_run(tiny_study, study_data, tmp_path):
    run = tiny_study.runs()[1]
    training = tmp_path / "work" / run.id / "training"
    recipe = run.to_recipe(study_data, training)
    build_embedder(recipe.model.base, verify=False).save_pretrained(str(training / "model"))
    with (training / "model" / "errors.py").open("a") as code:
        code.write(f"\nimport pathlib\npathlib.Path({str(tmp_path / 'it_ran')!r}).touch()\n")
    recipe.to_yaml(training / "recipe.yaml")
    (training / "training.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"errors\.py .*trust_remote_code"):
        carry_out(tiny_study, run, output_dir=tmp_path / "out", work=tmp_path / "work", data_dir=study_data)
    assert not (tmp_path / "it_ran").exists()
