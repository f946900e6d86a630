"""The scripts that make, export and measure the built-in backbone, on a few sentences and three steps."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from st_llmpool.data import Docstring, builtin_backbone

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import evaluate_backbone
import pretrain_backbone

TEXT = [f"Sentence number {number} says that {number} is more than {number - 1}." for number in range(200)]


@pytest.fixture
def text_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "squad_text/train": TEXT,
        "wikitext2/valid": [" = Title = ", *TEXT[:3]],
        "wikitext2/test": [" = Test = ", *TEXT[90:100]],
    }
    for name, rows in files.items():
        path = tmp_path / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": rows}), path)
    row = Docstring("torch", "torch.add", "add", "Adds two numbers. " + "The sum is exact. " * 50)
    monkeypatch.setattr(pretrain_backbone, "docstrings", lambda split: [row] if split == "train" else [])
    return tmp_path / "data"


def test_a_run_goes_on_and_its_export_and_card_are_whole(text_dir, tmp_path):
    run, card, shipped = tmp_path / "run", tmp_path / "card", tmp_path / "shipped"
    pretrain_backbone.train(text_dir, run, steps=2, batch_size=2, save_steps=1, threads=1)
    stopped = (run / "checkpoint-2/model.safetensors").stat().st_mtime_ns
    pretrain_backbone.train(text_dir, run, steps=3, batch_size=2, save_steps=1, threads=1)
    assert (run / "checkpoint-2/model.safetensors").stat().st_mtime_ns == stopped
    assert json.loads((run / "checkpoint-3/trainer_state.json").read_text())["global_step"] == 3

    pretrain_backbone.export(run / "final", shipped)
    trained, loaded = (AutoModelForCausalLM.from_pretrained(path) for path in (run / "final", shipped))
    assert loaded.dtype == torch.float32
    assert loaded.config.use_cache
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, trained.state_dict()[name].half().float(), rtol=0, atol=0)
    with safe_open(shipped / "model.safetensors", framework="pt") as weights:
        assert weights.get_tensor("model.norm.weight").dtype == torch.float16
    assert AutoTokenizer.from_pretrained(shipped)(TEXT) == AutoTokenizer.from_pretrained(run / "final")(TEXT)
    assert str(tmp_path) not in "".join(path.read_text() for path in shipped.glob("*.json"))

    (run / "history.json").write_text(
        json.dumps({"batch_size": 2, "log": [{"step": 3, "loss": 8.0, "learning_rate": 3e-3}]})
    )
    evaluate_backbone.main(text_dir, run, model=shipped, card=card)
    evaluation = json.loads((card / "evaluation.json").read_text())
    files = {path.name for path in card.iterdir()}
    assert files == {"README.md", "evaluation.json", "loss_curve.png", "training_log.json"}
    text = (card / "README.md").read_text()
    assert f"{evaluation['bits_per_byte']['interpolated bigram']:.3f}" in text
    assert f"torch {torch.__version__}".split("+")[0] in text
    assert evaluation["bytes"] == sum(len(row.encode()) for row in [" = Test = ", *TEXT[90:100]])


def test_training_text_starts_each_wikitext_document_with_its_headings():
    lines = [" = A = ", " = = B = = ", " one. ", " two. ", " = C = ", " three. "]
    assert pretrain_backbone.sections(lines) == [" = A =  = = B = =  one.  two. ", " = C =  three. "]


def test_stream_puts_eos_after_every_document():
    tokenizer = AutoTokenizer.from_pretrained(builtin_backbone())
    stream = pretrain_backbone.encode(tokenizer, ["One text.", "", "Another"])
    assert tokenizer.decode(stream) == "One text.<eos><eos>Another<eos>"


def test_bigram_probabilities_match_a_slow_count():
    generator = np.random.default_rng(0)
    counted, tuning, test = (generator.integers(0, high, 300) for high in (5, 6, 6))
    bigram = evaluate_backbone.InterpolatedBigram(counted, tuning, vocabulary=7)
    bigram.weights = np.array([0.5, 0.3, 0.2])
    unigrams = Counter(counted.tolist())
    pairs = Counter(pairwise(counted.tolist()))
    contexts = Counter(counted[:-1].tolist())

    def probability(first: int, second: int) -> float:
        unigram = unigrams[second] / 300
        pair = pairs[first, second] / contexts[first] if contexts[first] else unigram
        return float(np.dot(bigram.weights, [pair, unigram, 1 / 7]))

    expected = sum(-math.log2(probability(a, b)) for a, b in pairwise(test.tolist()))
    assert bigram.bits(test) == pytest.approx(expected)


def test_bigram_weights_are_the_best_for_the_tuning_text():
    generator = np.random.default_rng(0)
    counted, tuning = (generator.integers(0, high, 500) for high in (5, 6))
    bigram = evaluate_backbone.InterpolatedBigram(counted, tuning, vocabulary=7)
    best = bigram.bits(tuning)
    for weights in generator.dirichlet(np.ones(3), size=200):
        bigram.weights = weights
        assert bigram.bits(tuning) > best - 0.01


@pytest.mark.parametrize("length", [2, 100, 257, 258, 385, 900])
def test_every_token_but_the_first_is_scored_once(length):
    """A model that ignores its context gives a sum that does not depend on the windows."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    stream = np.random.default_rng(0).integers(0, 11, length)
    with torch.inference_mode():
        table = model(input_ids=torch.arange(11)[:, None]).logits[:, 0].log_softmax(-1).numpy() / math.log(2)
    expected = -sum(table[a, b] for a, b in pairwise(stream))
    assert evaluate_backbone.language_model_bits(model, stream) == pytest.approx(expected, rel=1e-5)
