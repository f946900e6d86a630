"""The sweep: which values are tried, what is chosen, and that nothing is trained twice."""

from __future__ import annotations

import dataclasses
import json

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.stats.results import COLUMNS, Results, complete
from st_llmpool.study import worker
from st_llmpool.study.records import RunRecord, RunStore, write_record
from st_llmpool.study.report import write_report
from st_llmpool.study.runner import StudyRunner
from st_llmpool.study.settings import DesignSettings, Study
from st_llmpool.study.sweep import ready_runs, sweep_runs, tunings

RATES = {"training.learning_rate": [1e-3, 1e-4], "training.pooling_learning_rate": [1e-3, 3e-3]}


def study_of(*designs, tune="lora", **changes) -> Study:
    recipe = {
        "model": {"tune": tune},
        "data": [{"source": "pairs.jsonl"}],
        "training": {"max_steps": 8},
        "evaluation": {"data": [{"source": "held_out.jsonl"}], "eval_steps": 4},
    }
    designs = [design if isinstance(design, DesignSettings) else DesignSettings(design) for design in designs]
    return Study(**({"designs": designs, "recipe": recipe, "sweep": RATES, "seeds": [3, 4]} | changes))


def record_of(run, curve, out, **training) -> None:
    """Write the record of a run with these validation values at steps 0, 4, 8."""
    evaluations = [[4 * place, {"held_out_cosine_ndcg@10": value}] for place, value in enumerate(curve)]
    names = ("id", "key", "base", "design", "option", "seed", "recipe", "evaluation", "kind")
    facts = {name: getattr(run, name) for name in names}
    record = RunRecord(**facts, training={"evaluations": evaluations, **training}, evaluation_seconds=0.0)
    write_record(record, Results(complete(pd.DataFrame(columns=COLUMNS))), out)


def in_this_process(runner, file):
    """Return `run_worker` without a process for each run, which would import for seconds."""
    file.write_text(yaml.safe_dump(runner.study.to_dict()))
    folders = {"study": file, "out": runner.output_dir, "work": runner.work, "data": runner.data_dir}
    given = [f"--{name}={value}" for name, value in folders.items()]
    return lambda run, slot: worker.main([*given, f"--run={run.id}"])


def test_values_that_cannot_act_on_a_design_are_not_tried():
    fixed = DesignSettings("5", "fixed", {"training": {"learning_rate": 0.1}})
    tried = [run.id for run in sweep_runs(study_of("mean-bidirectional", "5", fixed))]
    mean = [f"builtin_mean-bidirectional_seed3_lr{rate}" for rate in ("0.0001", "0.001")]
    five = [f"builtin_5_seed3_lr{rate}_plr{other}" for rate in ("0.0001", "0.001") for other in ("0.001", "0.003")]
    assert tried == [*mean, *five, "builtin_5_fixed_seed3_plr0.001", "builtin_5_fixed_seed3_plr0.003"]
    frozen = [run.id for run in sweep_runs(study_of("mean-bidirectional", "5", tune="pooling"))]
    assert frozen == ["builtin_5_seed3_plr0.001", "builtin_5_seed3_plr0.003"]


def test_all_seeds_use_the_values_with_the_best_last_validation(tmp_path):
    study = study_of("mean-bidirectional", "5")
    curves = [[0.1, 0.9, 0.3], [0.1, 0.2, 0.5], [0.1, 0.2, 0.5], [0.1, 0.2, 0.4]]
    of_five = [run for run in sweep_runs(study) if run.design == "5"]
    for run, curve in zip(of_five, curves, strict=True):
        assert not ready_runs(study, tmp_path)
        record_of(run, curve, tmp_path)
    first, second = ready_runs(study, tmp_path)
    assert [run.id for run in (first, second)] == ["builtin_5_seed3", "builtin_5_seed4"]
    assert first.recipe["training"] == {"max_steps": 8, "learning_rate": 1e-4, "pooling_learning_rate": 3e-3}
    assert second.recipe == first.recipe
    assert first.recipe == of_five[1].recipe
    assert (first.trained_as, second.trained_as) == (of_five[1].id, "")
    assert study.recipe["training"] == {"max_steps": 8}


