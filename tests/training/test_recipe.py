import subprocess
import sys
from pathlib import Path

import pytest

from st_llmpool.data.training_data import DatasetSettings
from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.training.recipe import ModelSettings, Recipe, TrainingSettings

MINIMAL = {"output_dir": "run", "model": {"base": "builtin"}, "data": [{"source": "pairs.jsonl"}]}


def recipe(**changes):
    return Recipe.from_dict(MINIMAL | changes)


def test_a_recipe_survives_its_yaml_file(tmp_path):
    values = MINIMAL | {"preset": "paper", "evaluation": {"data": [{"source": "x.csv", "name": "held"}]}, "seed": 3}
    first = Recipe.from_dict(values, ["training.max_steps=7", "model.layers=[1, -1]", "data.0.instruction=Frage: "])
    first.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == first
    assert first.data[0].instruction == "Frage:"


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset():
    built = Recipe.from_dict(MINIMAL | {"preset": "paper", "training": {"max_steps": 50}}, ["training.batch_size=8"])
    assert (built.training.max_steps, built.training.batch_size, built.training.warmup_steps) == (50, 8, 100)


def test_the_paper_preset_is_what_the_paper_says():
    built = recipe(preset="paper")
    assert (built.loss.name, built.loss.scale, built.loss.num_negatives) == ("infonce", 20.0, 1)
    assert built.loss.gather_across_devices
    assert built.loss.mini_batch_size is not None
    assert (built.training.batch_size, built.training.max_steps, built.training.warmup_steps) == (2048, 1000, 100)
    assert (built.learning_rate, built.training.pooling_learning_rate, built.training.lr_scheduler_type) == (
        1e-5,
        1e-5,
        "linear",
    )
    assert (built.model.tune, built.model.lora, built.model.max_seq_length) == ("lora", "paper", 1024)


