from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra 'plots' is not installed")
pytest.importorskip("scikit_posthocs", reason="the extra 'plots' is not installed")

from justhtml import JustHTML
from matplotlib import image

from st_llmpool.study.report import write, write_report
from st_llmpool.study.settings import DesignSettings
from tests.study.synthetic_study import synthetic_records, synthetic_results, synthetic_study

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '<script>alert("1")</script> & <b>'


@pytest.fixture(scope="module", autouse=True)
def quick():
    """What takes most of the time and is looked at elsewhere: intervals, statsmodels' garbage, pixels, mteb."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("st_llmpool.stats.statistics._bootstrap_interval", lambda values: (-0.01, 0.01))
        patch.setattr("gc.collect", lambda: 0)
        for module in ("stats.plots", "study.report.document"):
            patch.setattr(f"st_llmpool.{module}._DPI", 40)
        patch.setattr("st_llmpool.study.report.set_up._suite_description", lambda suite: "Cut by length.")
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The folder of a finished study's report, whose description and an option try to break the page."""
    study = synthetic_study(description=HOSTILE)
    study.designs[-1] = replace(study.designs[-1], option="last 4 layers")
    records = synthetic_records(study)
    folder = tmp_path_factory.mktemp("study") / "report"
    assert write_report(study, records, synthetic_results(records), folder) == folder / "index.html"
    return folder


def small(tmp_path: Path, *, finished: int | None = None, tasks: int = 8, **changes) -> tuple[str, Path]:
    """The page of a study of two designs and two seeds; `changes` are fields of single records, by id."""
    designs = [DesignSettings("mean-bidirectional"), DesignSettings("5", change=changes.pop("change", {}))]
    study = synthetic_study(designs=designs, seeds=[0, 1], contrasts=["5:mean-bidirectional"])
    records = synthetic_records(study, study.runs()[:finished])
    records = [replace(record, **{"cost": None, "layers": None} | changes.get(record.id, {})) for record in records]
    results = synthetic_results(records, tasks=tasks, items=False, types=["STS"])
    page = write_report(study, records, results, tmp_path / "report").read_text()
    return page, tmp_path / "report"


