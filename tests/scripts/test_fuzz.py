"""Mutated files end in a value or in an error of ours: a short form of scripts/fuzz.py."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mutated_files_are_read_or_refused_by_errors_of_ours(script, tmp_path):
    outcomes = script.fuzz(400, seed=1, folder=tmp_path)
    assert script.faults(outcomes) == {}
    assert all(outcome.counts for outcome in outcomes.values())
    assert sum(outcome.counts["read"] for outcome in outcomes.values()) > 50  # many stay sound


def read(script, target, folder: Path, content: str) -> Counter[str]:
    outcome = script.Outcome()
    script.read_one(target, folder / target.file, content.encode(), outcome)
    return outcome.counts


def test_what_is_not_mutated_is_read(script, tmp_path):
    """A sample that its reader refuses would never get deep, whatever is changed in it."""
    for name, target in script.targets().items():
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        target.prepare(folder)
        content = target.content if isinstance(target.content, str) else target.dump(target.content)
        assert read(script, target, folder, content) == {"read": 1}, name


#: Kind of file -> what replaces what in its sample, and raised something else than an error of ours.
FOUND = {
    "card": [("widget", "get")],
    "run record": [("[[1, {", "[[Infinity, {")],
    "pooling config": [('"num_layers": 3', '"num_layers": ' + "[" * 3000)],
    "suite": [("folder: f", "folder: " + "f" * 300), ("answers.jsonl", "a" * 300 + ".jsonl")],
    "study": [("suite: builtin", "suite: " + "b" * 300)],
    "module list": [("1_P", "1" * 300)],
    "recipe": [("query: q", "query: no"), ("query: q", "query: 5")],
}


@pytest.mark.parametrize(
    ("name", "before", "after"), [(name, *pair) for name, pairs in FOUND.items() for pair in pairs]
)
def test_what_the_long_form_found_is_refused(script, tmp_path, name, before, after):
    target = script.targets()[name]
    target.prepare(tmp_path)
    content = target.dump(target.content)
    assert before in content
    counts = read(script, target, tmp_path, content.replace(before, after, 1))
    assert counts in ({"read": 1}, {"refused": 1})


def test_an_interrupted_run_keeps_its_counts(script, tmp_path):
    lines = []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "SECONDS_OF_A_REPORT", 0)
        outcomes = script.fuzz(500, seed=0, folder=tmp_path, only="task types", report=report)
    count = outcomes["task types"].counts.total()
    assert lines[-1] == f"interrupted after {count} files"
    assert count < 500
