"""The backbone module: settings, prompts, EOS in the embedding, saving, and what it refuses."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from transformers import AutoModel, BertConfig, BitsAndBytesConfig, GPT2Config, T5Config

from st_llmpool.attention_proof import attention_of
from st_llmpool.modules.errors import AttentionError, ConfigurationError, InputError, StLlmpoolError
from st_llmpool.modules.llm_transformer import LLMTransformer, resolve_layers
from st_llmpool.modules.seal import times_of_files, write_seal
from tests.conftest import tiny_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog"
TINY_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def shared(tiny_llm: str) -> LLMTransformer:
    """Read only."""
    return LLMTransformer(tiny_llm).eval()


@pytest.fixture
def weights_must_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded before the setting was checked")

    monkeypatch.setattr(Transformer, "_load_model", refuse)


def embedder(backbone: LLMTransformer, mode: str = "mean") -> SentenceTransformer:
    return SentenceTransformer(modules=[backbone, Pooling(32, pooling_mode=mode)], device="cpu")


def encode(model: SentenceTransformer, texts: list[str], **kwargs: Any) -> Tensor:
    return model.encode(texts, convert_to_tensor=True, **kwargs)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attention", "readout"), [("causal", "eos"), ("bidirectional", "mean")])
def test_the_readout_follows_the_attention_unless_it_is_given(tiny_llm, attention, readout):
    assert LLMTransformer(tiny_llm, attention=attention).layer_readout == readout
    assert attention_of(LLMTransformer(tiny_llm, attention=attention).model) == attention
    other = "mean" if readout == "eos" else "eos"
    assert LLMTransformer(tiny_llm, attention=attention, layer_readout=other).layer_readout == other


def test_every_setting_survives_saving_and_loading(tiny_llm, tmp_path):
    given = {
        "attention": "causal",
        "layers": [-1, 2],
        "layer_readout": "mean",
        "include_prompt": False,
        "max_seq_length": 16,
    }
    backbone = LLMTransformer(tiny_llm, **given).eval()
    backbone.save(str(tmp_path))
    saved = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    reloaded = LLMTransformer.load(str(tmp_path)).eval()
    expected = {**given, "layers": [2, 4], "add_eos_token": True}
    assert {name: getattr(reloaded, name) for name in expected} == expected
    assert {name: saved[name] for name in expected if name != "max_seq_length"} == {
        name: value for name, value in expected.items() if name != "max_seq_length"
    }
    features = backbone.preprocess([WORDS, "fox"])
    with torch.no_grad():
        torch.testing.assert_close(reloaded(features)["layer_summaries"], backbone(features)["layer_summaries"])


def test_an_adapter_alone_is_saved_with_everything_that_the_embedding_depends_on(tiny_llm, tmp_path):
    backbone = LLMTransformer(tiny_llm, attention="bidirectional", layers=[2, 3], layer_readout="eos").eval()
    backbone.model.add_adapter(LoraConfig(target_modules="all-linear", init_lora_weights=False))
    backbone.eval()
    backbone.save(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    reloaded = LLMTransformer.load(str(tmp_path)).eval()
    assert attention_of(reloaded.model) == "bidirectional"
    features = backbone.preprocess([WORDS, "fox"])
    with torch.no_grad():
        torch.testing.assert_close(reloaded(features)["layer_summaries"], backbone(features)["layer_summaries"])


# peft 0.21 itself reads the property that transformers 5.23 deprecates.
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "whole"])
def test_either_name_of_the_dtype_decides_at_load(tiny_llm, tmp_path, name, adapted):
    backbone = LLMTransformer(tiny_llm)
    if adapted:
        backbone.model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    embedder(backbone).save_pretrained(str(tmp_path))
    options = {"trust_remote_code": True, "model_kwargs": {name: torch.bfloat16}}
    assert SentenceTransformer(str(tmp_path), **options)[0].model.dtype == torch.bfloat16
    assert LLMTransformer(tiny_llm, model_kwargs={name: torch.bfloat16}).model.dtype == torch.bfloat16


def _rename(weights: dict[str, Tensor]) -> None:
    weights["base_model.model.layers.0.mlp.other.lora_A.weight"] = weights.pop(min(weights))


def _add(weights: dict[str, Tensor]) -> None:
    weights["base_model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 32)


def _drop(weights: dict[str, Tensor]) -> None:
    del weights[min(weights)]


def _widen(weights: dict[str, Tensor]) -> None:
    weights[min(weights)] = torch.ones(3, 32)


@pytest.mark.parametrize("damage", [_rename, _add, _drop, _widen])
def test_an_adapter_that_does_not_fit_is_refused_by_the_name_of_a_weight(tiny_llm, tmp_path, damage):
    backbone = LLMTransformer(tiny_llm)
    backbone.model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    model = embedder(backbone)
    model.save_pretrained(str(tmp_path))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    write_seal(tmp_path, model, times_of_files(tmp_path))
    with pytest.raises(ValueError, match=r"does not fit its LlamaModel in \d weights: layers.*lora_A"):
        SentenceTransformer(str(tmp_path), trust_remote_code=True)


def test_what_is_saved_does_not_depend_on_what_was_encoded_before(tiny_llm, tmp_path):
    model = embedder(LLMTransformer(tiny_llm))
    model.save_pretrained(str(tmp_path / "fresh"))
    encode(model, ["fox", WORDS])
    model.save_pretrained(str(tmp_path / "used"))
    fresh, used = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("fresh", "used"))
    assert fresh == used
    assert json.loads(fresh)["truncation"] is json.loads(fresh)["padding"] is None


def _in_pool(model: SentenceTransformer, texts: list[str], dim: int) -> Tensor:
    pool = model.start_multi_process_pool(["cpu"])
    try:
        return model.encode(texts, truncate_dim=dim, pool=pool, convert_to_tensor=True)
    finally:
        model.stop_multi_process_pool(pool)


@pytest.mark.parametrize("dim", [1, 16, 32, 99])
def test_cut_vectors_of_a_model_that_normalises_have_length_one(tiny_llm, tmp_path, dim):
    model = SentenceTransformer(modules=[LLMTransformer(tiny_llm), Pooling(32), Normalize()], device="cpu")
    expected = torch.nn.functional.normalize(encode(model, ["fox", WORDS])[:, :dim])
    torch.testing.assert_close(encode(model, ["fox", WORDS], truncate_dim=dim), expected)
    torch.testing.assert_close(torch.tensor(model.encode_query("fox", truncate_dim=dim)), expected[0])
    rows = model.encode(["fox", WORDS], truncate_dim=dim, output_value=None)
    torch.testing.assert_close(torch.stack([row["sentence_embedding"] for row in rows]), expected)
    with model.truncate_embeddings(dim):
        torch.testing.assert_close(encode(copy.deepcopy(model), ["fox", WORDS]), expected)
        torch.testing.assert_close(encode(pickle.loads(pickle.dumps(model)), ["fox", WORDS]), expected)
        model.save_pretrained(str(tmp_path))
    torch.testing.assert_close(
        encode(SentenceTransformer(str(tmp_path), trust_remote_code=True), ["fox", WORDS]), expected
    )
    if dim == 16:
        torch.testing.assert_close(_in_pool(model, ["fox", WORDS], dim), expected)


def test_cut_vectors_of_a_model_that_does_not_normalise_stay_as_they_are(shared):
    model = embedder(shared)
    torch.testing.assert_close(encode(model, ["fox"], truncate_dim=8), encode(model, ["fox"])[:, :8])


@pytest.mark.parametrize("dim", [0, -1, 2.5, "16", True])
def test_a_number_of_dimensions_that_is_none_is_refused(tiny_llm, dim):
    backbone = LLMTransformer(tiny_llm, layers=[], verify=False)
    model = SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension())], device="cpu")
    with pytest.raises(ConfigurationError, match="truncate_dim"):
        model.encode(["fox"], truncate_dim=dim)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_only_safetensors_are_written(tiny_llm, tmp_path):
    backbone = LLMTransformer(tiny_llm)
    backbone.model = get_peft_model(backbone.model, LoraConfig(target_modules="all-linear"))
    backbone.save(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.pt")]


def test_a_chat_template_of_the_base_does_not_wrap_texts(make_llm, shared):
    tokenizer = tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}user: {{ m['content'] }}{% endfor %}"
    backbone = LLMTransformer(make_llm(tokenizer=tokenizer))
    assert backbone.preprocess([WORDS])["input_ids"].tolist() == shared.preprocess([WORDS])["input_ids"].tolist()


def test_an_encoder_is_bidirectional_and_gets_no_eos_of_ours(make_llm):
    backbone = LLMTransformer(make_llm(BertConfig(**TINY_BERT))).eval()
    assert (backbone.add_eos_token, backbone.num_layers) == (False, 2)
    ids = backbone.preprocess(["fox"])["input_ids"]
    assert backbone.tokenizer.eos_token_id not in ids[0].tolist()
    for readout in ("eos", "mean"):
        backbone.layer_readout = readout
        assert torch.isfinite(backbone(backbone.preprocess([WORDS, "fox"]))["layer_summaries"]).all()


@given(number_of_layers=st.integers(1, 40), data=st.data())
def test_layers_count_from_one_or_from_the_end(number_of_layers, data):
    order = list(range(1, number_of_layers + 1))
    chosen = data.draw(st.lists(st.sampled_from(order), unique=True))
    spelled = [data.draw(st.sampled_from([layer, layer - number_of_layers - 1])) for layer in chosen]
    assert resolve_layers(spelled, number_of_layers) == sorted(chosen)
    for layer in spelled:
        assert resolve_layers([layer], number_of_layers) == [order[layer - 1 if layer > 0 else layer]]
    assert resolve_layers("all", number_of_layers) == order


@given(number_of_layers=st.integers(1, 40), beyond=st.integers(1, 5))
def test_layers_outside_the_model_or_named_twice_are_refused(number_of_layers, beyond):
    for layers in ([0], [number_of_layers + beyond], [-number_of_layers - beyond]):
        with pytest.raises(ConfigurationError, match=rf"is outside 1\.\.{number_of_layers}\. .*'all'"):
            resolve_layers(layers, number_of_layers)
    for layers in ([1, 1], [number_of_layers, -1]):
        with pytest.raises(ConfigurationError, match="twice"):
            resolve_layers(layers, number_of_layers)


@pytest.mark.parametrize("layers", [["1"], [True], [1.0], [None], list(range(10**6))])
def test_layers_of_a_damaged_config_are_refused_in_few_words(layers):
    with pytest.raises(ConfigurationError, match="layers") as refusal:
        resolve_layers(layers, 12)
    assert len(str(refusal.value)) < 200


def test_a_config_with_a_million_layers_is_refused_before_they_are_built(tiny_llm, tmp_path):
    shutil.copytree(tiny_llm, tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**6}))
    with pytest.raises(ConfigurationError, match=r"asks for 1,000,000 layers; at most 2,000 fit"):
        LLMTransformer(str(tmp_path / "llm"))


def test_no_keys_and_values_are_cached(tiny_llm):
    backbone = LLMTransformer(tiny_llm)
    assert backbone.model(input_ids=torch.tensor([[3, 4]])).past_key_values is None
    backbone.model = AutoModel.from_pretrained(tiny_llm)
    backbone(backbone.preprocess(["fox"]))
    assert backbone.model(input_ids=torch.tensor([[3, 4]])).past_key_values is None


def test_layers_in_4_bits_compute_alike_before_and_after_an_inference(tiny_llm):
    """On CPUs with bf16 instructions bitsandbytes repacks them, loses digits, and trains on what it has repacked."""
    quantised = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    backbone = LLMTransformer(tiny_llm, model_kwargs=quantised)
    whole = LLMTransformer(tiny_llm, model_kwargs=quantised)
    whole.model = whole.model.dequantize()
    features = {
        name: value.to(backbone.model.device)
        for name, value in backbone.preprocess(["fox", WORDS]).items()
        if isinstance(value, torch.Tensor)
    }
    expected = whole(dict(features))["token_embeddings"]
    for mode in (False, True):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                found = backbone.train(mode)(dict(features))["token_embeddings"]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- EOS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "fox", WORDS, WORDS * 20])
def test_a_text_of_any_length_ends_in_eos(tiny_llm, text):
    backbone = LLMTransformer(tiny_llm, max_seq_length=12)
    features = backbone.preprocess([text, "the dog"])
    last = int(features["attention_mask"][0].nonzero()[-1])
    assert features["input_ids"][0, last] == backbone.tokenizer.eos_token_id
    assert features["input_ids"].shape[1] <= 12


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_an_empty_text_embeds_and_changes_no_batch_mate(tiny_llm, attention):
    model = embedder(LLMTransformer(tiny_llm, attention=attention))
    together = encode(model, ["", WORDS, "fox", ""])
    assert torch.isfinite(together).all()
    alone = torch.cat([encode(model, [text]) for text in ["", WORDS, "fox", ""]])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_padding_with_the_eos_token_masks_no_eos(make_llm):
    backbone = LLMTransformer(make_llm(tokenizer=tiny_tokenizer(eos_token="<eos>")), layer_readout="eos").eval()
    assert backbone.tokenizer.pad_token_id == backbone.tokenizer.eos_token_id
    texts = ["fox", WORDS, "<eos>", ""]
    with torch.no_grad():
        together = backbone(backbone.preprocess(texts))["layer_summaries"]
        alone = torch.cat([backbone(backbone.preprocess([text]))["layer_summaries"] for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


# --- prompts --------------------------------------------------------------------------------------------------------


def mean_without_prompt(backbone: LLMTransformer, prompt: str, text: str) -> Tensor:
    """(D,): the mean of the last layer over EOS and the tokens that reach beyond the prompt's last visible letter."""
    encoded = backbone.tokenizer(prompt + text, return_offsets_mapping=True, return_special_tokens_mask=True)
    states = backbone.model(input_ids=torch.tensor([encoded["input_ids"]])).last_hidden_state[0]
    places = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    kept = [place for place, ((_, end), special) in enumerate(places) if special or end > len(prompt.rstrip())]
    return torch.stack([states[place] for place in kept]).mean(dim=0)


