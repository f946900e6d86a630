"""The GPU script runs every part on a CPU, and one that fails, crashes or hangs does not stop the rest."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

TOP = Path(__file__).resolve().parents[2]
FAKE_PARTS = """
import os, time

def describe(run):
    return {"gpu": "none"}

def as_json(row):
    return {"cells": [str(row)] * 7}

def fails(run):
    run.cell("before", lambda: ["first row"])
    run.cell("fails", lambda: 1 / 0)
    run.cell("after", lambda: ["second row"])

def crashes(run):
    run.cell("crashes", lambda: os._exit(139))
    run.cell("after", lambda: ["third row"])

def hangs(run):
    run.cell("hangs", lambda: time.sleep(600))
    run.cell("after", lambda: ["fourth row"])

def cannot_start(run):
    raise RuntimeError("no such model")

def takes_too_long(run):
    for number in range(1000):
        run.cell(f"cell {number}", lambda: time.sleep(0.05) or [])

def last(run):
    run.cell("last", lambda: ["fifth row"])
"""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", TOP / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


def test_a_part_that_fails_crashes_or_hangs_does_not_stop_the_rest(tmp_path, monkeypatch):
    gpu, parts = script("gpu"), tmp_path / "parts.py"
    parts.write_text(FAKE_PARTS)
    arguments = gpu.parser().parse_args(["--out", str(tmp_path), "--quick", "--parts", str(parts), "--device", "cpu"])
    limits = dict.fromkeys(("fails", "crashes", "hangs", "cannot_start"), 30) | {"takes_too_long": 2, "last": 30}
    gpu.run_all(arguments, limits, cell_seconds=1.5)
    ended = {(line["part"], line["cell"]): line for line in cells(tmp_path) if line["state"] in ("done", "failed")}
    failed = {cell: line["error"] for cell, line in ended.items() if line["state"] == "failed"}
    last = failed.popitem()
    assert last[0][0] == "takes_too_long"
    assert last[1] == "out of time"
    assert failed == {
        ("fails", "fails"): "ZeroDivisionError: division by zero",
        ("crashes", "crashes"): "ended with code 139, see crashes.log",
        ("hangs", "hangs"): "hangs",
        ("cannot_start", "the process of the part"): "ended with code 1, see cannot_start.log",
    }
    assert "no such model" in (tmp_path / "cannot_start.log").read_text()
    page = (tmp_path / "results.md").read_text()
    assert [row for row in ("first", "second", "third", "fourth", "fifth") if f"| {row} row |" not in page] == []
    assert "- FAILED crashes: ended with code 139" in page


def test_the_time_of_the_whole_is_kept(tmp_path):
    gpu, parts = script("gpu"), tmp_path / "parts.py"
    parts.write_text(FAKE_PARTS)
    options = ["--out", str(tmp_path), "--quick", "--device", "cpu", "--parts", str(parts), "--minutes", "0.03"]
    gpu.run_all(gpu.parser().parse_args(options), {"hangs": 30, "last": 30})
    assert "## last\n\nnot reached" in (tmp_path / "results.md").read_text()


def test_a_quick_run_on_a_cpu_runs_every_part(tmp_path):
    command = [sys.executable, str(TOP / "scripts" / "gpu.py"), "--quick", "--minutes", "30", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    ended = [line for line in cells(tmp_path) if line["state"] != "started"]
    failed = [(line["cell"], line["error"]) for line in ended if line["state"] == "failed"]
    assert failed == []
    skipped = [line for line in ended if line["state"] == "skipped"]
    assert {line["part"] for line in skipped} == {"correctness"}
    assert all("needs a CUDA device" in line["error"] for line in skipped)
    rows = {line["part"]: len(line["rows"]) for line in ended if line["state"] == "done"}
    assert rows.keys() == script("gpu").PARTS.keys() - {"correctness"}
    assert all(rows.values())
    page = (tmp_path / "results.md").read_text()
    assert "FAILED" not in page
    assert "not reached" not in page


def write_wheel(folder: Path, name: str, files: dict[str, str], requires: list[str]) -> Path:
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    information = f"{name}-1.0.dist-info"
    lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {requirement}" for requirement in requires)]
    files = {**files, f"{information}/METADATA": "Metadata-Version: 2.1\n" + "\n".join(lines) + "\n"}
    record = "".join(f"{file},,\n" for file in [*files, f"{information}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, content in {**files, f"{information}/RECORD": record}.items():
            archive.writestr(file, content)
    return wheel


def test_requirements_that_neither_wheels_nor_machine_meet_are_named(tmp_path):
    requires = [
        "torch>=2.11",
        "transformers>=99",
        "nowhere",
        "other>=1",
        "elsewhere; extra == 'docs'",
        "old; python_version < '3.12'",
    ]
    wheels = [write_wheel(tmp_path, "one", {}, requires), write_wheel(tmp_path, "other", {}, [])]
    assert script("gpu_wheels").unmet(wheels) == ["transformers>=99 of one, not 5.17.0", "nowhere of one"]


def test_a_slim_wheel_leaves_out_libraries_of_other_machines_and_their_records(tmp_path):
    libraries = {f"bitsandbytes/lib{name}.so": name for name in ("_cpu", "_cuda118", "_cuda130", "_rocm70")}
    wheel = write_wheel(tmp_path, "bitsandbytes", {**libraries, "bitsandbytes/__init__.py": ""}, [])
    script("gpu_wheels").slim(wheel)
    with zipfile.ZipFile(wheel) as archive:
        names, record = set(archive.namelist()), archive.read("bitsandbytes-1.0.dist-info/RECORD").decode()
    assert {name for name in names if name.endswith(".so")} == {
        "bitsandbytes/lib_cpu.so",
        "bitsandbytes/lib_cuda130.so",
    }
    assert {line.split(",")[0] for line in record.splitlines()} == names
