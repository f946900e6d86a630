"""Batches run in groups of like length: the cheapest groups, and the same vectors."""

from __future__ import annotations

import copy
import math
import timeit

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import BertConfig

from st_llmpool.fast_inference import optimize_inference
from st_llmpool.fast_inference.length_groups import CPU_FORWARD_COST, length_groups, measure_forward_cost
from st_llmpool.modules.llm_transformer import LLMTransformer
from tests.modules.token_batches import assert_same, computed_tokens, id_batch, plain, switch_on

LENGTHS = [3, 60, 7, 4, 58, 30, 1, 31]


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def backbone(request: pytest.FixtureRequest, tiny_llm: str) -> LLMTransformer:
    backbone = LLMTransformer(tiny_llm, attention=request.param).eval()
    switch_on(backbone, "length groups")
    return backbone


def cost_of(groups: list[list[int]], lengths: list[int], cost: int) -> int:
    return sum(len(group) * max(lengths[text] for text in group) + cost for group in groups)


def all_partitions(texts: list[int]) -> list[list[list[int]]]:
    if not texts:
        return [[]]
    first, *rest = texts
    found = []
    for partition in all_partitions(rest):
        found.append([[first], *partition])
        for place, group in enumerate(partition):
            found.append([*partition[:place], [first, *group], *partition[place + 1 :]])
    return found


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), cost=st.integers(0, 60))
def test_no_other_groups_are_cheaper(lengths, cost):
    groups = length_groups(lengths, cost)
    assert sorted(text for group in groups for text in group) == list(range(len(lengths)))
    best = min(cost_of(partition, lengths, cost) for partition in all_partitions(list(range(len(lengths)))))
    assert cost_of(groups, lengths, cost) == best


@pytest.mark.parametrize("readout", ["eos", "mean"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_vectors_are_those_of_the_whole_batch(backbone, side, readout, monkeypatch):
    monkeypatch.setattr(backbone, "layer_readout", readout)
    for include_prompt in (True, False):
        monkeypatch.setattr(backbone, "include_prompt", include_prompt)
        for seed, extra in enumerate((0, 3)):
            features = id_batch(LENGTHS, side=side, extra=extra, seed=seed) | {"prompt_length": 4}
            with torch.no_grad(), computed_tokens(backbone) as shapes:
                outputs = backbone(features)
            assert_same(outputs, plain(backbone, features))
            computed = sum(rows * columns for rows, columns in shapes)
            best = length_groups(LENGTHS, CPU_FORWARD_COST)
            assert computed == cost_of(best, LENGTHS, 0) < 0.6 * features["input_ids"].numel()
            assert len(shapes) == len(best) > 1


@pytest.mark.parametrize("overhead", [0.0, 60.0, 1000.0, 4000.0])
def test_the_measured_overhead_is_the_true_one_rounded_up_to_a_power_of_two(overhead, monkeypatch):
    """A device that computes a token in each unit of time, after an overhead and, at first, a compilation."""
    now, seen = [0.0], set()

    def forward(texts, tokens):
        now[0] += 1e5  # to prepare a batch is no part of a forward

        def run():
            now[0] += overhead + texts * tokens + (0 if (texts, tokens) in seen else 1e6)
            seen.add((texts, tokens))

        return run

    repeat = timeit.repeat
    monkeypatch.setattr(timeit, "repeat", lambda *args, **kwargs: repeat(*args, timer=lambda: now[0], **kwargs))
    cost = measure_forward_cost(forward)
    assert math.log2(cost).is_integer()
    assert overhead / 1.2 < cost < 2.5 * overhead + 20


def compiling(backbone, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def quantised(backbone, monkeypatch):
    monkeypatch.setattr(backbone.model, "is_quantized", True, raising=False)


def spread(backbone, monkeypatch):
    monkeypatch.setattr(backbone.model, "hf_device_map", {"layers.0": 0, "layers.1": "cpu"}, raising=False)


def sharded_by_deepspeed(backbone, monkeypatch):
    monkeypatch.setattr(next(backbone.model.layers[0].parameters()), "ds_id", 1, raising=False)


def all_states_kept(backbone, monkeypatch):
    monkeypatch.setattr(backbone.model.config, "output_hidden_states", True)


def test_where_more_forwards_would_be_wrong_the_batch_is_whole(backbone, monkeypatch):
    features = id_batch(LENGTHS, shared=0)
    for change in (compiling, quantised, spread, sharded_by_deepspeed, all_states_kept):
        with monkeypatch.context() as patch, torch.no_grad(), computed_tokens(backbone) as shapes:
            change(backbone, patch)
            backbone(dict(features))
        assert shapes == [(8, 60)], change.__name__
    positions = {"position_ids": torch.arange(60)[None]}
    for more, kwargs in ((positions, {}), ({}, {"use_cache": False})):
        with torch.no_grad(), computed_tokens(backbone) as shapes:
            backbone({**features, **more}, **kwargs)
        assert shapes == [(8, 60)]
    with torch.no_grad(), computed_tokens(backbone) as shapes:
        backbone(dict(features))
    assert len(shapes) > 1


def test_offloaded_weights_are_fetched_once_for_a_batch(backbone):
    offloaded = copy.deepcopy(backbone)
    assert offloaded.batch_runner is not None
    cpu_offload(offloaded.model, execution_device=torch.device("cpu"))
    with torch.no_grad(), computed_tokens(offloaded) as shapes:
        offloaded(id_batch(LENGTHS))
    assert shapes == [(8, 60)]
    assert "on the meta device" in str(optimize_inference(offloaded))


def test_padding_on_both_sides_gradients_and_the_switch_leave_the_batch_whole(backbone, monkeypatch):
    right, left = (id_batch(LENGTHS, side=side) for side in ("right", "left"))
    both = {name: torch.cat([right[name], left[name]]) for name in right}
    with computed_tokens(backbone) as shapes:
        with torch.no_grad():
            backbone(both)
        backbone(right)  # with gradients
        with torch.no_grad():
            backbone.train()(right)
            backbone.eval()
            monkeypatch.setattr(backbone, "batch_runner", None)
            backbone(right)
    assert shapes == [(16, 60), (8, 60), (8, 60), (8, 60)]


def test_every_feature_with_an_entry_per_token_is_cut(make_llm):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    backbone = LLMTransformer(make_llm(BertConfig(**sizes))).eval()
    switch_on(backbone, "length groups")
    features = id_batch(LENGTHS)
    features["token_type_ids"] = torch.randint(0, 2, features["input_ids"].shape)
    with torch.no_grad(), computed_tokens(backbone) as shapes:
        outputs = backbone(features)
    assert len(shapes) > 1
    assert_same(outputs, plain(backbone, features))


def test_encode_gives_the_same_vectors_for_thousands_of_texts(backbone, monkeypatch):
    model = SentenceTransformer(modules=[backbone, Pooling(32, pooling_mode="mean")], device="cpu")
    words = "the quick brown fox jumps over the lazy dog " * 2
    texts = [words[n % 9 : n % 9 + 3 * n % 70] for n in range(2000)]
    fast = model.encode(texts, batch_size=64, convert_to_tensor=True)
    monkeypatch.setattr(backbone, "batch_runner", None)
    torch.testing.assert_close(fast, model.encode(texts, batch_size=64, convert_to_tensor=True), rtol=0, atol=1e-5)
