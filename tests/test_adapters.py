"""An adapter that starts at what 4 bits have lost is as near to the whole weights as its rank allows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, LlamaConfig, LlamaModel

from st_llmpool import build_embedder
from st_llmpool.adapters import load_again, merge_adapter
from st_llmpool.modules.errors import ConfigurationError

LOFTQ = {"r": 8, "lora_alpha": 32, "init_lora_weights": "loftq"}
TEXTS = ["fox", "the quick brown fox jumps over the lazy dog"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> str:
    from tests.conftest import save_tiny_llm

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    return save_tiny_llm(tmp_path_factory.mktemp("llm") / "llm", LlamaConfig(**sizes))


def test_loftq_starts_as_near_to_the_whole_weights_as_the_rank_allows(llm):
    model = build_embedder(llm, quantization_config="nf4", peft_config=LOFTQ)
    whole = AutoModel.from_pretrained(llm)
    config = model.transformers_model.config.quantization_config
    rounded = AutoModel.from_pretrained(llm, quantization_config=config).dequantize()
    layers = {n: m for n, m in model.transformers_model.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = whole.get_submodule(name).weight.double()
        lost = weight - rounded.get_submodule(name).weight.double()
        left = lost - layer.get_delta_weight("default").double()
        best = torch.linalg.svdvals(lost)[8:].square().sum().sqrt()
        assert best <= left.norm() * (1 + 1e-5), name
        assert left.norm() <= 1.02 * best, name
        assert left.norm() < 0.95 * lost.norm(), name


def test_loftq_gives_vectors_nearer_to_the_whole_model_and_survives_a_save(llm, tmp_path):
    whole = build_embedder(llm, pooling="mean").encode(TEXTS)
    started = build_embedder(llm, pooling="mean", quantization_config="nf4", peft_config=LOFTQ | {"r": 32})
    plain = build_embedder(llm, pooling="mean", quantization_config="nf4", peft_config="paper")
    assert np.linalg.norm(started.encode(TEXTS) - whole) < 0.8 * np.linalg.norm(plain.encode(TEXTS) - whole)
    started.save_pretrained(str(tmp_path / "saved"))
    reloaded = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    np.testing.assert_allclose(reloaded.encode(TEXTS), started.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peft_config": LOFTQ}, "'loftq'.*not in 4 bits"),
        ({"peft_config": LOFTQ, "quantization_config": "int8"}, "not in 4 bits"),
        ({"peft_config": LOFTQ | {"use_dora": True}, "quantization_config": "nf4"}, "use_dora do not go together"),
        ({"peft_config": {"init_lora_weights": "pissa"}}, "'pissa' changes the base's weights"),
        ({"peft_config": {"init_lora_weights": "pissa"}, "quantization_config": "nf4"}, "'pissa' changes"),
    ],
)
def test_starts_that_would_not_survive_a_save_are_refused(llm, given, message):
    with pytest.raises(ConfigurationError, match=message):
        build_embedder(llm, **given)


OWN_CODE = """
from transformers import LlamaConfig, LlamaModel

class OwnConfig(LlamaConfig):
    model_type = "own_llm"

class OwnModel(LlamaModel):
    config_class = OwnConfig
"""


def test_an_adapter_merges_into_a_base_that_brings_its_own_code(llm, tmp_path):
    base = Path(shutil.copytree(llm, tmp_path / "base"))
    (base / "own.py").write_text(OWN_CODE)
    config = json.loads((base / "config.json").read_text()) | {"model_type": "own_llm", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (base / "config.json").write_text(json.dumps(config))
    start = {"r": 4, "init_lora_weights": False}
    model = build_embedder(str(base), pooling="mean", peft_config=start, trust_remote_code=True)
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path / "adapter"))
    merge_adapter(model, tmp_path / "adapter")
    assert type(model.transformers_model).__name__ == "OwnModel"
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-5)


def test_a_base_is_loaded_again_from_the_commit_that_it_was_loaded_from(llm, monkeypatch):
    model = build_embedder(llm, pooling="mean", peft_config="paper")
    model.transformers_model.config._commit_hash = "c0ffee"
    asked = {}
    monkeypatch.setattr(LlamaModel, "from_pretrained", lambda base, **given: asked.update(base=base, **given))
    load_again(model.transformers_model, "org/base", dtype="auto")
    assert asked == {"base": "org/base", "revision": "c0ffee", "dtype": "auto"}
