"""Missing optional libraries: one line, before anything is computed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys

import pytest

from st_llmpool.utils.extras import MissingExtraError, needs, require
from st_llmpool.utils.settings import merge


class Hide:
    """An importer that finds none of some libraries."""

    def __init__(self, libraries: set[str]) -> None:
        self.libraries = libraries

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.libraries:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def run_without(capsys):
    """`run_without("mteb", "study", ...)` runs a command of a fresh package as if `mteb` were not installed.

    In a fork: a second copy of the package would take the place of the first in transformers' registries.
    """
    for library in ("accelerate", "mteb", "peft", "scikit_posthocs", "sentence_transformers"):
        importlib.import_module(library)  # as it is, so that each fork is spared the seconds

    def main_without(library, *arguments):
        for name in list(sys.modules):
            if name.partition(".")[0] in (library, "st_llmpool"):
                del sys.modules[name]
        find_spec = importlib.util.find_spec
        sys.meta_path.insert(0, Hide({library}))
        importlib.util.find_spec = lambda name, *rest: None if name == library else find_spec(name, *rest)
        sys.argv = ["st-llmpool", *map(str, arguments)]
        from st_llmpool.cli import main

        main()

    def run(library, *arguments):
        receiver, sender = os.pipe()
        if (child := os.fork()) == 0:
            code: object = "no exit"
            try:
                main_without(library, *arguments)
            except SystemExit as ended:
                code = ended.code
            except BaseException as error:
                code = repr(error)
            os.write(sender, json.dumps([code, " ".join(capsys.readouterr().err.split())]).encode())
            os._exit(0)
        os.close(sender)
        with open(receiver, "rb") as answer:
            code, printed = json.loads(answer.read())
        os.waitpid(child, 0)
        return code, printed

    return run


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
def test_a_study_finds_what_is_missing_before_its_first_run(run_without, tmp_path, libraries, extra, arguments):
    code, message = run_without(libraries, *arguments, tmp_path / "out")
    assert code == 1
    assert f'needs {libraries}: pip install "st-llmpool[{extra}]"' in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("libraries", "extra", "changes"),
    [
        ("accelerate", "train", {}),
        ("tensorboard", "train", {"training": {"report_to": "tensorboard"}}),
        ("mteb", "eval", {"evaluation": {"suite": "builtin", "eval_steps": 1}}),
    ],
)
def test_a_training_as_well(run_without, tmp_path, libraries, extra, changes):
    import yaml

    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": "c", "positive": "d"}\n')
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"base": "builtin", "max_seq_length": 16},
        "data": [{"source": str(tmp_path / "pairs.jsonl")}],
        "training": {"max_steps": 1, "batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(merge(recipe, changes)))
    code, message = run_without(libraries, "train", tmp_path / "recipe.yaml")
    assert code == 1
    assert f'needs {libraries}: pip install "st-llmpool[{extra}]"' in message
    assert not (tmp_path / "run").exists()