words = st.sampled_from(["fox", "the lazy", "1 dog", "(quick"]) | st.text("abcdefghijklmnop 123(", max_size=20).map(
    str.strip
)


@settings(deadline=None, max_examples=40)
@given(
    prompt=st.sampled_from(["query: ", "Instruct: find\nQuery:", "the fox: ", "q:\n"]),
    texts=st.lists(words, min_size=1, max_size=3),
)
def test_excluding_the_prompt_excludes_its_tokens_and_no_others(shared, prompt, texts):
    texts = [text or "x" for text in texts]
    shared.include_prompt = False
    try:
        with torch.no_grad():
            features = shared(shared.preprocess(texts, prompt=prompt))
            expected = torch.stack([mean_without_prompt(shared, prompt, text) for text in texts])
    finally:
        shared.include_prompt = True
    torch.testing.assert_close(features["readout"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pooling_of_sentence_transformers_sees_no_prompt_either(tiny_llm, side):
    backbone = LLMTransformer(tiny_llm)
    backbone.tokenizer.padding_side = side
    model = embedder(backbone)
    texts, prompt = [WORDS, "fox"], "query: "
    with torch.no_grad():
        without = torch.stack([mean_without_prompt(backbone, prompt, text) for text in texts])
    included = encode(model, texts, prompt=prompt)
    model.set_pooling_include_prompt(False)
    assert backbone.include_prompt is False
    excluded = encode(model, texts, prompt=prompt)
    torch.testing.assert_close(excluded, without, rtol=1e-5, atol=1e-5)
    assert (excluded - included).abs().max() > 1e-4
    model.set_pooling_include_prompt(True)
    torch.testing.assert_close(encode(model, texts, prompt=prompt), included)


@pytest.mark.parametrize("prompt", ["query:", WORDS])
def test_a_prompt_that_covers_the_whole_text_leaves_eos(tiny_llm, prompt):
    backbone = LLMTransformer(tiny_llm, include_prompt=False, max_seq_length=32).eval()
    features = backbone.preprocess([""], prompt=prompt)
    assert features["input_ids"][0, -1] == backbone.tokenizer.eos_token_id
    with torch.no_grad():
        result = backbone(features)
    assert result["attention_mask"].sum() == 1
    torch.testing.assert_close(result["readout"][0], result["token_embeddings"][0, -1])


@pytest.mark.parametrize(("length", "spare"), [(32, 7), (32, 8), (12, 7), (12, 8)])
def test_a_prompt_leaves_eight_tokens_to_the_text_or_is_refused(tiny_llm, length, spare):
    backbone = LLMTransformer(tiny_llm, max_seq_length=length)
    prompt = "!" * (length - spare - 1)  # a token each, and EOS
    if spare >= 8:
        assert backbone.preprocess([WORDS * 2], prompt=prompt)["input_ids"].shape == (1, length)
        return
    with pytest.raises(ConfigurationError, match=rf"'!!.*takes {length - 7} tokens.*max_seq_length={length}.*or more"):
        embedder(backbone).encode(["fox"], prompt=prompt)
    backbone.max_seq_length = length + 1
    embedder(backbone).encode(["fox"], prompt=prompt)


def test_a_model_with_bos_excludes_bos_with_the_prompt(make_llm):
    from tokenizers import processors

    tokenizer = tiny_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=special)
    backbone = LLMTransformer(make_llm(tokenizer=tokenizer), include_prompt=False)
    features = backbone.preprocess(["fox"], prompt="query: ")
    kept = backbone(features)["attention_mask"].bool()
    tokens = backbone.tokenizer.convert_ids_to_tokens(features["input_ids"][kept])
    assert "".join(tokens) == "Ġfox<eos>"


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "bidirectoinal"}, r"attention='bidirectoinal' is unknown.*Did you mean 'bidirectional'"),
        ({"attention": None}, r"attention=None is unknown"),
        ({"layer_readout": "maen"}, r"layer_readout='maen' is unknown.*Did you mean 'mean'"),
        ({"layers": "al"}, r"layers='al' is unknown.*Did you mean 'all'"),
        ({"layers": [5]}, r"layers=\[5\]: 5 is outside 1\.\.4.*'all'"),
        ({"layers": [0]}, r"layers=\[0\]: 0 is outside 1\.\.4"),
        ({"layers": [2, -3]}, r"-3 names a layer twice"),
        ({"backend": "onnx"}, r"backend='onnx' is unknown.*'torch'"),
        ({"backend": "openvino"}, r"backend='openvino' is unknown.*'torch'"),
        ({"max_seq_length": 129}, r"max_seq_length=129 is beyond the 128 positions.*at most 128"),
        ({"processor_kwargs": {"model_max_length": 500}}, r"max_seq_length=500 is beyond the 128 positions"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(tiny_llm, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        LLMTransformer(tiny_llm, **settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("include_prompt", value) for value in ("no", 1, None, [])),
        *(("add_eos_token", value) for value in ("no", 0)),
        *(("layers", value) for value in ("1", 1, True, {"1": 1})),
        *(("causal_layers", value) for value in ("no", 1, [9])),
        *(("do_lower_case", "no"), ("unpad_inputs", "no")),
    ],
)
def test_text_where_a_boolean_or_a_list_belongs_is_refused_at_load_in_one_line(shared, tmp_path, field, value):
    shared.save(str(tmp_path))
    file = tmp_path / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ConfigurationError, match=r"^(\w+=.* is unknown|layers=.* is outside)") as refusal:
        LLMTransformer.load(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_weights_that_the_base_of_an_adapter_lacks_are_never_drawn_at_random(make_llm, tmp_path):
    base = Path(make_llm())
    backbone = LLMTransformer(str(base))
    backbone.model.add_adapter(LoraConfig(r=2, target_modules="all-linear"))
    backbone.save(str(tmp_path))
    LLMTransformer.load(str(tmp_path))
    weights = load_file(base / "model.safetensors")
    save_file({name: weights[name] for name in weights if "layers.1.mlp" not in name}, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its LlamaModel in 3 weights: layers\.1\.mlp.*: none"):
        LLMTransformer.load(str(tmp_path))


@pytest.mark.usefixtures("weights_must_not_load")
def test_a_saved_model_refuses_other_backends_before_weights_are_read(shared, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.undo()
        shared.save(str(tmp_path))
    with pytest.raises(ConfigurationError, match="backend='onnx' is unknown"):
        LLMTransformer.load(str(tmp_path), backend="onnx")


@pytest.mark.usefixtures("weights_must_not_load")
def test_an_encoder_decoder_is_refused_before_weights_are_read(make_llm):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ConfigurationError, match=r"is an encoder-decoder \(t5\).*Use a decoder"):
        LLMTransformer(make_llm(T5Config(**sizes)))


def test_an_encoder_cannot_be_causal(make_llm):
    with pytest.raises(ConfigurationError, match=r"is an encoder.*Use attention='bidirectional'"):
        LLMTransformer(make_llm(BertConfig(**TINY_BERT)), attention="causal")


def test_a_base_without_tokenizer_is_refused(make_llm):
    folder = Path(make_llm())
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ConfigurationError, match=r"tokenizer.*Save one"):
        LLMTransformer(str(folder))


def test_an_eos_readout_needs_an_eos_token(make_llm):
    folder = make_llm(tokenizer=tiny_tokenizer(pad_token="<pad>"))
    with pytest.raises(ConfigurationError, match=r"add_eos_token=True, but .* has no EOS token"):
        LLMTransformer(folder, attention="causal")
    with pytest.raises(ConfigurationError, match=r"layer_readout='eos', but the tokenizer has no EOS.*use 'mean'"):
        LLMTransformer(folder, attention="causal", add_eos_token=False)
    assert LLMTransformer(folder, layer_readout="mean", add_eos_token=False).layer_readout == "mean"


def test_a_model_of_absolute_positions_refuses_longer_texts(make_llm):
    folder = make_llm(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32))
    with pytest.raises(ConfigurationError, match="beyond the 32 positions"):
        LLMTransformer(folder, max_seq_length=33)
    backbone = LLMTransformer(folder)
    assert backbone.max_seq_length == 32
    assert torch.isfinite(backbone(backbone.preprocess([WORDS * 10]))["readout"]).all()


