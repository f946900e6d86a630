"""Switching attention, finding layers, and the corrections that a few families need."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import AutoModel

from st_llmpool.attention_proof import attention_of
from st_llmpool.modules.attention import (
    decoder_layers,
    find_backbone,
    is_encoder,
    needs_position_ids,
    position_ids_from,
    set_attention,
    text_config,
)
from st_llmpool.modules.errors import AttentionError, ConfigurationError
from tests.architecture_zoo import build, small_config

TEXT = torch.arange(20, 30)[None]


@torch.no_grad()
def states(model: nn.Module, ids: Tensor = TEXT, **inputs: Any) -> Tensor:
    return model(input_ids=ids, use_cache=False, **inputs).last_hidden_state


def moved_by(model: nn.Module, position: int, ids: Tensor = TEXT, **inputs: Any) -> list[int]:
    """Positions whose vector changes when the token at `position` does."""
    other = ids.clone()
    other[0, position] += 50
    change = (states(model, ids, **inputs) - states(model, other, **inputs)).abs().amax(-1)[0]
    return (change > 1e-6).nonzero().flatten().tolist()


# --- switching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 3])
def test_a_token_sees_what_follows_it_only_in_bidirectional_mode(padding):
    """Padded input gets a mask from the model, input without padding none: two paths."""
    model = build("llama", "sdpa")
    ids = torch.cat([TEXT, torch.full((1, padding), 7)], 1)
    mask = torch.tensor([[1] * 10 + [0] * padding])
    assert moved_by(model, 5, ids, attention_mask=mask)[:5] == [5, 6, 7, 8, 9]
    set_attention(model, "bidirectional")
    assert moved_by(model, 5, ids, attention_mask=mask)[:10] == list(range(10))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("llama", "sdpa"),
        ("gpt2", "sdpa"),
        ("gpt_neo", "eager"),
        ("openai-gpt", "eager"),
        ("llama4_text", "sdpa"),
        ("gemma3_text", "eager"),
    ],
)
def test_going_back_to_causal_gives_the_same_vectors_bit_for_bit(name, implementation):
    model = build(name, implementation)
    mask = torch.ones_like(TEXT)
    before, saved = states(model, attention_mask=mask), model.config.to_dict()
    set_attention(model, "bidirectional")
    assert not torch.equal(states(model, attention_mask=mask), before)
    set_attention(model, "causal")
    assert torch.equal(states(model, attention_mask=mask), before)
    assert model.config.to_dict() == saved


def test_setting_a_mode_twice_is_setting_it_once():
    model = build("gpt_neo", "eager")
    set_attention(model, "bidirectional")
    once, hooks = states(model), len(model._forward_pre_hooks)
    set_attention(model, "bidirectional")
    assert torch.equal(states(model), once)
    assert len(model._forward_pre_hooks) == hooks


def test_the_mode_can_be_read_back():
    model = build("llama", "sdpa")
    assert attention_of(model) == "causal"
    set_attention(model, "bidirectional")
    assert attention_of(model) == "bidirectional"
    assert attention_of(build("bert", "sdpa")) == "bidirectional"


def test_an_unknown_mode_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigurationError, match="Did you mean 'bidirectional'"):
        set_attention(build("llama", "sdpa"), "bidirectoinal")


def test_an_encoder_is_left_as_it_is_and_cannot_become_causal():
    model = build("bert", "sdpa")
    saved, before = model.config.to_dict(), states(model)
    set_attention(model, "bidirectional")
    assert model.config.to_dict() == saved
    assert torch.equal(states(model), before)
    with pytest.raises(ConfigurationError, match="is an encoder"):
        set_attention(model, "causal")


def test_bert_built_as_a_decoder_counts_as_one():
    config = small_config("bert")
    config.is_decoder = True
    model = AutoModel.from_config(config).eval()
    assert not is_encoder(text_config(model))
    set_attention(model, "bidirectional")
    assert moved_by(model, 9)[0] == 0


def test_embedding_gemma_keeps_its_window():
    """Its masks already look both ways; a second flag would widen them by one token to each side."""
    model = build("gemma3_text+bidirectional", "sdpa")
    ids, mask = torch.arange(20, 50)[None], torch.ones(1, 30, dtype=torch.long)
    before = states(model, ids, attention_mask=mask)
    set_attention(model, "bidirectional")
    assert torch.equal(states(model, ids, attention_mask=mask), before)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ConfigurationError, match="is an encoder-decoder"):
        set_attention(build("t5", "eager"), "bidirectional")


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon+alibi"])
def test_alibi_is_refused_in_both_directions_only(name):
    model = build(name, "eager")
    set_attention(model, "causal")
    with pytest.raises(AttentionError, match="ALiBi"):
        set_attention(model, "bidirectional")
    assert attention_of(model) == "causal"


def test_a_falcon_without_alibi_is_not_refused():
    model = build("falcon", "sdpa")
    set_attention(model, "bidirectional")
    assert moved_by(model, 9)[0] == 0


def test_the_vision_tower_of_a_multimodal_model_is_not_touched():
    model = build("llava", "sdpa")
    tower = model.vision_tower
    vision = {name: module.is_causal for name, module in tower.named_modules() if hasattr(module, "is_causal")}
    assert set(vision.values()) == {False}
    set_attention(model, "bidirectional")
    assert model.config.get_text_config().is_causal is False
    set_attention(model, "causal")
    assert vision == {name: module.is_causal for name, module in tower.named_modules() if hasattr(module, "is_causal")}
    assert "is_causal" not in vars(model.config)
    assert "is_causal" not in vars(model.config.get_text_config())


# --- corrections ----------------------------------------------------------------------------------------------------


def test_a_causal_buffer_becomes_a_band_to_both_sides():
    model = build("gpt_neo", "eager")
    set_attention(model, "bidirectional")
    everywhere, band = (layer.attn.attention.bias[0, 0] for layer in model.h)
    assert everywhere.all()
    places = torch.arange(len(band))
    assert torch.equal(band, (places[:, None] - places).abs() < small_config("gpt_neo").window_size)


def one_chunked_layer() -> nn.Module:
    config = small_config("llama4_text")
    config.num_hidden_layers, config.layer_types, config.attention_chunk_size = 1, ["chunked_attention"], 4
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation="sdpa").eval()


def test_a_token_of_a_chunked_layer_sees_its_own_chunk_and_no_other():
    model = one_chunked_layer()
    set_attention(model, "bidirectional")
    mask = torch.ones_like(TEXT)
    assert moved_by(model, 5, attention_mask=mask) == [4, 5, 6, 7]
    assert moved_by(model, 9, attention_mask=mask) == [8, 9]
    assert moved_by(model, 2, TEXT[:, :4]) == [0, 1, 2, 3]


def test_chunks_are_counted_from_the_first_real_token():
    model = one_chunked_layer()
    set_attention(model, "bidirectional")
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]])
    assert [place for place in moved_by(model, 5, attention_mask=mask) if place >= 3] == [3, 4, 5, 6]


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "ctrl", "biogpt", "openai-gpt", "xglm"])
def test_left_padding_does_not_move_absolute_positions(name, mode):
    model = build(name, "eager")
    assert needs_position_ids(model)
    alone = states(model, attention_mask=torch.ones_like(TEXT)) if mode == "causal" else None
    set_attention(model, mode)
    alone = states(model, attention_mask=torch.ones_like(TEXT)) if alone is None else alone
    mask = torch.tensor([[0] * 4 + [1] * 10])
    padded = states(model, torch.cat([torch.full((1, 4), 7), TEXT], 1), attention_mask=mask)
    torch.testing.assert_close(padded[:, 4:], alone, rtol=1e-5, atol=1e-6)


def test_left_padding_does_not_move_the_positions_of_bert():
    model = build("bert", "sdpa")
    alone = states(model)
    set_attention(model, "bidirectional")
    mask = torch.tensor([[0] * 4 + [1] * 10])
    padded = states(model, torch.cat([torch.zeros(1, 4).long(), TEXT], 1), attention_mask=mask)
    torch.testing.assert_close(padded[:, 4:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gptj", "roberta", "opt"])
def test_counted_positions_change_nothing_without_padding(name):
    """Families that need no counting either are not counted for or do not mind it."""
    model = build(name, "eager")
    before = states(model, attention_mask=torch.ones_like(TEXT))
    if not is_encoder(text_config(model)):
        set_attention(model, "causal")
    assert torch.equal(states(model, attention_mask=torch.ones_like(TEXT)), before)


def test_rotary_and_self_counting_families_need_no_position_ids():
    assert not any(needs_position_ids(build(name, "eager")) for name in ("llama", "roberta", "mamba", "gemma2"))


def test_position_ids_of_the_caller_win():
    model = build("gpt2", "sdpa")
    set_attention(model, "causal")
    given_ids = torch.arange(3, 13)[None]
    inputs = {"attention_mask": torch.ones_like(TEXT)}
    assert not torch.equal(states(model, position_ids=given_ids, **inputs), states(model, **inputs))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=4))
@settings(deadline=None)
def test_positions_count_the_real_tokens_of_each_text(shapes):
    width = max(sum(shape) for shape in shapes)
    rows = [[0] * (width - real - right) + [1] * real + [0] * right for _, real, right in shapes]
    positions = position_ids_from(torch.tensor(rows)).tolist()
    for row, counted in zip(rows, positions, strict=True):
        real = [position for position, token in zip(counted, row, strict=True) if token]
        assert real == list(range(len(real)))
        assert min(counted) >= 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_corrections_survive_copying_and_pickling(copied):
    model = build("gpt2", "sdpa")
    set_attention(model, "bidirectional")
    other = copied(model)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    assert torch.equal(states(other, attention_mask=mask), states(model, attention_mask=mask))
    set_attention(other, "causal")
    assert attention_of(model) == "bidirectional"


# --- finding things -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "openai-gpt", "opt", "mpt", "gemma3n_text", "mamba", "bert", "llava", "llama4", "mixtral"],
)
def test_there_are_as_many_decoder_layers_as_the_config_says(name):
    model = build(name, "eager")
    assert len(decoder_layers(model)) == model.config.get_text_config(decoder=True).num_hidden_layers


def test_the_layers_of_a_multimodal_model_are_those_of_its_language_model():
    model = build("llava", "sdpa")
    assert decoder_layers(model) is model.language_model.layers


def test_experts_are_not_taken_for_layers():
    config = small_config("jetmoe")
    model = AutoModel.from_config(config).eval()
    assert decoder_layers(model) is model.layers


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_a_lora_wrapped_model_is_switched_and_has_the_same_layers():
    model = build("llama", "sdpa")
    layers = decoder_layers(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    assert decoder_layers(wrapped) is layers
    set_attention(wrapped, "bidirectional")
    assert moved_by(wrapped, 9)[0] == 0


def test_a_sentence_transformer_is_switched_through_its_first_module(tiny_llm):
    model = SentenceTransformer(tiny_llm, device="cpu")
    assert find_backbone(model) is model[0].auto_model
    set_attention(model, "bidirectional")
    assert attention_of(model[0]) == "bidirectional"


def test_a_model_without_a_language_model_is_refused():
    with pytest.raises(ConfigurationError, match="No transformers model inside Linear"):
        set_attention(nn.Linear(2, 2), "causal")


def test_a_model_whose_layers_cannot_be_found_is_refused():
    model = build("llama", "sdpa")
    model.config.num_hidden_layers = 7
    with pytest.raises(ConfigurationError, match="No list of 7 layers"):
        decoder_layers(model)
