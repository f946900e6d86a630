from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from justhtml import JustHTML

from tests.study.report.pages import HOSTILE, table, text_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_page_is_valid_html(report):
    page = (report / "index.html").read_text()
    document = JustHTML(page, strict=True, sanitize=False)  # raises on the first parse error
    ids = [node.attrs["id"] for node in document.query("[id]")]
    assert len(ids) == len(set(ids))
    assert [link.attrs["href"] for link in document.query("nav a")] == [f"#{name}" for name in ids]
    for node in document.query("table"):
        assert len({len(row.children) for row in node.query("tr")}) == 1
    assert all(picture.attrs["alt"] for picture in document.query("img"))
    assert len(document.query("h1")) == 1
    assert "Suite squad_slices: Cut by length." in page


def test_page_needs_no_other_file_and_holds_every_picture(report):
    page = (report / "index.html").read_text()
    links = set(re.findall(r'(?:src|href)="(?!#|data:)([^"]*)', page))
    assert links == {"../results.parquet", "../study.yaml", "tables", "comparison"}  # to look further
    assert "url(" not in page
    assert "@import" not in page
    embedded = {base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', page)}
    assert embedded == {file.read_bytes() for file in report.rglob("*.png")}


def test_text_of_users_stays_text(report):
    page = (report / "index.html").read_text()
    assert "<script" not in page
    assert "javascript:" not in "".join(re.findall("<[^>]*>", page))
    assert HOSTILE in text_of(page)


def test_every_table_is_there_as_csv_and_markdown(report):
    markdown = (report / "report.md").read_text()
    page = text_of((report / "index.html").read_text())
    for name in (
        "Mean-score",
        "Pre-registered-comparisons",
        "Convergence",
        "Runs",
    ):
        rows = table(report, name)
        assert len({len(row) for row in rows}) == 1
        for row in rows:
            assert " ".join(" ".join(row).split()) in page
        title = name.replace("Pre-", "Pre_").replace("-", " ").replace("_", "-")
        own = re.split(rf"\*\*Table \d+\. {title}\*\*\n\n", markdown)[1].partition("\n\n")[0]
        assert own.rstrip().count("\n") == len(rows)


def test_tables_and_figures_are_numbered_and_contents_come_first(report):
    markdown = (report / "report.md").read_text()
    for what in ("Table", "Figure"):
        numbers = [int(number) for number in re.findall(rf"^\*+{what} (\d+)\. ", markdown, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) > 5
    page = (report / "index.html").read_text()
    assert page.index("<nav") < page.index("<main")
    assert "position: sticky" in page


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")
def test_page_opens_in_a_browser_and_fits_a_phone(report, tmp_path):
    """A frame of 390 pixels tells the width of what it shows; a headless window cannot be that narrow."""
    probe = "parent.postMessage([document.documentElement.scrollWidth, document.images.length, [...document.images]"
    probe += ".filter(i => i.complete && i.naturalWidth > 0).length], '*')"
    page = (report / "index.html").read_text()
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>onload = () => {probe}</script></body>"))
    (tmp_path / "frame.html").write_text(
        "<!DOCTYPE html><body><script>onmessage = e => document.body.append('found ' + JSON.stringify(e.data))</script>"
        '<iframe src="page.html" style="width:390px;height:800px;border:0"></iframe>'
    )
    done = _browse(tmp_path, "--dump-dom", "--virtual-time-budget=5000", tmp_path / "frame.html")
    width, pictures, loaded = json.loads(re.search(r"found (\[.*?\])", done.stdout)[1])
    assert width <= 390
    assert pictures == loaded == page.count("<img ")
    assert "CONSOLE" not in done.stderr
    shot = tmp_path / "shot.png"
    _browse(tmp_path, "--window-size=1000,3000", f"--screenshot={shot}", report / "index.html")
    image = pytest.importorskip("matplotlib.image", reason="the extra 'plots' is not installed")
    grey = image.imread(shot)[..., :3].mean(axis=2)
    assert grey.shape == (3000, 1000)
    assert 0.01 < np.mean(grey < 0.5) < 0.5


def _browse(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    options += [f"--user-data-dir={folder / 'profile'}", *map(str, arguments)]
    return subprocess.run([str(BROWSER), *options], capture_output=True, text=True, timeout=120, check=True)
