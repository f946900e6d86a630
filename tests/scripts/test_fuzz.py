"""Mutated files end in a value or in an error of ours: a short form of scripts/fuzz.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz.py"


def test_mutated_files_are_read_or_refused_by_errors_of_ours(tmp_path):
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    script = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    outcomes = script.fuzz(400, seed=1, folder=tmp_path)
    assert script.faults(outcomes) == {}
    assert all(outcome.counts for outcome in outcomes.values())
    assert sum(outcome.counts["read"] for outcome in outcomes.values()) > 50  # many stay sound
