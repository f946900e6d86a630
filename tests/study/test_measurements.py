from __future__ import annotations

import json

import pytest

from st_llmpool import build_embedder
from st_llmpool.analysis.layers import sample_probes
from st_llmpool.evaluation import load_suite
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.study.measurements import measure_run, suite_probes


def test_cost_and_layers_of_a_model_are_written_once(tiny_study, study_data, tmp_path):
    recipe = tiny_study.runs()[1].to_recipe(study_data, tmp_path / "training")
    build_embedder(recipe.model.base, verify=False).save_pretrained(str(tmp_path / "model"))
    folder = tmp_path / "run"
    folder.mkdir()
    tasks = load_suite(tiny_study.suite)
    measure_run(tmp_path / "model", recipe, folder, tasks, layers=True)
    files = {name: (folder / f"{name}.json").read_text() for name in ("cost", "layers")}
    assert json.loads(files["cost"])["pooling"] > 0
    assert len(json.loads(files["layers"])["after"]["search"]) == 4
    measure_run(tmp_path / "no_model_is_needed_now", recipe, folder, tasks, layers=True)
    assert files == {name: (folder / f"{name}.json").read_text() for name in files}


def test_cost_of_a_design_that_does_not_train_is_that_of_its_untrained_model(tiny_study, study_data, tmp_path):
    recipe = tiny_study.runs()[0].to_recipe(study_data, tmp_path / "training")
    measure_run(None, recipe, tmp_path, [], layers=False)
    assert json.loads((tmp_path / "cost.json").read_text())["pooling"] == 0


def test_a_suite_without_search_gives_the_built_in_probes(tiny_study):
    assert suite_probes(load_suite(tiny_study.suite)) == sample_probes()


def test_a_planted_model_is_not_run(tiny_study, study_data, tmp_path):
    recipe = tiny_study.runs()[1].to_recipe(study_data, tmp_path / "training")
    build_embedder(recipe.model.base, verify=False).save_pretrained(str(tmp_path / "model"))
    with (tmp_path / "model" / "errors.py").open("a") as code:
        code.write(f"\nimport pathlib\npathlib.Path({str(tmp_path / 'it_ran')!r}).touch()\n")
    with pytest.raises(ConfigurationError, match=r"errors\.py .*trust_remote_code"):
        measure_run(tmp_path / "model", recipe, tmp_path / "out", [], layers=False)
    assert not (tmp_path / "it_ran").exists()
