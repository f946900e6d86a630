"""Reports of made-up studies, and what tests read from them."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from html import unescape
from pathlib import Path

from st_llmpool.study.report import write_report
from st_llmpool.study.settings import DesignSettings
from tests.study.synthetic_study import synthetic_records, synthetic_results, synthetic_study

HOSTILE = '<script>alert("1")</script> & <b> *1* [a](javascript:b) | `c`'


def small(
    tmp_path: Path, *, finished: int | None = None, tasks: int = 8, corpora: bool = True, **changes
) -> tuple[str, Path]:
    """The page of a study of two designs and two seeds; `changes` are fields of single records, by id."""
    designs = [DesignSettings("mean-bidirectional"), DesignSettings("5", change=changes.pop("change", {}))]
    study = synthetic_study(designs=designs, seeds=[0, 1], contrasts=["5:mean-bidirectional"])
    records = synthetic_records(study, study.runs()[:finished])
    records = [replace(record, **{"cost": None, "layers": None} | changes.get(record.id, {})) for record in records]
    results = synthetic_results(records, tasks=tasks, items=False, types=["STS"], corpora=corpora)
    page = write_report(study, records, results, tmp_path / "report").read_text()
    return page, tmp_path / "report"


def text_of(page: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def table(folder: Path, name: str) -> list[list[str]]:
    with (folder / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.reader(file))


def named(folder: Path, name: str) -> list[dict[str, str]]:
    """The rows of a table by column."""
    heading, *rows = table(folder, name)
    return [dict(zip(heading, row, strict=True)) for row in rows]
