"""The settings of a loss: ranges, and mixing that is off until it is asked for."""

import subprocess
import sys

import pytest

from st_llmpool.losses.settings import LossSettings, MixingSettings
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training.recipe import Recipe

MINIMAL = {"output_dir": "run", "model": {"base": "builtin"}, "data": [{"source": "pairs.jsonl"}]}


def recipe(**changes):
    return Recipe.from_dict(MINIMAL | changes)


def test_mixing_is_off_until_it_is_asked_for():
    assert recipe().loss.mixing is None
    assert recipe(loss={"mixing": {}}).loss.mixing == MixingSettings()
    built = Recipe.from_dict(MINIMAL, ["loss.mixing.pairwise=4", "loss.focal_gamma=0.5"])
    assert (built.loss.mixing.pairwise, built.loss.focal_gamma) == (4, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, r"loss\.scale=0\.0 must be above 0"),
        ({"scale": float("nan")}, r"loss\.scale=nan must be above 0"),
        ({"num_negatives": -1}, r"loss\.num_negatives=-1 must be at least 0"),
        ({"mini_batch_size": 0}, r"loss\.mini_batch_size=0 must be at least 1"),
        ({"focal_gamma": -0.5}, r"loss\.focal_gamma=-0\.5 must be at least 0"),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_range(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        LossSettings(**settings)


@pytest.mark.parametrize(("pairwise", "listwise", "count"), [(2, True, 3), (0, False, 0), (0, True, 1)])
def test_the_mixed_negatives_of_a_query_are_counted(pairwise, listwise, count):
    assert MixingSettings(pairwise=pairwise, listwise=listwise).count == count


def test_mixing_needs_two_to_mix():
    with pytest.raises(ConfigurationError, match=r"loss\.mixing\.hardest=1 must be at least 2"):
        MixingSettings(hardest=1)


def test_settings_are_read_without_heavy_imports():
    code = "import sys, st_llmpool.losses.settings; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
