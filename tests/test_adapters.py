"""An adapter that starts at what 4 bits have lost is as near to the whole weights as its rank allows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, BitsAndBytesConfig, LlamaConfig, LlamaModel

from st_llmpool import build_embedder
from st_llmpool.adapters import load_again, lora_config, merge_adapter
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training.run_folder import load_trained_weights

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
        ({"peft_config": LOFTQ}, "'loftq'.*needs a base in 4 bits"),
        ({"peft_config": LOFTQ, "quantization_config": "int8"}, "needs a base in 4 bits"),
        ({"peft_config": LOFTQ | {"use_dora": True}, "quantization_config": "nf4"}, "use_dora cannot be combined"),
        ({"peft_config": {"init_lora_weights": "pissa"}}, "'pissa' does not work here.*gaussian"),
        ({"peft_config": {"init_lora_weights": "pissa_niter_4"}, "quantization_config": "nf4"}, "pissa_niter_4"),
        ({"peft_config": {"init_lora_weights": "eva"}}, "'eva' does not work here: it needs data"),
        ({"peft_config": {"init_lora_weights": "corda"}}, "'corda' does not work here: it needs data"),
        ({"peft_config": {"alora_invocation_tokens": [1, 2]}}, r"alora_invocation_tokens=\[1, 2\]"),
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


BASES = {
    "whole": {},
    "tied": {},
    "nf4": {"quantization_config": "nf4"},
    "int8": {"quantization_config": "int8"},
    "published in 4 bits": {},
    "published in 8 bits": {},
}
ADAPTERS = {
    "all-linear": {},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "token indices": {"trainable_token_indices": [5, 6]},
    "embeddings in full": {"modules_to_save": ["embed_tokens"]},
    "norm in full": {"modules_to_save": ["norm"]},
    "dora": {"use_dora": True},
    "dora of embeddings": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    "biases": {"lora_bias": True},
}


@pytest.fixture(scope="module")
def bases(llm, tmp_path_factory) -> dict[str, str]:
    from tests.conftest import save_tiny_llm, tiny_tokenizer

    folder = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    found = dict.fromkeys(BASES, llm)
    found["tied"] = save_tiny_llm(folder / "tied", LlamaConfig(**sizes, tie_word_embeddings=True))
    for bits in (4, 8):
        name = f"published in {bits} bits"
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        found[name] = str(folder / name)
        AutoModel.from_pretrained(llm, quantization_config=config).save_pretrained(found[name])
        tiny_tokenizer(eos_token="<eos>", pad_token="<pad>").save_pretrained(found[name])
    return found


def trained(model: SentenceTransformer) -> SentenceTransformer:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    model.train()
    for _ in range(2):  # LoRA's B starts at zero: in the first step A has no gradient
        embeddings = model(model.preprocess(TEXTS))["sentence_embedding"]
        optimizer.zero_grad()
        (embeddings[0] @ embeddings[1] + embeddings.sum()).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_whatever_trains_is_saved_and_reloads_and_resumes(bases, base, adapter, tmp_path):
    options: dict[str, Any] = {"pooling": "mean", "peft_config": {"r": 4, **ADAPTERS[adapter]}, "verify": False}
    options |= BASES[base]
    if "8" in base and "dora" in adapter:
        with pytest.raises(ConfigurationError, match=r"'use_dora': True.* does not work on this LlamaModel: "):
            build_embedder(bases[base], **options)
        return
    model = build_embedder(bases[base], **options)
    before = model.encode(TEXTS)
    after = trained(model).encode(TEXTS)
    assert np.abs(after - before).max() > 1e-4
    model.save_pretrained(str(tmp_path), create_model_card=False)
    reloaded = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    np.testing.assert_allclose(reloaded.encode(TEXTS), after, atol=1e-6)
    resumed = build_embedder(bases[base], **options)
    load_trained_weights(resumed, tmp_path)
    np.testing.assert_allclose(resumed.encode(TEXTS), after, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["embed_tokens"], "trainable_token_indices": [5]}, "trainable_token_indices.*cannot be"),
        ({"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]}, "'q_proj'.*floating point"),
        ({"target_modules": ["nowhere"]}, "'nowhere'.*all-linear"),
    ],
)
def test_what_cannot_train_is_refused_at_once_with_the_true_cause(llm, options, message):
    with pytest.raises(ConfigurationError, match=message):
        build_embedder(llm, pooling="mean", quantization_config="nf4", peft_config=options, verify=False)


def test_a_peft_that_is_too_old_for_transformers_is_named_as_the_cause(llm, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    with pytest.raises(ConfigurationError, match=r"No adapter works with this peft \d.*99\.0.*older transformers"):
        build_embedder(llm, pooling="mean", peft_config="paper", verify=False)


def test_an_adapters_config_has_its_names_in_order(llm, tmp_path):
    names = ["v_proj", "down_proj", "q_proj", "up_proj"]
    model = build_embedder(llm, pooling="mean", peft_config={"target_modules": names}, verify=False)
    model.save_pretrained(str(tmp_path), create_model_card=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": "no"}, "use_dora='no' of the adapter must be true or false"),
        ({"use_rslora": "off"}, "use_rslora='off'"),
        ({"fan_in_fan_out": 0}, "fan_in_fan_out=0"),
        ({"lora_bias": "false"}, "lora_bias='false'"),
        ({"ensure_weight_tying": None}, "ensure_weight_tying=None"),
        ({"r": "8"}, "r='8' of the adapter must be a number"),
        ({"lora_alpha": True}, "lora_alpha=True of the adapter must be a number"),
        ({"lora_alpha": 0}, "lora_alpha=0 of the adapter must be above 0"),
        ({"lora_dropout": "1e-1"}, "lora_dropout='1e-1' of the adapter must be a number"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 of the adapter must be at least 0 and below 1"),
        ({"lora_dropout": -1}, "lora_dropout=-1"),
        ({"inference_mode": True}, "inference_mode=True of the adapter freezes it"),
    ],
)
def test_text_where_a_boolean_or_a_number_belongs_is_refused(fields, message):
    """peft takes them as they come: text is true, whatever it says."""
    with pytest.raises(ConfigurationError, match=message):
        lora_config(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "("},
        {"exclude_modules": "("},
        {"rank_pattern": {"(": 4}},
        {"megatron_config": {"a": 1}},
        {"layer_replication": [[0, 99]]},
        {"trainable_token_indices": [10**9]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_whatever_peft_raises_over_a_config_is_one_line_of_ours(llm, fields):
    with pytest.raises(ConfigurationError, match="does not work on this LlamaModel") as refusal:
        build_embedder(llm, peft_config=fields, verify=False)
    assert "\n" not in str(refusal.value)