def text_of(page: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def table(folder: Path, name: str) -> list[list[str]]:
    with (folder / "tables" / f"{name}.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_page_is_valid_html(report):
    page = (report / "index.html").read_text()
    document = JustHTML(page, strict=True, sanitize=False)  # raises on the first parse error
    ids = [node.attrs["id"] for node in document.query("[id]")]
    assert len(ids) == len(set(ids))
    assert {link.attrs["href"] for link in document.query("nav a")} == {f"#{name}" for name in ids}
    for node in document.query("table"):
        assert len({len(row.children) for row in node.query("tr")}) == 1
    assert all(picture.attrs["alt"] for picture in document.query("img"))
    assert len(document.query("h1")) == 1
    assert "Suite squad_slices: Cut by length." in page


def test_page_needs_no_other_file_and_holds_every_picture(report):
    page = (report / "index.html").read_text()
    assert set(re.findall(r'(?:src|href)="(?!#|data:)([^"]*)', page)) == set()
    assert "url(" not in page
    assert "@import" not in page
    embedded = {base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', page)}
    assert embedded == {file.read_bytes() for file in report.rglob("*.png")}


def test_text_of_users_stays_text(report):
    page = (report / "index.html").read_text()
    assert "<script" not in page
    assert HOSTILE in text_of(page.replace("<p>&lt;script", "<p> &lt;script"))


def test_every_table_is_there_as_csv_and_markdown(report):
    files = sorted(file.stem for file in (report / "tables").glob("*.csv"))
    assert files == sorted(file.stem for file in (report / "tables").glob("*.md"))
    page = text_of((report / "index.html").read_text())
    for name in ("Mean-score-over-tasks", "How-each-claim-fares", "What-each-table-could-find", "Convergence", "Runs"):
        rows = table(report, name)
        assert len({len(row) for row in rows}) == 1
        for row in rows:
            assert " ".join(" ".join(row).split()) in page
        assert (report / "tables" / f"{name}.md").read_text().count("\n| ") == len(rows) + 1


def test_scores_are_means_of_the_runs_and_marked_where_a_difference_was_planted(report):
    records = synthetic_records(synthetic_study())
    scores = synthetic_results(records).scores
    found = table(report, "Mean-score-over-tasks")
    for kind, heading in enumerate(found[0][1:], start=1):
        own = scores[scores["task_type"] == heading.split()[0]]
        for row in found[1:]:
            design, _, option = row[0].partition(": ")[2].partition(" (")
            mean = own[(own["design"] == design) & (own["option"] == option.rstrip(")"))]["score"].mean()
            assert row[kind].split(" ")[0] == f"{mean:.4f}"
    cells = {
        row[0][0]: dict(zip(("STS", "Retrieval", "Classification", "Clustering"), row[1:], strict=True))
        for row in found[1:]
    }
    assert cells["f"]["STS"].endswith("> a b d e (c)")  # 5 above mean, 1, 3, 4 as named, and above 2
    assert not any(">" in row["Classification"] for row in cells.values())
    assert " > d f (" in cells["b"]["Clustering"]


def test_verdicts_say_what_was_planted_and_what_cannot_be_seen(report):
    page = text_of((report / "index.html").read_text())
    assert re.search(r"STS : 5 is better than mean-bidirectional \(by 0\.0\d+\), 4 ", page)
    assert "Classification : no difference that this study can see in any of the named pairs (at 80 % power" in page
    assert "Classification : none of 15 pairs stands out." in page
    power = page.index("Smallest p Holm")
    assert power < page.index("5 is better than")  # what could be found comes before what was
    assert f"{6 * 2.0**-11:.3g}" in page[power:]


def test_claims_of_the_paper_are_answered(report):
    rows = table(report, "How-each-claim-fares")[1:]
    answers = {(designs, task): here for _, designs, task, _, _, here in rows}
    assert answers["5 - 1", "STS"] == "Holds."
    assert answers["5 - 1", "Clustering"] == "Holds: it is worse."
    assert answers["5 - 1", "Classification"].startswith("Not contradicted; only 0.0")
    assert answers["3 - 2", "Retrieval"] == "Holds."
    assert answers["3 - 2", "STS"].startswith("Not seen; 0.0")
    assert rows[-1][-1] == "Holds: 5 is above 1 on STS, and below it on Clustering."


def test_under_trained_runs_and_idle_poolings_are_named(report):
    page = text_of((report / "index.html").read_text())
    names = {design: ", ".join(f"builtin_{design}_seed{seed}" for seed in range(3)) for design in "23"}
    assert f"Still rising : 3 of 21 runs: {names['3']} (" in page
    assert f"The pooling did nothing : 3 of 21 runs: {names['2']} (" in page
    assert "the validation of 3 of 21 runs still rose" in page[: page.index("Set-up")]
    rising = {row[0]: row[5] for row in table(report, "Convergence")[1:]}
    assert rising == dict.fromkeys(rising, "0 of 3") | {"3": "3 of 3"}


def test_equal_training_is_shown_setting_by_setting(report):
    rows = table(report, "Settings-that-differ-from-those-of-the-first-design")[1:]
    assert ["5 (last 4 layers)", "model.layers", "(not set)", "[-4, -3, -2, -1]"] in rows
    assert len(rows) == 7  # six designs, and the layers of the option
    page = text_of((report / "index.html").read_text())
    assert "Not only the design differs" not in page
    assert "not the same file" not in page


def test_options_are_compared_with_their_plain_design_as_exploratory(report):
    (row,) = table(report, "Options-against-their-plain-design")[1:]
    assert row[0] == "5 (last 4 layers)"
    assert re.fullmatch(r"-0\.0[34]\d+\* p 0\.0\d+", row[2])  # 0.04 is planted on retrieval
    assert "*" not in "".join(row[3:])


def test_cost_has_what_was_measured_and_says_why_the_rest_was_not(report):
    rows = table(report, "Cost-of-inference")
    assert rows[0][1:] == [
        "Backbone",
        "Adapter",
        "Pooling",
        *(f"{u} {n} tokens" for u in ("GFLOPs", "ms") for n in (32, 512)),
    ]
    assert rows[3] == ["2", "8,400,000", "0", "300,000", "0.541", "8.653", "2.1", "33.3"]
    assert "4096 tokens: the model reads 2048 tokens at most." in (report / "index.html").read_text()
    assert (report / "figures" / "quality_against_cost.png").is_file()


def test_summary_has_table_verdicts_and_at_most_four_pictures(report):
    folder = report / "summary"
    text = (folder / "summary.md").read_text()
    assert (report / "tables" / "Mean-score-over-tasks.md").read_text().strip() in text
    assert text.count("\n- **") == 4
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(pictures) == sorted(file.name for file in folder.glob("*.png"))
    assert 0 < len(pictures) <= 4
    assert set(json.loads((report / "comparison" / "comparison.json").read_text())) >= {"types", "notes"}


def test_unequal_training_is_said_loudly(tmp_path):
    changed = {"builtin_5_seed1": {"data": {"pairs/train.parquet": "f" * 16}}}
    page, _ = small(tmp_path, change={"training": {"steps": 400}}, **changed)
    warnings = " ".join(re.findall(r'<p class="warning">(.*?)</p>', page))
    assert "Not only the design differs: training.steps of 5." in warnings
    assert "pairs/train.parquet was not the same file in all runs: it differs in builtin_5_seed1." in warnings


def test_half_finished_study_says_what_is_missing(tmp_path):
    page, folder = small(tmp_path, finished=3)
    assert "Missing: 1 of 4 runs: builtin_5_seed1." in text_of(page)
    assert [row[0] for row in table(folder, "Missing-runs")] == ["Run", "builtin_5_seed1"]
    assert "The claims of the paper" not in page  # the study has none of its pairs
    # Of two seeds and one, 0.04 is within what seeds can make (t 12.7 with one degree of freedom).
    assert "STS</b>: no verdict on 5 against mean-bidirectional, whose difference seeds or spread may have made" in page


@pytest.mark.parametrize("finished", [0, 1])
def test_report_without_two_designs_has_no_verdict(tmp_path, finished):
    page, folder = small(tmp_path, finished=finished)
    assert f"No verdict yet: {finished} of 2 designs have results" in page
    assert "No verdict yet" in (folder / "summary" / "summary.md").read_text()
    JustHTML(page, strict=True, sanitize=False)


def test_too_few_tasks_are_labelled_and_get_no_marks(tmp_path):
    page, folder = small(tmp_path, tasks=5)
    assert "Unable to reach significance whatever the scores are, and without marks: STS: named beforehand" in page
    assert "STS</b>: cannot tell; 5 tasks cannot give a significant result." in page
    assert not any(">" in cell for row in table(folder, "Mean-score-over-tasks") for cell in row)


def test_runs_without_curves_cost_and_layers_leave_these_out(tmp_path):
    empty = {"training": {"steps": 0}, "machine": {}, "data": {}}
    page, folder = small(
        tmp_path, **{f"builtin_{d}_seed{s}": empty for d in ("5", "mean-bidirectional") for s in (0, 1)}
    )
    assert "The layers of these runs were not examined." in page
    assert "Inference cost was not measured in these runs" in page
    assert sorted(file.name for file in (folder / "figures").iterdir()) == ["runs.png"]


def test_stages_stand_with_what_their_accuracy_is_to_be_measured_by(tmp_path):
    accuracy = {"adapted": 0.1755, "base": 0.05, "causal": 0.2, "no_context": 0.03}
    stage = {"stage": "1-mntp", "steps": 20, "wall_seconds": 41.6, "masked_accuracy": accuracy, "losses": []}
    _, folder = small(tmp_path, builtin_5_seed1={"stages": [stage]})
    rows = table(folder, "Stages-before-the-training")
    assert rows[1:] == [["builtin_5_seed1", "1-mntp", "20", "42", "0.175", "0.050", "0.200", "0.030"]]


def test_failure_leaves_the_earlier_report_whole(tmp_path, monkeypatch):
    small(tmp_path, finished=0)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(write, "write_summary", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small(tmp_path, finished=1)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert [folder.name for folder in tmp_path.iterdir()] == ["report"]


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
    grey = image.imread(shot)[..., :3].mean(axis=2)
    assert grey.shape == (3000, 1000)
    assert 0.01 < np.mean(grey < 0.5) < 0.5


def _browse(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    options += [f"--user-data-dir={folder / 'profile'}", *map(str, arguments)]
    return subprocess.run([str(BROWSER), *options], capture_output=True, text=True, timeout=120, check=True)
