"""What a study will cost, before anything of it is run."""

from __future__ import annotations

import json

import pytest

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.study.forecast import forecast
from st_llmpool.study.settings import DesignSettings, Study


def study(**training) -> Study:
    return Study(
        designs=[DesignSettings("mean-bidirectional"), DesignSettings("5")],
        seeds=[0, 1],
        suite="builtin",
        recipe={
            "data": [{"source": "{data}/a.jsonl", "limit": 30}, {"source": "{data}/b.jsonl"}],
            "model": {"max_seq_length": 16},
            "training": {"batch_size": 8, **training},
        },
    )


@pytest.fixture
def data(tmp_path):
    for name, rows in (("a", 100), ("b", 20)):
        lines = [json.dumps({"query": f"q{row}", "positive": f"p{row}"}) for row in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_epochs_cost_what_their_steps_cost(data):
    """30 rows of the one and 20 of the other set are 3 and 2 batches of 8; two epochs are 10 steps."""
    by_epochs = forecast(study(num_train_epochs=2), [], data_dir=data)
    assert by_epochs.flops == forecast(study(max_steps=10), [], data_dir=data).flops
    assert min(flops for name, flops in by_epochs.flops.items() if "_seed" in name) > 0


def test_epochs_of_unknown_data_are_refused(data):
    assert forecast(study(max_steps=10), []).flops
    with pytest.raises(ConfigurationError, match="name that folder"):
        forecast(study(num_train_epochs=1), [])