def test_a_diverged_run_is_never_chosen_and_a_design_without_another_is_left_out(tmp_path):
    study = study_of("mean-bidirectional", "5", sweep={"training.learning_rate": [1e-4, 1e-3]})
    curves = [[0.9, 0.2, 0.8], [0.1, 0.2, 0.3]], [[0.9, 0.2, 0.8], []]
    for run, curve in zip(sweep_runs(study), [*curves[0], *curves[1]], strict=True):
        record_of(run, curve, tmp_path, **({} if curve else {"not_finite": True}))
    mean, five = tunings(study, tmp_path)
    assert mean.chosen == "builtin_mean-bidirectional_seed3_lr0.001"
    assert five.is_finished
    assert five.chosen is None
    assert {run.design for run in ready_runs(study, tmp_path)} == {"mean-bidirectional"}
    assert [run["diverged"] for run in five.to_dict()["runs"].values()] == [True, True]
    none = Results(complete(pd.DataFrame(columns=COLUMNS)))
    text = (write_report(study, [], none, tmp_path / "report").parent / "report.md").read_text()
    assert "Left out, since every run of the sweep diverged: builtin 5." in text
    assert "Not finished: 2 of 4 runs missing" in text
    results = [line.split("|")[-2].strip() for line in text.splitlines() if "learning" in line and "| builtin" in line]
    assert results == ["diverged", "chosen", "diverged", "diverged"]


@pytest.mark.parametrize("evaluation", [{}, {"data": [{"source": "held_out.jsonl"}], "eval_steps": 9}])
def test_a_sweep_without_a_last_validation_is_refused(evaluation):
    study = study_of("5", "mean-bidirectional")
    study.recipe["evaluation"] = evaluation
    with pytest.raises(ConfigurationError, match=r"last validation, and there is none: set recipe\.evaluation\.data"):
        sweep_runs(study)


@pytest.mark.parametrize("values", [[], [1e-3, 1e-3]])
def test_values_of_a_sweep_are_there_each_once(values):
    with pytest.raises(ConfigurationError, match=r"sweep\.training\.learning_rate must have values, each once"):
        study_of("5", "mean-bidirectional", sweep={"training.learning_rate": values})


def test_one_value_is_used_without_a_sweep(tmp_path):
    study = study_of("5", "mean-bidirectional", sweep={"training.learning_rate": [0.5]})
    assert not sweep_runs(study)
    assert {run.recipe["training"]["learning_rate"] for run in ready_runs(study, tmp_path)} == {0.5}


def test_a_study_is_swept_with_untrained_rows_and_the_first_seed_is_not_trained_twice(tiny_study, study_data, tmp_path):
    changes = {"seeds": [0, 1], "untrained": True, "sweep": {"training.learning_rate": [1e-4, 1e-3]}}
    study = dataclasses.replace(tiny_study, **changes)
    out = tmp_path / "out"
    console = Console(file=(tmp_path / "printed").open("w"), width=200)
    runner = StudyRunner(study, out, data_dir=study_data, console=console)
    runner.run_worker = in_this_process(runner, tmp_path / "study.yaml")
    records = runner.run()
    console.file.close()
    assert [record.id for record in records] == [run.id for run in study.runs()]
    assert "mean-bidirectional: the sweep chose training.learning_rate 0.00" in (tmp_path / "printed").read_text()
    for tuning in tunings(study, out):
        (first,) = [record for record in records if record.design == tuning.label and record.seed == 0]
        assert RunStore(out).record(tuning.chosen).training == first.training
        assert not (out / "work" / first.id / "training").exists()
        folders = {path.parent.parent.name for path in (out / "work").glob("*/training/model")}
        assert folders & set(tuning.values) == {tuning.chosen}
    scores = runner.results.scores
    main = scores[scores["metric"] == "main_score"]
    assert main.groupby(["design", "seed", "step"]).size().to_dict() == {
        (design, seed, step): 2
        for design in ("5", "mean-bidirectional")
        for seed, step in (("0", ""), ("0", "0"), ("1", ""))
    }
    assert not main["score"].isna().any()
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "results.parquet").write_bytes(runner.write_results().read_bytes())
    found = json.loads(pq.read_schema(kept / "results.parquet").metadata[b"st_llmpool.sweep"])
    assert [sum(run["chosen"] for run in design["runs"].values()) for design in found] == [1, 1]
    clone = StudyRunner(study, kept, report_only=True, console=Console(quiet=True))
    clone.run_worker = None  # would fail if it were called
    assert clone.run() == records
    pd.testing.assert_frame_equal(clone.results.table, runner.results.table)
