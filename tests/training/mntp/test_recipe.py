"""The recipe of an adaptation: its file, its defaults, and what does not apply to it."""

import pytest

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training import AdaptRecipe

MINIMAL = {"output_dir": "run", "base": "builtin", "texts": [{"source": "texts.txt"}]}


def test_a_recipe_survives_its_yaml_file(tmp_path):
    changes = ["training.max_steps=7", "masking.mlm_probability=0.3", "merge=[0.3, 0.7]", "evaluation.eval_steps=5"]
    first = AdaptRecipe.from_dict(MINIMAL, changes)
    first.to_yaml(tmp_path / "recipe.yaml")
    assert AdaptRecipe.from_yaml(tmp_path / "recipe.yaml") == first
    assert AdaptRecipe.from_yaml(tmp_path / "recipe.yaml", ["seed=4"]).seed == 4
    assert (first.training.max_steps, first.merge) == (7, [0.3, 0.7])


@pytest.mark.parametrize(("tune", "rate"), [("lora", 2e-4), ("full", 2e-5)])
def test_the_default_learning_rate_goes_by_what_trains(tune, rate):
    assert AdaptRecipe.from_dict(MINIMAL | {"tune": tune}).learning_rate == rate
    assert AdaptRecipe.from_dict(MINIMAL | {"tune": tune, "training": {"learning_rate": 0.5}}).learning_rate == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"optim": "lamb"}}, "training.optim=lamb is for contrastive training only"),
        ({"training": {"sparse_tuning": {"layers": 1}}}, "sparse_tuning is for contrastive training only"),
        ({"evaluation": {"limit": 0}}, "evaluation.limit=0 must be at least 1"),
        ({"evaluation": {"eval_steps": 0}}, "evaluation.eval_steps=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"long_texts": "wrap"}, "long_texts='wrap' is unknown"),
        ({"masking": {"mlm_probability": 1}}, "must be above 0, or nothing is predicted"),
    ],
)
def test_what_does_not_apply_or_is_out_of_range_is_refused_when_it_is_read(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        AdaptRecipe.from_dict(MINIMAL | changes)


def test_an_adaptation_refuses_old_names_too():
    values = {"output_dir": "run", "base": "builtin", "texts": [{"source": "texts.txt"}]}
    with pytest.raises(ConfigurationError, match=r"^masking\.share is now masking\.mlm_probability\.$"):
        AdaptRecipe.from_dict(values | {"masking": {"share": 0.3}})
    with pytest.raises(ConfigurationError, match=r"evaluation\.steps is now evaluation\.eval_steps"):
        AdaptRecipe.from_dict(values | {"evaluation": {"steps": 3}})