def test_the_length_cannot_be_set_beyond_the_positions_later(tiny_llm):
    model = embedder(LLMTransformer(tiny_llm))
    model.max_seq_length = 128
    with pytest.raises(ConfigurationError, match="max_seq_length=129 is beyond the 128 positions"):
        model.max_seq_length = 129


@pytest.mark.parametrize("wrong", [5, None, 1.5, b"bytes", ("a", "pair"), {"text": "fox"}], ids=str)
def test_inputs_that_are_not_strings_are_refused_by_name(shared, wrong):
    with pytest.raises(InputError, match=rf"^{re.escape(repr(wrong))} is of type {type(wrong).__name__}.*pass str"):
        shared.preprocess(["a text", wrong])


@pytest.mark.parametrize("wrong", [5, None, ("a", "pair")], ids=str)
def test_encode_refuses_inputs_that_are_not_strings(shared, wrong):
    # encode sorts by length, so the message names the input itself rather than a place in the batch.
    with pytest.raises(InputError, match=rf"^{re.escape(repr(wrong))} is of type .*pass str"):
        embedder(shared).encode(["a much longer text", wrong])


@pytest.mark.parametrize("place", ["text", "prompt"])
def test_half_a_character_is_refused_with_the_text_that_holds_it(shared, place):
    texts, prompt = (["fine", "a \ud83d b"], None) if place == "text" else (["fine"], "a \ud83d b")
    with pytest.raises(InputError, match=r"'a \\ud83d b' holds the lone surrogate.*position 2.*Clean it"):
        encode(embedder(shared), texts, prompt=prompt)