@pytest.mark.parametrize(("tune", "rate"), [("lora", 2e-4), ("full", 2e-5)])
def test_the_default_learning_rate_goes_by_what_trains(tune, rate):
    assert recipe(model={"base": "builtin", "tune": tune}).learning_rate == rate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "papper"}, "preset='papper' is unknown.*Did you mean 'paper'"),
        ({"training": {"learnig_rate": 1}}, "training.learnig_rate is not a key.*Did you mean 'learning_rate'"),
        ({"training": {"batch_size": 1}}, "batch_size=1 has no negatives"),
        ({"training": {"max_steps": 0}}, "training.max_steps=0 must be at least 1"),
        ({"data": []}, "data is empty"),
        ({"data": [{"source": "a/x.csv"}, {"source": "b/x.csv"}]}, "two sets that are called 'x'"),
        ({"data": [{"source": "x.csv", "weight": 1}, {"source": "y.csv"}]}, "'y' has no weight"),
        ({"model": {"base": "b", "tune": "full", "quantization": "nf4"}}, "has no gradients for model.tune=full"),
        ({"model": {"base": "b", "design": "5", "pooling": "mean"}}, "says attention and pooling"),
        ({"model": {}}, "model.base is missing"),
        ({"loss": {"matryoshka_dims": []}}, r"matryoshka_dims=\[\] must be numbers of dimensions"),
        ({"loss": {"matryoshka_dims": [8, 0]}}, r"matryoshka_dims=\[8, 0\] must be numbers of dimensions"),
        ({"model": {"base": "b", "truncate_dim": 8}}, "truncate_dim=8 is not among loss.matryoshka_dims=None"),
        ({"loss": {"focal_gamma": -1}}, "loss.focal_gamma=-1.0 must be at least 0"),
        ({"loss": {"focal_gamma": float("nan")}}, "numbers must be finite"),
        ({"loss": {"mixing": {"hardest": 1}}}, "loss.mixing.hardest=1 must be at least 2"),
        ({"loss": {"mixing": {"hardst": 4}}}, "loss.mixing.hardst is not a key.*Did you mean 'hardest'"),
        ({"model": {"base": "b", "freeze_layers": -1}}, "freeze_layers=-1 must be at least 0"),
        ({"model": {"base": "b", "freeze_layers": 1, "tune": "pooling"}}, "model.tune=pooling, which freezes all"),
        ({"training": {"sparse_tuning": {"layers": 0}}}, "sparse_tuning.layers=0 must be at least 1"),
        ({"training": {"sparse_tuning": {"interval": 5}}}, "training.sparse_tuning.layers is missing"),
        ({"training": {"sparse_tuning": {"layers": 1, "trials": 1}}}, "sparse_tuning.trials=1 must be at least 2"),
        ({"training": {"sparse_tuning": {"layers": 1, "suppression": 1}}}, "suppression=1.0 must be 0 or more"),
        (
            {"model": {"base": "b", "tune": "full"}, "training": {"sparse_tuning": {"layers": 1}}},
            "model.tune=full has none",
        ),
        ({"evaluation": {"load_best_model_at_end": True}}, "load_best_model_at_end needs something to measure"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate=-1.0 must be above 0 and at most 1"),
        ({"training": {"learning_rate": 1e38}}, r"training.learning_rate=1e\+38 must be above 0 and at most 1"),
        ({"training": {"learning_rate": "nan"}}, "training.learning_rate='nan' must be a finite number"),
        ({"training": {"pooling_learning_rate": -1}}, "pooling_learning_rate=-1.0 must be at least 0 and at most 1"),
        ({"training": {"weight_decay": -0.1}}, "weight_decay=-0.1 must be at least 0"),
        ({"training": {"dataloader_num_workers": -1}}, "workers=-1 must be at least 0"),
        ({"evaluation": {"batch_size": 0}}, "evaluation.batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 2**32}, "seed=4294967296 must be at least 0 and at most"),
        ({"preset": ["paper"]}, r"preset=\['paper'\] is unknown"),
        (
            {"stages": [{"kind": "simcse", "texts": [{"source": "x.txt"}], "training": {"max_steps": 0}}]},
            "training.max_steps=0 must be at least 1",
        ),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_when_it_is_read(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        recipe(**changes)


@pytest.mark.parametrize("changes", [{"columns": {"querry": "q"}}, {"limit": 0}, {"weight": -1}])
def test_a_data_set_that_cannot_work_is_refused_when_it_is_read(changes):
    with pytest.raises(DataError):
        DatasetSettings("pairs.jsonl", **changes)


def test_a_recipe_may_hold_paths():
    assert recipe(output_dir=Path("runs") / "x").output_dir == str(Path("runs") / "x")


def test_a_recipe_built_in_python_is_checked_too():
    with pytest.raises(ConfigurationError, match="data is empty"):
        Recipe("run", ModelSettings("builtin"), data=[])
    with pytest.raises(ConfigurationError, match="learning_rate=nan must be above 0"):
        TrainingSettings(learning_rate=float("nan"))


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.yaml"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigurationError, match="not YAML"):
        Recipe.from_yaml(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigurationError, match="must hold keys and values"):
        Recipe.from_yaml(tmp_path / "empty.yaml")


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("data/squad_pairs/train.parquet", "train"),
        ("secret_customer/train.jsonl", "train"),
        ("data/squad_pairs", "squad_pairs"),
        ("pairs.jsonl", "pairs"),
        ("org/set", "set"),
        ("train.csv", "train"),
    ],
)
def test_a_set_is_called_by_its_file_and_never_by_the_folders_above_it(source, label):
    assert DatasetSettings(source).label == label


def test_reading_a_recipe_imports_nothing_heavy():
    code = "import sys; from st_llmpool.training import Recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_folder_or_base_is_refused_and_does_not_become_the_current_directory(empty):
    with pytest.raises(ConfigurationError, match=r"output_dir='.?' is empty"):
        recipe(output_dir=empty)
    with pytest.raises(ConfigurationError, match=r"base='.?' is empty"):
        recipe(model={"base": empty})
