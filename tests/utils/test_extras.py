"""Missing optional libraries: one line, before anything is computed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from st_llmpool.utils.extras import MissingExtraError, needs, require
from st_llmpool.utils.settings import merge

# Runs a command as if some libraries were not installed.
WITHOUT = """
import sys
hidden = set(sys.argv[1].split(","))

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else find_spec(name, *rest)
sys.argv = ["st-llmpool", *sys.argv[2:]]
from st_llmpool.cli import main
main()
"""


def run_without(libraries, *arguments):
    command = [sys.executable, "-c", WITHOUT, libraries, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_is_missing_is_named_with_its_extra():
    require("eval", "json", "re")
    with pytest.raises(
        MissingExtraError, match=r'^Plots need|This needs nothere, nor: pip install "st-llmpool\[plots\]"$'
    ):
        require("plots", "json", "nothere", "nor")


def test_a_failed_import_is_renamed_and_nothing_else():
    def import_it():
        with needs("eval", "Search"):
            import nothere  # noqa: F401

    with pytest.raises(MissingExtraError, match=r'Search needs nothere: pip install "st-llmpool\[eval\]"') as raised:
        import_it()
    assert isinstance(raised.value, ModuleNotFoundError)
    with pytest.raises(KeyError), needs("eval", "Search"):
        raise KeyError


STUDY = ["study", "quick", "--out"]


@pytest.mark.parametrize(
    ("libraries", "extra", "arguments"),
    [
        ("scipy", "eval", STUDY),
        ("mteb", "eval", STUDY),
        ("scikit_posthocs", "plots", STUDY),
    ],
)
def test_a_study_finds_what_is_missing_before_its_first_run(tmp_path, libraries, extra, arguments):
    done = run_without(libraries, *arguments, tmp_path / "out")
    assert done.returncode == 1, done.stderr
    message = " ".join(done.stderr.split())
    assert f'needs {libraries}: pip install "st-llmpool[{extra}]"' in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("libraries", "extra", "changes"),
    [
        ("accelerate", "train", {}),
        ("tensorboard", "train", {"training": {"report_to": "tensorboard"}}),
        ("mteb", "eval", {"evaluation": {"suite": "builtin", "eval_steps": 1}}),
    ],
)
def test_a_training_as_well(tmp_path, libraries, extra, changes):
    import yaml

    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": "c", "positive": "d"}\n')
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"base": "builtin", "max_seq_length": 16},
        "data": [{"source": str(tmp_path / "pairs.jsonl")}],
        "training": {"max_steps": 1, "batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(merge(recipe, changes)))
    done = run_without(libraries, "train", tmp_path / "recipe.yaml")
    assert done.returncode == 1, done.stderr
    message = " ".join(done.stderr.split())
    assert f'needs {libraries}: pip install "st-llmpool[{extra}]"' in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()