def test_a_text_without_tokens_is_refused_with_the_way_out(tiny_llm):
    backbone = LLMTransformer(tiny_llm, add_eos_token=False)
    with pytest.raises(InputError, match=r"^'' has no token.*add_eos_token=True"):
        embedder(backbone).encode(["fox", ""])


def test_every_error_is_of_one_family_and_of_the_python_kind_that_fits():
    assert issubclass(ConfigurationError, StLlmpoolError)
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(InputError, StLlmpoolError)
    assert issubclass(InputError, ValueError)


def test_nothing_is_logged_as_a_warning_by_a_plain_use(tiny_llm, caplog):
    with caplog.at_level(logging.WARNING):
        encode(embedder(LLMTransformer(tiny_llm)), ["fox", WORDS], prompt="query: ")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("st_llmpool")] == []


def test_the_module_works_as_the_first_of_a_plain_list_of_modules(tiny_llm):
    model = SentenceTransformer(
        modules=[LLMTransformer(tiny_llm, attention="causal"), Pooling(32, "lasttoken")], device="cpu"
    )
    features = model(model.preprocess([WORDS, "fox"]))
    torch.testing.assert_close(features["sentence_embedding"], features["readout"])
    assert model.get_embedding_dimension() == 32
    assert model.modalities == ["text"]


