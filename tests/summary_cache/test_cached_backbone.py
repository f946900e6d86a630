"""A model on cached summaries: the same vectors, losses and gradients, and each text read once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from st_llmpool import POOLINGS, build_embedder
from st_llmpool.modules.errors import ConfigurationError, InputError
from st_llmpool.summary_cache import cached_summaries

TEXTS = ["a text", "another, longer text about cats and dogs", "x", "the quick brown fox jumps over the lazy dog " * 3]
LAYERED = {name: {} for name in ("multi_layer", "scalar_mix")}
LAYERED |= {name: {"reads": "layers"} for name in ("hopfield", "attsets", "gem", "pyramid")}
PLAIN = {"eos": {}, "lasttoken": {}, "mean": {}, "linear": {}}
FITTING = {**LAYERED, **PLAIN}


def build(base: str, pooling: str = "multi_layer", **settings):
    torch.manual_seed(1)
    settings = {"max_seq_length": 24, "device": "cpu", "verify": False, **settings}
    model = build_embedder(base, pooling=pooling, **settings)
    model[0].requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for weight in model[1].parameters():  # a pooling that starts at the plain readout would hide what it reads
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def encoded(model, **options) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True, **options)


@pytest.mark.parametrize("layers", ["all", [2, 3]])
@pytest.mark.parametrize("readout", ["eos", "mean"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", FITTING)
def test_vectors_are_those_without_the_cache(tiny_llm, tmp_path, pooling, attention, readout, layers):
    settings = {"attention": attention, "layer_readout": readout, "pooling_kwargs": FITTING[pooling]}
    model = build(tiny_llm, pooling, **settings, layers=layers if pooling in LAYERED else None)
    plain, prompted = encoded(model), encoded(model, prompt="query: ")
    with cached_summaries(model, tmp_path, dtype="float32"):
        assert torch.equal(encoded(model), plain)
        assert torch.equal(encoded(model, prompt="query: "), prompted)
    with cached_summaries(model, tmp_path):
        torch.testing.assert_close(encoded(model), plain, atol=1e-3, rtol=0)
    assert torch.equal(encoded(model), plain)


@pytest.mark.parametrize("loss", [MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss])
@pytest.mark.parametrize("pooling", [*LAYERED, "linear"])
def test_losses_and_gradients_are_those_without_the_cache(tiny_llm, tmp_path, pooling, loss):
    model = build(tiny_llm, pooling, pooling_kwargs=FITTING[pooling])
    columns = [TEXTS, [text + " yes" for text in TEXTS], [text + " no" for text in TEXTS]]
    objective = loss(model) if loss is MultipleNegativesRankingLoss else loss(model, mini_batch_size=2)

    def measured() -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        value = objective([model.preprocess(column, prompt="q: ") for column in columns], None)
        value.backward()
        return value.item(), [weight.grad.clone() for weight in model[1].parameters()]

    plain = measured()
    with cached_summaries(model, tmp_path, dtype="float32"):
        exact = measured()
    with cached_summaries(model, tmp_path):
        rounded = measured()
    assert exact[0] == pytest.approx(plain[0], abs=1e-5)
    assert rounded[0] == pytest.approx(plain[0], abs=2e-2)
    for one, two, three in zip(plain[1], exact[1], rounded[1], strict=True):
        torch.testing.assert_close(two, one, atol=1e-5 * max(1.0, one.abs().max().item()), rtol=1e-4)
        assert (three - one).norm() <= 0.02 * one.norm() + 1e-5


@pytest.mark.parametrize("name", sorted(POOLINGS.keys() - PLAIN.keys() - {"multi_layer", "scalar_mix"}))
def test_a_pooling_over_tokens_is_refused_by_name(tiny_llm, tmp_path, name):
    model = build(tiny_llm, name)
    with (
        pytest.raises(ConfigurationError, match=rf"({name}|{type(model[1]).__name__}).* reads every token"),
        cached_summaries(model, tmp_path),
    ):
        pass


def test_each_text_is_encoded_once_for_all_layers_readouts_and_poolings(tiny_llm, tmp_path):
    counts = []
    for pooling in ("multi_layer", "scalar_mix", "mean"):
        for readout in ("eos", "mean"):
            model = build(tiny_llm, pooling, layer_readout=readout)
            with cached_summaries(model, tmp_path) as cache:
                encoded(model)
                encoded(model, batch_size=1)
                model.encode_query(TEXTS)
                counts.append(cache.encoded)
    assert counts == [4, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "change",
    ["prompt", "prompt left out", "length", "weights", "attention", "tokenizer", "dtype", "EOS"],
)
def test_what_changes_the_values_is_encoded_again(tiny_llm, tmp_path, change):
    with cached_summaries(build(tiny_llm), tmp_path, dtype="float32") as cache:
        cache.fill(TEXTS, "q: ")
    settings = {
        "length": {"max_seq_length": 23},
        "attention": {"attention": "causal"},
        "dtype": {"dtype": torch.bfloat16},
        "EOS": {"add_eos_token": False},
        "prompt left out": {"include_prompt": False},
    }
    model = build(tiny_llm, **settings.get(change, {}))
    if change == "weights":
        next(model[0].model.layers[0].parameters()).data[0, 0] += 1e-3
    if change == "tokenizer":
        model.tokenizer.add_tokens(["never in any text"])
    prompt = "other: " if change == "prompt" else "q: "
    plain = encoded(model, prompt=prompt)
    with cached_summaries(model, tmp_path, dtype="float32") as cache:
        torch.testing.assert_close(encoded(model, prompt=prompt), plain, atol=1e-6, rtol=0)
        assert cache.encoded == len(TEXTS)


def test_a_damaged_row_is_encoded_again(tiny_llm, tmp_path, caplog):
    model = build(tiny_llm)
    plain = encoded(model)
    with cached_summaries(model, tmp_path, dtype="float32") as cache:
        encoded(model)
    file = next(cache.store.folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-100] ^= 64
    file.write_bytes(content)
    with cached_summaries(model, tmp_path, dtype="float32") as cache:
        assert torch.allclose(encoded(model), plain, atol=1e-6)
        assert cache.encoded == 1
    assert "is damaged in row" in caplog.text


def test_what_is_no_text_is_refused_as_without_the_cache(tiny_llm, tmp_path):
    model = build(tiny_llm)
    with cached_summaries(model, tmp_path), pytest.raises(InputError, match="of type int: pass str"):
        model.preprocess(["a", 5])


def test_values_that_are_not_finite_are_refused_by_their_text(tiny_llm, tmp_path):
    model = build(tiny_llm)
    model[0].model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    with cached_summaries(model, tmp_path), pytest.raises(InputError, match="are not finite in torch"):
        encoded(model)


def test_the_model_is_as_before_after_the_block_and_after_an_error(tiny_llm, tmp_path):
    model = build(tiny_llm)
    with pytest.raises(InputError), cached_summaries(model, tmp_path):
        model.preprocess([5])
    assert "cached_text" not in model.preprocess(TEXTS)
    assert not {"preprocess", "forward", "_inference"} & (vars(model).keys() | vars(model[0]).keys())
    assert model[0].batch_runner is None


def test_a_model_that_is_saved_inside_the_block_is_a_whole_one(tiny_llm, tmp_path):
    model = build(tiny_llm)
    with cached_summaries(model, tmp_path / "cache"):
        model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert torch.allclose(encoded(loaded), encoded(model), atol=1e-6)


_FILL = """
import sys, torch
from st_llmpool import build_embedder
from st_llmpool.summary_cache import cached_summaries
model = build_embedder(sys.argv[1], verify=False, max_seq_length=24, device="cpu")
with cached_summaries(model, sys.argv[2]) as cache:
    add = cache.store.add
    def written(rows):
        add(rows)
        print(len(cache.store), flush=True)
    cache.store.add = written
    cache.fill([f"text number {n}" for n in range(3000)])
    print("encoded", cache.encoded, len(cache.store))
"""


def _fill(base: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", _FILL, base, str(folder)], stdout=subprocess.PIPE, text=True)


def test_an_encoding_that_is_killed_goes_on_where_it_was(tiny_llm, tmp_path):
    process = _fill(tiny_llm, tmp_path)
    lines = [process.stdout.readline() for _ in range(3)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = int(lines[-1])
    assert 0 < kept < 3000
    last = _fill(tiny_llm, tmp_path).communicate()[0].splitlines()[-1]
    _, encoded_again, total = last.split()
    assert int(encoded_again) <= 3000 - kept
    assert int(total) == 3000


def test_two_processes_divide_the_texts_of_one_cache(tiny_llm, tmp_path):
    processes = [_fill(tiny_llm, tmp_path) for _ in range(2)]
    lines = [process.communicate()[0].splitlines()[-1].split() for process in processes]
    assert sum(int(line[1]) for line in lines) == 3000
    assert [line[2] for line in lines] == ["3000", "3000"]
