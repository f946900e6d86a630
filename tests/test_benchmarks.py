"""Every benchmark runs: its figures are for `make bench`, on a machine that does nothing else."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
RATIOS = (
    "folded_head",
    "encoding_overhead",
    "shared_start",
    "padding",
    "utilisation",
    "training",
    "in_batch_loss",
    "cached_training",
)


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script as it imports its neighbours: from its own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in (*RATIOS, "harness", "growth", "run_all"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", RATIOS)
def test_a_quick_run_gives_rows_with_intervals(benchmark, name, tmp_path):
    rows = benchmark(name).main(["--quick", "--json", str(tmp_path / "rows.json")])
    assert rows
    for row in rows:
        assert row.ratio == pytest.approx(row.plain / row.ours if row.at_least else row.ours / row.plain)
        assert 0 < row.low <= row.high
    assert len({row.what for row in rows}) == len(rows)
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["what"], row["ratio"]) for row in written] == [(row.what, row.ratio) for row in rows]


def test_growth_draws_a_picture_for_each_axis(benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    benchmark("growth").main(["--quick", "--out", str(tmp_path)])
    assert {file.name for file in tmp_path.iterdir()} == {
        f"growth_{axis}.png" for axis in ("batch", "length", "layers", "latents")
    }


def test_one_table_holds_every_ratio_and_the_machine(benchmark, tmp_path, monkeypatch):
    run_all, harness = benchmark("run_all"), benchmark("harness")
    row = harness.Row("encode", 1.02, 1.0, 1.02, 1.0, 1.04, limit=1.05)
    monkeypatch.setattr(run_all, "run", lambda script, *_: [row])
    run_all.main(["--out", str(tmp_path)])
    page = (tmp_path / "cpu.md").read_text()
    assert page.count("| encode | 1.02 | 1 | 1.02 (1 to 1.04) | <= 1.05 | met |") == len(RATIOS)
    document = json.loads((tmp_path / "cpu.json").read_text())
    assert document["machine"]["torch"] in page
    assert len(document["rows"]) == len(RATIOS)


def test_a_ratio_counts_as_met_when_its_interval_reaches_the_figure(benchmark):
    row = benchmark("harness").Row
    assert row("x", 1, 1, 1.07, 1.04, 1.1, limit=1.05).verdict == "met"
    assert row("x", 1, 1, 1.07, 1.06, 1.1, limit=1.05).verdict == "MISSED"
    assert row("x", 1, 1, 1.9, 1.8, 2.1, limit=2, at_least=True).verdict == "met"
    assert row("x", 1, 1, 1.9, 1.8, 1.95, limit=2, at_least=True).verdict == "MISSED"
    assert row("x", 1, 1, 1.9, 1.8, 1.95).verdict == ""


def test_the_interval_covers_the_ratio_of_the_medians(benchmark):
    harness = benchmark("harness")
    noise = [0.9, 1.1, 1.0, 1.05, 0.95, 1.02, 0.98, 1.0, 1.04, 0.96]
    ours, plain = [2 * value for value in noise], noise[::-1]
    found = harness.compare("x", ours, plain)
    assert found.ratio == pytest.approx(statistics.median(ours) / statistics.median(plain))
    assert 1.8 < found.low < 2 < found.high < 2.2
    assert harness.compare("x", ours, plain, at_least=True).ratio == pytest.approx(0.5)


def test_runs_alternate_after_one_of_each(benchmark):
    harness = benchmark("harness")
    order: list[str] = []
    args = harness.arguments("", ["--repetitions", "4"])
    harness.alternate(lambda: order.append("ours"), lambda: order.append("plain"), args)
    assert order[2:] == ["plain", "ours", "ours", "plain"] * 2


def test_the_peak_is_the_most_memory_within_the_block(benchmark):
    harness = benchmark("harness")
    with harness.peak_memory("cpu") as small:
        pass
    with harness.peak_memory("cpu") as large:
        held = bytearray(200 * 2**20)
        held[::4096] = bytes(len(held[::4096]))
    assert large[0] - small[0] > 150
