"""The notebooks run from top to bottom, without a kernel: their code cells are executed in one process, in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


def run(notebook: Path) -> dict[str, object]:
    """Returns the variables that are left at the end."""
    names: dict[str, object] = {"__name__": "notebook"}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), notebook.name, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_first_model_finds_what_was_asked_for(folder):
    names = run(NOTEBOOKS[0])
    assert names["pairs"]["positive"][names["best"]] == "sorted(items)"
    assert (folder / "first-model" / "modules.json").is_file()


def test_a_shared_model_gives_its_vectors_in_both_forms(folder):
    names = run(NOTEBOOKS[1])
    assert not names["diagnosis"].failed
    for model in (names["loaded"], SentenceTransformer("native")):
        assert abs(model.encode(names["texts"]) - names["vectors"]).max() < 1e-5
    assert not any((folder / "native").glob("*.py"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_git_carries_no_outputs(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
