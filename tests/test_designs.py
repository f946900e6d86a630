"""build_embedder gives what was asked for, or says why not before any compute is spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig, Gemma3Config, PreTrainedConfig, Qwen2VLConfig, Qwen3NextConfig, T5Config

from st_llmpool import DESIGNS, POOLINGS, build_embedder, verify_attention
from st_llmpool.designs import PRESETS
from st_llmpool.modules import LLMTransformer, MultiLayerPooling
from st_llmpool.modules.errors import AttentionError, ConfigurationError, StLlmpoolError

TEXTS = ["fox", "the quick brown fox jumps over the lazy dog", ""]


@pytest.mark.parametrize("name", [name for name in DESIGNS if not name.startswith("paper-")])
def test_every_design_embeds_with_the_attention_that_it_names(tiny_llm, name):
    model = build_embedder(tiny_llm, **DESIGNS[name].as_kwargs())
    vectors = model.encode(TEXTS, convert_to_tensor=True)
    assert verify_attention(model).verdict == DESIGNS[name].attention
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


def test_the_papers_designs_use_its_sizes_and_no_skip():
    for name in ("paper-2", "paper-3", "paper-4", "paper-5"):
        spec = POOLINGS[DESIGNS[name].pooling]
        options = dict(DESIGNS[name].pooling_kwargs)
        sizes = {"num_layers": 2} if spec.reads == "layers" else {}
        with torch.device("meta"):
            module = spec.module(embedding_dimension=64, **sizes, **spec.resolved(options))
        assert (module.num_latents, module.num_heads, module.head_dim, module.mlp_ratio) == (768, 32, 2048, 4)
        assert not module.readout_skip


def test_given_sizes_win_over_the_preset():
    assert POOLINGS["multi_layer"].resolved({"preset": "paper", "num_latents": 2}) == PRESETS["paper"] | {
        "num_latents": 2
    }
    assert POOLINGS["multi_layer"].resolved({"preset": "compact"}) == {}


def test_modules_put_together_by_hand_give_the_same_model(tiny_llm):
    backbone = LLMTransformer(tiny_llm, attention="bidirectional")
    pooling = MultiLayerPooling(backbone.get_embedding_dimension(), num_layers=len(backbone.layers))
    by_hand = SentenceTransformer(modules=[backbone, pooling, Normalize()])
    built = build_embedder(tiny_llm, attention="bidirectional", pooling="multi_layer")
    torch.testing.assert_close(by_hand.encode(TEXTS), built.encode(TEXTS))


@pytest.mark.parametrize(("theirs", "ours"), [("lasttoken", "eos"), ("weightedmean", "weightedmean")])
def test_names_of_sentence_transformers_are_accepted(tiny_llm, theirs, ours):
    first, second = (build_embedder(tiny_llm, attention="causal", pooling=name) for name in (theirs, ours))
    torch.testing.assert_close(first.encode(TEXTS), second.encode(TEXTS))


def test_causal_eos_equals_plain_sentence_transformers(tiny_llm):
    ours = build_embedder(tiny_llm, attention="causal", pooling="eos")
    plain = SentenceTransformer(tiny_llm)
    ids = [ours.tokenizer(text)["input_ids"] for text in TEXTS]
    with torch.no_grad():
        states = [plain[0].model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
    expected = torch.nn.functional.normalize(torch.stack(states))
    torch.testing.assert_close(torch.tensor(ours.encode(TEXTS)), expected, rtol=0, atol=1e-6)


def test_chosen_layers_are_the_ones_that_are_read(tiny_llm):
    model = build_embedder(tiny_llm, layers=[-1, 2])
    assert model[0].layers == [2, 4]
    assert model[1].num_layers == 2


def test_prompts_are_saved_and_used(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm, prompts={"query": "the dog: ", "document": ""})
    model.save_pretrained(str(tmp_path))
    reloaded = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    torch.testing.assert_close(reloaded.encode_query(["fox"]), model.encode(["fox"], prompt="the dog: "))
    assert not torch.allclose(torch.tensor(model.encode_query(["fox"])), torch.tensor(model.encode(["fox"])), atol=1e-4)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", ["mean", "multi_layer"])
def test_an_adapter_only_save_keeps_attention_and_pooling(tiny_llm, tmp_path, attention, pooling):
    model = build_embedder(tiny_llm, attention=attention, pooling=pooling, peft_config="paper")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.startswith("1."):
                parameter += 0.1
    expected = model.encode(TEXTS)
    model.save_pretrained(str(tmp_path))
    reloaded = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    assert not (tmp_path / "model.safetensors").exists()
    assert verify_attention(reloaded).verdict == attention
    torch.testing.assert_close(reloaded.encode(TEXTS), expected, rtol=0, atol=1e-6)


def test_only_adapter_and_pooling_train(tiny_llm):
    model = build_embedder(tiny_llm, peft_config={"r": 2, "target_modules": ["q_proj"]})
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or name.startswith("1.") for name in trained)
    assert any("lora_" in name for name in trained)
    assert any(name.startswith("1.") for name in trained)


def test_an_encoder_takes_every_pooling(make_llm):
    folder = make_llm(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    )
    for pooling in sorted(POOLINGS):
        model = build_embedder(folder, attention="bidirectional", pooling=pooling)
        assert model.encode(TEXTS[:2]).shape == (2, 32)


def test_a_hybrid_is_refused_unless_partial_is_allowed_and_then_recorded(make_llm, tmp_path):
    config = Qwen3NextConfig(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    )
    folder = make_llm(config)
    with pytest.raises(AttentionError, match=r"partial.*layers 1-3"):
        build_embedder(folder, attention="bidirectional", pooling="mean")
    model = build_embedder(folder, attention="bidirectional", pooling="mean", allow_partial=True)
    assert model[0].causal_layers == [1, 2, 3]
    model.save_pretrained(str(tmp_path / "saved"))
    reloaded = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    assert reloaded[0].causal_layers == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "multilayer"}, "Did you mean 'multi_layer'"),
        ({"attention": "bidirectoinal"}, "Did you mean 'bidirectional'"),
        ({"pooling_kwargs": {"preset": "papper"}}, "Did you mean 'paper'"),
        ({"pooling_kwargs": {"latents": 3}}, "latents"),
        ({"layers": [5]}, "outside 1..4"),
        ({"layers": "some"}, "'all'"),
        ({"layer_readout": "first"}, "eos.*mean"),
        ({"max_seq_length": 129}, "at most 128"),
        ({"quantization_config": "nf5"}, "'nf4'"),
        ({"peft_config": "lora"}, "'paper'"),
        ({"peft_config": {"rank": 3}}, "rank"),
        ({"peft_config": {"target_modules": ["nowhere"]}}, "all-linear"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_way_out(tiny_llm, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        build_embedder(tiny_llm, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [5]}, r"layers=\[5\]: 5 is outside 1\.\.4"),
        ({"layers": "al"}, r"layers='al' is unknown"),
        ({"max_seq_length": 129}, r"max_seq_length=129 is beyond the 128 positions.*at most 128"),
        ({"processor_kwargs": {"model_max_length": 500}}, r"max_seq_length=500 is beyond the 128 positions"),
    ],
    ids=str,
)
def test_a_setting_that_does_not_fit_the_config_is_refused_before_weights_are_read(
    tiny_llm, monkeypatch, arguments, message
):
    monkeypatch.setattr(Transformer, "_load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigurationError, match=message):
        build_embedder(tiny_llm, **arguments)


TEXT_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT_TOWER |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 400, "max_position_embeddings": 128}
TEXT_TOWER |= {"pad_token_id": 0}


def gemma_with_eyes() -> PreTrainedConfig:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    tokens = {"image_token_index": 390, "boi_token_index": 391, "eoi_token_index": 392}
    return Gemma3Config(text_config=TEXT_TOWER, vision_config=vision, mm_tokens_per_image=4, **tokens)


def qwen_with_eyes() -> PreTrainedConfig:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tokens = {"image_token_id": 390, "video_token_id": 391, "vision_start_token_id": 392, "vision_end_token_id": 393}
    return Qwen2VLConfig(text_config={**TEXT_TOWER, "rope_parameters": rope}, vision_config=vision, **tokens)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("config", [gemma_with_eyes, qwen_with_eyes])
@pytest.mark.parametrize("processor_class", [None, "Gemma3Processor"])
def test_a_multimodal_base_without_an_image_processor_is_read_by_its_text_tower(
    make_llm, tmp_path, config, processor_class
):
    base = Path(make_llm(config()))
    if processor_class:
        file = base / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": processor_class}))
    model = build_embedder(str(base), pooling="multi_layer", device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    reloaded = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    texts = ["the quick fox", "dog", ""]
    assert torch.equal(*(found.encode(texts, convert_to_tensor=True) for found in (model, reloaded)))
    assert verify_attention(model).verdict == "bidirectional"


def test_an_encoder_decoder_is_refused(make_llm):
    folder = make_llm(T5Config(d_model=32, d_ff=32, num_layers=2, num_heads=2, d_kv=16))
    with pytest.raises(ConfigurationError, match="encoder-decoder"):
        build_embedder(folder)


def test_an_encoder_is_refused_causal_attention(make_llm):
    folder = make_llm(BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(ConfigurationError, match="bidirectional"):
        build_embedder(folder, attention="causal")


def test_weights_with_nan_are_refused_by_name(make_llm):
    folder = Path(make_llm())
    weights = load_file(folder / "model.safetensors")
    weights["layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StLlmpoolError, match="NaN"):
        build_embedder(str(folder))


def test_a_design_that_plain_pooling_serves_leaves_nothing_but_the_mode_to_the_config(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm, attention="bidirectional", pooling="mean")
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    assert isinstance(model[1], Pooling)
