from __future__ import annotations

import json
import re

import pytest
from justhtml import JustHTML

import st_llmpool.study.report as report_module
from tests.study.report.pages import small


def test_summary_has_table_verdicts_and_at_most_four_pictures(report):
    folder = report / "summary"
    text = (folder / "summary.md").read_text()
    sections = text[text.index("## Results") : text.index("\nFrom ")].split("## ")[1:]
    assert [section.partition("\n")[0] for section in sections] == ["Results", "Verdicts"]
    assert sections[1].strip() in (report / "report.md").read_text()
    assert "| bidirectional · mean · multi\\_layer - " in text or "| bidirectional · mean · multi_layer - " in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(pictures) == sorted(file.name for file in folder.glob("*.png"))
    assert 0 < len(pictures) <= 4
    assert set(json.loads((report / "comparison" / "comparison.json").read_text())) >= {"types", "notes"}


@pytest.mark.parametrize("finished", [0, 1])
def test_report_without_two_designs_has_no_verdict(tmp_path, finished):
    page, folder = small(tmp_path, finished=finished)
    assert f"No verdict yet: {finished} of 2 designs have results" in page
    assert "No verdict yet" in (folder / "summary" / "summary.md").read_text()
    JustHTML(page, strict=True, sanitize=False)


def test_failure_leaves_the_earlier_report_whole(tmp_path, monkeypatch):
    small(tmp_path, finished=0)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(report_module, "write_summary", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small(tmp_path, finished=1)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert [folder.name for folder in tmp_path.iterdir()] == ["report"]
