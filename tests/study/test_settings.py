"""The study file: what it may say, and the runs that it stands for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.study.settings import DesignSettings, Study, presets
from st_llmpool.training.checks import check_names
from st_llmpool.utils.settings import differences

VALUES = {
    "designs": [
        {"design": "mean-bidirectional"},
        {"design": "5"},
        {"design": "5", "option": "last two", "change": {"model": {"layers": [-2, -1]}}},
        {"design": "mine", "change": {"model": {"attention": "causal", "pooling": "mean"}}},
    ],
    "seeds": [3, 4],
    "bases": {"small": "builtin", "other": "org/model"},
    "suite": "squad",
    "recipe": {"model": {"tune": "full"}, "data": [{"source": "{data}/pairs.jsonl"}], "training": {"max_steps": 7}},
}


@pytest.fixture
def study(tmp_path) -> Study:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(VALUES, sort_keys=False))
    return Study.load(tmp_path / "mine.yaml")


def test_runs_are_every_base_design_and_seed_once(study):
    runs = study.runs()
    assert len({run.id for run in runs}) == len(runs) == 2 * 4 * 2
    assert {(run.base, run.label, run.seed) for run in runs} == {
        (base, label, seed) for base in ("small", "other") for label in study.labels for seed in (3, 4)
    }
    assert [run.seed for run in runs] == [3] * 8 + [4] * 8  # whole comparisons first


def test_runs_differ_in_the_design_alone(study):
    plain, changed = [run for run in study.runs() if (run.base, run.seed, run.design) == ("small", 3, "5")]
    assert differences(plain.recipe, changed.recipe) == ["model.layers"]
    mean = study.runs()[0]
    assert differences(mean.recipe, plain.recipe) == ["model.design"]
    mine = study.runs()[3]
    assert mine.to_recipe(Path("d"), Path("o")).model.attention == "causal"


def test_data_folder_and_seed_reach_the_recipe_but_the_folder_not_the_key(study):
    run = study.runs()[-1]
    recipe = run.to_recipe(Path('/some "where"'), Path("out"))
    assert (recipe.data[0].source, recipe.seed, recipe.output_dir) == ('/some "where"/pairs.jsonl', 4, "out")
    assert "some" not in str(run.recipe)


def test_key_follows_every_setting_that_scores_depend_on(study):
    keys = {run.key for run in study.runs() if run.seed == 3}
    assert len(keys) == 8
    study.limit = 5
    assert not keys & {run.key for run in study.runs()}


def test_seeds_of_one_design_have_keys_of_their_own(study):
    same = [run for run in study.runs() if (run.base, run.label) == ("small", "5")]
    assert same[0].recipe == same[1].recipe
    assert same[0].key != same[1].key


@pytest.mark.parametrize("name", presets())
def test_every_run_of_a_preset_is_a_recipe(name):
    study = Study.load(name)
    assert study.contrasts or name in ("options", "long_adaptation")  # exploratory from end to end
    for run in (run for run in study.runs() if run.trains):
        check_names(run.to_recipe(Path("data"), Path("out")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"designs": [{"design": "5"}, {"design": "6"}]}, "design '6' is unknown"),
        ({"designs": [{"design": "5"}, {"design": "5"}]}, "designs must have entries, each once"),
        ({"designs": [{"design": "5"}]}, "compares 2 to"),
        ({"seeds": []}, "seeds must have entries"),
        ({"bases": {}}, "bases is empty"),
        ({"contrasts": ["5:4"]}, "contrast '5:4' must be two of"),
        ({"contrasts": ["5"]}, "contrast '5' must be two of"),
        ({"recipe": {"seed": 1}}, "recipe says 'seed'"),
        ({"recipe": {"model": {"base": "x"}}}, "recipe says 'base'"),
        ({"desings": []}, "desings is not a key here. Did you mean 'designs'"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, change, message):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(VALUES | change, sort_keys=False))
    with pytest.raises(ConfigurationError, match=message):
        Study.load(tmp_path / "s.yaml")


def test_unknown_study_names_the_nearest_preset():
    with pytest.raises(DataError, match="Did you mean 'quick'"):
        Study.load("quik")


def test_missing_data_folder_is_named(study):
    with pytest.raises(ConfigurationError, match="--data DIR"):
        study.runs()[0].to_recipe(None, Path("o"))


def test_a_wrong_name_is_refused_without_heavy_imports():
    code = "import sys; from st_llmpool.study.settings import Study\ntry: Study.load('no_such_study')\n"
    code += "except Exception as error: print(type(error).__name__)\n"
    code += "print([name for name in ('torch', 'transformers', 'mteb', 'scipy', 'pandas') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n") == ["DataError", "[]", ""]


def test_a_base_may_lie_in_a_folder_that_changes_no_key(study):
    name = next(iter(study.bases))
    (run, *_), (moved, *_) = study.runs(), replace(study, base_folders={name: "/here"}).runs()
    assert (moved.key, moved.recipe) == (run.key, run.recipe)
    assert moved.to_recipe(Path("data"), Path("out")).model.base == "/here"
    with pytest.raises(ConfigurationError, match="base='third' is unknown"):
        replace(study, base_folders={"third": "/here"})


def test_default_contrasts_cross_attention_and_readout_where_the_designs_are_there():
    plain = ["1", "mean-causal", "eos-bidirectional", "mean-bidirectional"]
    crossed = Study(designs=[DesignSettings(name) for name in plain], recipe={})
    assert crossed.contrasts == [
        "mean-bidirectional+eos-bidirectional:mean-causal+1",
        "mean-bidirectional+mean-causal:eos-bidirectional+1",
        "mean-bidirectional+1:eos-bidirectional+mean-causal",
    ]
    assert Study(designs=[DesignSettings("1"), DesignSettings("2")], recipe={}).contrasts == []
