from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from st_llmpool.study.report import write_report
from tests.study.report.pages import HOSTILE
from tests.study.synthetic_study import synthetic_records, synthetic_results, synthetic_study


@pytest.fixture(scope="package", autouse=True)
def quick():
    """What takes most of the time and is looked at elsewhere: simulations, pixels, mteb."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("st_llmpool.stats.power_analysis._SIMULATED", 200)
        patch.setattr("st_llmpool.stats.plots.DPI", 40)
        patch.setattr("st_llmpool.study.report.runs.suite_description", lambda suite: "Cut by length.")
        yield


@pytest.fixture(scope="package")
def report(tmp_path_factory, quick) -> Path:
    """The folder of a finished study's report, whose description and an option try to break the page."""
    pytest.importorskip("matplotlib", reason="the extra 'plots' is not installed")
    pytest.importorskip("scikit_posthocs", reason="the extra 'plots' is not installed")
    study = synthetic_study(description=HOSTILE)
    study.designs[-1] = replace(study.designs[-1], option="last 4 layers")
    records = synthetic_records(study)
    folder = tmp_path_factory.mktemp("study") / "report"
    assert write_report(study, records, synthetic_results(records), folder) == folder / "index.html"
    return folder