# --- token embeddings, and what encode leaves as it was -------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("include_prompt", [True, False])
def test_token_embeddings_are_one_row_for_each_token_of_the_text(tiny_llm, side, include_prompt):
    model = embedder(LLMTransformer(tiny_llm, include_prompt=include_prompt))
    model.tokenizer.padding_side = side
    texts, prompt = ["the quick fox", "a lazy dog sleeps near tall trees", "dog"], "find this:"
    rows = model.encode(texts, prompt=prompt, output_value="token_embeddings")
    prompt_length = model[0]._get_prompt_length(prompt)
    full = model.tokenizer([prompt + text for text in texts])["input_ids"]
    kept = [len(ids) - (0 if include_prompt else prompt_length) for ids in full]
    assert [len(row) for row in rows] == kept
    for row, text, count in zip(rows, texts, kept, strict=True):  # as the text alone, without any padding
        alone = model.encode([text], prompt=prompt, output_value="token_embeddings")[0]
        assert len(alone) == count
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)


def test_encode_changes_neither_config_nor_hooks_nor_what_they_see(tiny_llm):
    model = embedder(LLMTransformer(tiny_llm))
    shapes = []
    model[0].model.layers[1].register_forward_hook(lambda layer, args, output: shapes.append(tuple(output.shape[:2])))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    config = copy.deepcopy(model[0].config)
    model.encode(["the quick fox " * 8, "dog"])
    assert shapes == [(2, max(map(len, model.tokenizer(["the quick fox " * 8])["input_ids"])))]
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert (model[0].config, model[0].config._attn_implementation) == (config, config._attn_implementation)


def test_verify_false_skips_the_check_at_load_and_a_failed_check_is_an_error(tiny_llm, monkeypatch):
    monkeypatch.setattr("st_llmpool.modules.llm_transformer.set_attention", lambda model, mode: None)
    with pytest.raises(AttentionError, match="should be bidirectional but is causal"):
        LLMTransformer(tiny_llm)
    assert LLMTransformer(tiny_llm, verify=False).attention == "bidirectional"
