"""The complete path on a real LLM: prove, train, resume, save, load without the package, doctor, export, evaluate.

Run by ``make real LLM=FOLDER``, about ten minutes on two CPU cores with a model of 270M weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainerCallback

from st_llmpool import build_embedder, verify_attention
from st_llmpool.evaluation import evaluate
from st_llmpool.hub.doctor import doctor
from st_llmpool.hub.export import export
from st_llmpool.training import Recipe, train
from tests.hub.sharing_table import site_packages_without_us

pytestmark = pytest.mark.real

TEXTS = ["A cat sleeps.", "Interest rates rose for the third time this year, said the bank.", "list.sort(key=None)"]
_ENCODE = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
assert "st_llmpool" not in sys.modules
folder, texts, result = json.loads(sys.argv[1])
np.save(result, SentenceTransformer(folder, trust_remote_code=True, device="cpu").encode(texts))
"""


@pytest.fixture(scope="module")
def llm() -> str:
    folder = os.environ.get("REAL_LLM", "")
    if not Path(folder, "config.json").is_file():
        pytest.skip("needs the folder of a real LLM: make real LLM=FOLDER")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Countries and their capitals."""
    capitals = {
        "France": "Paris",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Japan": "Tokyo",
        "Egypt": "Cairo",
        "Peru": "Lima",
    }
    capitals |= {"Kenya": "Nairobi", "Cuba": "Havana", "Norway": "Oslo", "Austria": "Vienna", "Greece": "Athens"}
    rows = [
        {"query": f"What is the capital of {country}?", "positive": f"{city} is the seat of the government."}
        for country, city in capitals.items()
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_of(llm: str, pairs: Path, out: Path, **model) -> Recipe:
    values = {
        "output_dir": str(out),
        "model": {"base": llm, "max_seq_length": 32, "tune": "lora", **model},
        "data": [{"source": str(pairs)}],
        "training": {"max_steps": 10, "batch_size": 8, "save_steps": 5, "logging_steps": 1, "learning_rate": 2e-4},
    }
    return Recipe.from_dict(values)


def encode_without_the_package(folder: Path, work: Path) -> np.ndarray:
    result = work / "vectors.npy"
    environment = {**os.environ, "PYTHONPATH": str(site_packages_without_us(work))}
    order = json.dumps([str(folder), TEXTS, str(result)])
    subprocess.run([sys.executable, "-S", "-P", "-c", _ENCODE, order], env=environment, check=True, timeout=600)
    return np.load(result)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_its_attention_is_proven_in_both_modes(llm, attention):
    report = verify_attention(build_embedder(llm, attention=attention, verify=False))
    assert report.ok
    assert report.verdict == attention


def test_lora_trains_and_the_model_loads_without_the_package_and_passes_the_doctor(llm, pairs, tmp_path):
    result = train(recipe_of(llm, pairs, tmp_path / "run", design="5"))
    losses = [loss for _, loss in result.report["losses"]]
    assert losses[-1] < losses[0]
    assert doctor(result.model_dir).ok
    expected = result.model.encode(TEXTS)
    found = encode_without_the_package(result.model_dir, tmp_path)
    assert (found * expected).sum(axis=1).min() > 0.99


class Stop(Exception):
    """What a killed run looks like from inside."""


class StopAtStep7(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise Stop


def test_qlora_that_is_stopped_and_resumed_ends_as_if_it_had_not(llm, pairs, tmp_path):
    unbroken = train(recipe_of(llm, pairs, tmp_path / "unbroken", quantization="nf4"))
    recipe = recipe_of(llm, pairs, tmp_path / "stopped", quantization="nf4")
    with pytest.raises(Stop):
        train(recipe, callbacks=[StopAtStep7()])
    resumed = train(recipe, resume=True)
    assert resumed.report["losses"] == unbroken.report["losses"]


def test_a_plain_design_exports_native_and_is_scored(llm, pairs, tmp_path):
    result = train(recipe_of(llm, pairs, tmp_path / "run", design="mean-bidirectional"))
    export(result.model_dir, tmp_path / "native", native=True, merge=True)
    found = evaluate(tmp_path / "native", output_dir=tmp_path / "scores", suite="builtin", limit=20)
    assert 0 < found.scores["LocalDocstringRetrieval"] <= 1
