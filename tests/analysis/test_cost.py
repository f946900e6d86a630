from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from st_llmpool import build_embedder
from st_llmpool.analysis import cost
from st_llmpool.analysis.cost import Cost, _peak_of_tensors, measure_cost
from st_llmpool.modules.errors import ConfigurationError
from tests.conftest import TINY_CONFIG


@pytest.fixture(scope="module")
def mean_model(tiny_llm) -> SentenceTransformer:
    return build_embedder(tiny_llm, pooling="mean", verify=False)


def backbone_flops(tokens: int) -> int:
    """A Llama by hand: two operations for each weight that a token meets, and for each entry of QKᵀ and AV."""
    width, heads, shared = TINY_CONFIG.hidden_size, TINY_CONFIG.num_attention_heads, TINY_CONFIG.num_key_value_heads
    projections = width * width * 2 + width * (width // heads * shared) * 2
    feed_forward = 3 * width * TINY_CONFIG.intermediate_size
    attention = 2 * tokens * width
    return 2 * tokens * TINY_CONFIG.num_hidden_layers * (projections + feed_forward + attention)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_operations_are_those_of_the_formula(mean_model, tokens):
    (length,) = measure_cost(mean_model, lengths=[tokens], repeats=1).lengths
    # Old versions of torch count the angles of the rotary positions too, an outer product.
    angles = tokens * TINY_CONFIG.hidden_size // TINY_CONFIG.num_attention_heads
    assert length.flops - backbone_flops(tokens) in (0, angles)
    assert length.tokens == tokens
    assert length.latency_ms > 0


def test_pooling_adds_its_own_operations(tiny_llm, mean_model):
    model = build_embedder(tiny_llm, pooling="gem", pooling_kwargs={"readout_skip": True}, verify=False)
    width, tokens = TINY_CONFIG.hidden_size, 9
    (length,) = measure_cost(model, lengths=[tokens], repeats=1).lengths
    assert length.flops >= backbone_flops(tokens) + 2 * width * width  # U, and perhaps the means as products


def test_parameters_are_counted_where_they_belong(tiny_llm):
    model = build_embedder(tiny_llm, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), verify=False)
    cost = measure_cost(model, lengths=[4], repeats=1)
    width = TINY_CONFIG.hidden_size
    assert cost.adapter == TINY_CONFIG.num_hidden_layers * 2 * 2 * width
    assert cost.pooling == sum(weight.numel() for weight in model[1].parameters()) > 0
    assert cost.backbone + cost.adapter + cost.pooling == sum(weight.numel() for weight in model.parameters())


def test_a_length_that_the_model_cannot_read_gives_none_and_the_reason(mean_model):
    limit = mean_model.max_seq_length
    short, long = measure_cost(mean_model, lengths=[8, 4096], repeats=1).lengths
    assert short.flops is not None
    assert short.reason == ""
    assert (long.flops, long.latency_ms, long.peak_memory_mb) == (None, None, None)
    assert f"at most {limit} tokens" in long.reason
    assert mean_model.max_seq_length == limit


def test_a_kernel_that_hides_its_operations_gives_no_count(tiny_llm, monkeypatch):
    model = build_embedder(tiny_llm, pooling="mean", verify=False)
    monkeypatch.setattr(model[0].model.config, "_attn_implementation_internal", "flex_attention")
    monkeypatch.setattr(model, "encode", lambda *args, **kwargs: None)  # the kernel itself is not run here
    monkeypatch.setattr(cost, "_peak_memory", lambda *args: None)
    (length,) = measure_cost(model, lengths=[4], repeats=1).lengths
    assert length.flops is None
    assert "flex_attention" in length.reason


def test_measuring_leaves_the_model_as_it_was(tiny_llm):
    model = build_embedder(tiny_llm, pooling="multi_layer", verify=False)
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    cost = measure_cost(model, lengths=[4], repeats=1, training_batch=(2, 6))
    assert cost.training_step_ms > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_cost_is_plain_json_and_comes_back(mean_model):
    cost = measure_cost(mean_model, lengths=[4, 4096], repeats=1, training_batch=(2, 6))
    assert Cost.from_dict(json.loads(json.dumps(cost.to_dict(), allow_nan=False))) == cost


def test_peak_of_tensors_is_that_of_tensors_made_by_hand():
    def run():
        first = torch.empty(1_000_000)
        second = torch.empty(2_000_000)
        del first
        third = torch.empty(500_000)
        del second, third
        torch.empty(100)

    assert _peak_of_tensors(run) == 4 * 3_000_000


def test_peak_memory_grows_with_the_text(mean_model):
    short, long = (cost.peak_memory_mb for cost in measure_cost(mean_model, lengths=[4, 64], repeats=1).lengths)
    hidden = 64 * TINY_CONFIG.hidden_size * 4 / 2**20
    assert short < 2 * hidden < long


def test_wrong_numbers_are_refused(mean_model):
    with pytest.raises(ConfigurationError, match="must be positive"):
        measure_cost(mean_model, lengths=[0])
