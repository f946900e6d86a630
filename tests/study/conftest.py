"""A study that takes seconds: two designs of a tiny base, on a handful of sentences."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

from st_llmpool.study.settings import DesignSettings, Study
from tests.clean import clean_run  # noqa: F401

TOPICS = {"sea": ["the ship sails", "a wave rolls", "the fish swims"], "land": ["a dog runs", "the hill", "dry grass"]}


@pytest.fixture(autouse=True)
def checkpoints_within_a_second(caplog) -> None:
    """transformers distrusts the times of checkpoints that a tiny run writes within one second."""
    caplog.set_level(logging.ERROR, "transformers.trainer_utils")


@pytest.fixture
def study_data(tmp_path) -> Path:
    """Folder with pairs to train on and a suite's data."""
    folder = tmp_path / "data"
    (folder / "topics").mkdir(parents=True)
    texts = [(text, topic) for topic, own in TOPICS.items() for text in own]
    pairs = [
        {"query": f"{text} {number}", "positive": f"{text} it is {number}"} for number in range(4) for text, _ in texts
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    rows = [{"text": text, "label": topic} for text, topic in texts]
    (folder / "topics" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    similar = [{"sentence1": a, "sentence2": b, "score": float(s == t)} for a, s in texts for b, t in texts]
    (folder / "topics" / "similar.jsonl").write_text("\n".join(map(json.dumps, similar)))
    tasks = [
        {"name": "LocalTopics", "type": "Clustering", "folder": "topics"},
        {"name": "LocalSimilar", "type": "STS", "folder": "topics", "files": {"test": "similar.jsonl"}},
    ]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    return folder


@pytest.fixture
def tiny_study(tiny_llm, study_data) -> Study:
    """Mean against design 5, four steps each."""
    return Study(
        name="tiny",
        bases={"tiny": tiny_llm},
        designs=[DesignSettings("mean-bidirectional"), DesignSettings("5")],
        recipe={
            "model": {"tune": "full", "max_seq_length": 16},
            "data": [{"source": "{data}/pairs.jsonl"}],
            "training": {"max_steps": 4, "batch_size": 4, "save_steps": 2, "logging_steps": 1},
            "evaluation": {
                "data": [{"source": "{data}/pairs.jsonl", "limit": 6}],
                "eval_steps": 2,
                "eval_on_start": True,
            },
        },
        suite=str(study_data / "suite.yaml"),
        threads=1,
        untrained=False,
    )
