"""A saved embedder as the base goes on as it is, or is refused by name; it is never stripped in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, StaticEmbedding
from transformers import BertConfig, LlamaConfig

from st_llmpool import DESIGNS, build_embedder
from st_llmpool.hub.loading import load_model
from st_llmpool.modules.errors import ConfigurationError, DataError, InputError
from st_llmpool.saved_embedder import is_saved_embedder, read_architecture
from tests.conftest import TINY_CONFIG, save_tiny_llm

TEXTS = ["fox", "the quick brown fox jumps over the lazy dog " * 4]
BERT = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def scrambled(model: SentenceTransformer) -> SentenceTransformer:
    """With weights beside the backbone's that no new model has."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("0.") or "lora_B" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def saved(model: SentenceTransformer, folder: Path) -> tuple[SentenceTransformer, str]:
    model.save_pretrained(str(folder))
    return model, str(folder)


@pytest.fixture(scope="module")
def own(tiny_llm, tmp_path_factory) -> tuple[SentenceTransformer, str]:
    model = build_embedder(
        tiny_llm,
        attention="causal",
        pooling="multi_layer",
        layers=[1, -1],
        include_prompt=False,
        max_seq_length=24,
        prompts={"query": "Q:", "banking": "B:"},
    )
    return saved(scrambled(model), tmp_path_factory.mktemp("own"))


def assert_equal_vectors(model: SentenceTransformer, other: SentenceTransformer) -> None:
    for prompt in (None, *(name for name, text in other.prompts.items() if text)):
        np.testing.assert_allclose(
            model.encode(TEXTS, prompt_name=prompt), other.encode(TEXTS, prompt_name=prompt), atol=1e-6
        )


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"pooling": "multi_layer"},
        DESIGNS["3"].as_kwargs(),
        {"pooling": "multi_layer", "layers": [1, 4], "layer_readout": "eos", "pooling_kwargs": {"num_latents": 8}},
    ],
    ids=str,
)
def test_one_of_ours_is_continued_with_all_that_it_has(own, asked, tmp_path):
    model, folder = own
    again = build_embedder(folder, **asked)
    assert again.prompts == {"query": "Q:", "document": "", "banking": "B:"}
    assert (again.max_seq_length, again[0].include_prompt) == (24, False)
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert_equal_vectors(again, model)
    _, second = saved(again, tmp_path)
    assert_equal_vectors(SentenceTransformer(second, trust_remote_code=True), model)


def test_prompts_and_lengths_that_are_given_come_over_the_saved_ones(own):
    again = build_embedder(own[1], prompts={"query": "new:"}, max_seq_length=32, include_prompt=True)
    assert again.prompts == {"query": "new:", "document": "", "banking": "B:"}
    assert (again.max_seq_length, again[0].include_prompt) == (32, True)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"pooling": "mean"},
            "with MultiLayerPooling and Normalize, which the requested pooling='mean'.*pooling_init='new'",
        ),
        ({"pooling": "multi_layer", "pooling_kwargs": {"num_latents": 3}}, "num_latents=8.*pooling_init='new'"),
        (DESIGNS["paper-3"].as_kwargs(), "num_latents=8, .*readout_skip=True"),
        ({"pooling_kwargs": {"num_latents": 3}}, "need the name of its pooling"),
        ({"attention": "bidirectional"}, "attention='causal', not 'bidirectional'"),
        ({"layers": "all"}, r"layers=\[1, 4\]"),
        ({"layer_readout": "mean"}, "layer_readout='eos'"),
        ({"add_eos_token": False}, "add_eos_token=True"),
    ],
)
def test_what_contradicts_it_is_refused(own, asked, message):
    with pytest.raises(ConfigurationError, match=message):
        build_embedder(own[1], **asked)


def test_a_new_pooling_on_request_starts_on_its_backbone_with_its_prompts(own):
    model, folder = own
    new = build_embedder(folder, attention="bidirectional", pooling="scalar_mix", pooling_init="new")
    assert [type(module).__name__ for module in new] == ["LLMTransformer", "ScalarMixPooling", "Normalize"]
    assert (new[0].attention, new[0].layers, new.prompts["banking"]) == ("bidirectional", [1, 2, 3, 4], "B:")
    torch.testing.assert_close(new[0].model.layers[1].mlp.up_proj.weight, model[0].model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("config", [TINY_CONFIG, BERT], ids=lambda config: config.model_type)
@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
def test_one_of_sentence_transformers_is_continued_with_all_that_it_has(config, mode, tmp_path):
    base = save_tiny_llm(tmp_path / "base", config)
    modules = [Transformer(base, max_seq_length=20), Pooling(32, mode, include_prompt=False), Dense(32, 12)]
    plain = SentenceTransformer(modules=[*modules, Normalize()], prompts={"query": "find:", "x": "y"})
    plain.default_prompt_name, plain.similarity_fn_name = "x", "dot"
    _, folder = saved(plain, tmp_path / "plain")
    for asked in ({}, {"pooling": mode}):
        again = build_embedder(folder, **asked)
        assert (again.max_seq_length, again.prompts) == (20, plain.prompts)
        assert (again.default_prompt_name, again.similarity_fn_name) == ("x", "dot")
        assert type(again[0]).__name__ == "LLMTransformer"
        assert_equal_vectors(again, plain)
    with pytest.raises(ConfigurationError, match=f"pooling_mode='{mode}'.*pooling='max'"):
        build_embedder(folder, pooling="max")
    _, second = saved(again, tmp_path / "again")
    assert_equal_vectors(SentenceTransformer(second, trust_remote_code=True), plain)


def test_an_excluded_prompt_that_took_a_token_of_the_text_with_it_is_named(tiny_llm, tmp_path, caplog):
    modules = [Transformer(tiny_llm), Pooling(32, "mean", include_prompt=False)]
    model = SentenceTransformer(modules=modules, prompts={"query": "dog: ", "document": "dog:"})
    _, folder = saved(model, tmp_path / "model")
    build_embedder(folder)
    assert "the prompt 'query'" in caplog.text
    assert "document" not in caplog.text


def test_a_first_module_that_is_no_transformer_is_refused(tmp_path):
    from tests.conftest import tiny_tokenizer

    static = StaticEmbedding(tiny_tokenizer(pad_token="<pad>").backend_tokenizer, embedding_dim=8)
    _, folder = saved(SentenceTransformer(modules=[static]), tmp_path)
    with pytest.raises(ConfigurationError, match="starts with StaticEmbedding"):
        build_embedder(folder)


def test_a_transformer_that_is_read_elsewhere_is_refused(tiny_llm, tmp_path):
    read = {"text": {"method": "forward", "method_output_name": ["hidden_states", -2]}}
    backbone = Transformer(tiny_llm, modality_config=read, module_output_name="token_embeddings")
    _, folder = saved(SentenceTransformer(modules=[backbone, Pooling(32)]), tmp_path)
    with pytest.raises(ConfigurationError, match="only text, read at the last layer"):
        build_embedder(folder)


def test_an_adapter_is_continued_and_trains(tiny_llm, tmp_path):
    model, folder = saved(scrambled(build_embedder(tiny_llm, peft_config={"r": 4})), tmp_path)
    for asked in (None, {"r": 4}):
        again = build_embedder(folder, peft_config=asked)
        assert_equal_vectors(again, model)
        trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(ConfigurationError, match=r"adapter with r=4, .*but r=16.*is asked for.*--merge"):
        build_embedder(folder, peft_config="paper")
    assert read_architecture(folder).model_type == "llama"


@pytest.mark.parametrize("changes", [{"num_attention_heads": 0}, {"num_attention_heads": "x"}, {"vocab_size": 10**10}])
def test_a_config_with_impossible_sizes_is_one_error_that_names_the_base(tiny_llm, tmp_path, changes):
    base = shutil.copytree(tiny_llm, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigurationError, match=r"base' cannot be (read|loaded)"):
        build_embedder(str(base), verify=False)


def test_code_of_its_folder_never_runs_unasked(own, tmp_path):
    _, folder = saved(build_embedder(own[1]), tmp_path)
    (tmp_path / "multi_layer_pooling.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigurationError, match=r"multi_layer_pooling\.py"):
        build_embedder(folder)


def test_a_base_that_is_nowhere_is_answered_with_what_a_base_may_be():
    with pytest.raises(
        ConfigurationError, match=r"'qwen' cannot be read: .*\. Name a folder .*, a Hub id, or builtin\.$"
    ):
        read_architecture("qwen")


def test_a_card_of_the_saved_embedder_is_not_taken_for_the_new_ones(own, tmp_path):
    _, folder = saved(build_embedder(own[1]), tmp_path / "first")
    (tmp_path / "first/README.md").write_text("---\ntags: []\n---\n# Somebody's card")
    _, second = saved(build_embedder(folder), tmp_path / "second")
    assert "Somebody's card" not in (Path(second) / "README.md").read_text()


def test_the_built_in_backbone_goes_by_its_name():
    assert build_embedder("builtin", pooling="mean", verify=False).encode(TEXTS).shape == (2, 192)


def test_a_plain_base_gets_the_default_design(tiny_llm):
    assert not is_saved_embedder(tiny_llm)
    model = build_embedder(tiny_llm)
    assert type(model[1]).__name__ == "MultiLayerPooling"
    assert (model[0].attention, model[0].layers, model[0].include_prompt) == ("bidirectional", [1, 2, 3, 4], True)


def test_a_module_list_that_cannot_be_read_is_refused_by_name(tiny_llm, tmp_path):
    folder = Path(save_tiny_llm(tmp_path, LlamaConfig(**{**TINY_CONFIG.to_dict(), "num_hidden_layers": 1})))
    content: Any
    for content in ([], {}, [{"path": ""}], None):
        (folder / "modules.json").write_text(json.dumps(content))
        with pytest.raises((ConfigurationError, InputError), match=r"modules\.json"):
            build_embedder(str(folder))


def test_one_without_its_module_list_is_not_taken_for_a_language_model(own, tmp_path):
    folder = shutil.copytree(own[1], tmp_path / "model")
    (folder / "modules.json").unlink()
    for options in ({}, {"pooling": "mean"}, {"pooling_init": "new"}):
        with pytest.raises(DataError, match=r"has a st_llmpool\.json and no modules\.json: save or download it again"):
            build_embedder(folder, **options)
    for trusted in (False, True):
        with pytest.raises(DataError, match=r"modules\.json is missing"):
            load_model(folder, trust_remote_code=trusted)


def test_a_prompt_that_leaves_no_room_is_named_at_once_and_refused_where_it_is_used(tiny_llm, caplog):
    model = build_embedder(tiny_llm, max_seq_length=16, prompts={"query": "Q:" * 10})
    assert "prompt 'query' will be refused in use" in caplog.text
    with pytest.raises(ConfigurationError, match=r"prompt 'Q:Q:.*takes.*max_seq_length=16"):
        model.encode_query(TEXTS)
    assert model.encode_document(TEXTS).shape == (2, 32)
