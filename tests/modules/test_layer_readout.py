"""The readout equals `hidden_states[1:]` reduced by a slow loop, whatever way the model runs."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModel, BertConfig, DataCollatorWithFlattening, LlamaConfig

from st_llmpool import optimize_inference
from st_llmpool.modules.attention import decoder_layers
from st_llmpool.modules.errors import ConfigurationError, InputError
from st_llmpool.modules.layer_readout import _ACTIVE, TokenSpans, capture_layers, hook_layers, unflatten
from st_llmpool.modules.llm_transformer import LLMTransformer
from tests.modules.token_batches import computed_tokens, id_batch

TEXTS = ["fox", "the quick brown fox jumps over the lazy dog", "jumps over", "the lazy dog"]
# peft 0.21 itself reads the property that transformers 5.23 deprecates.
PEFT_WARNING = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
PADDINGS = ["left", "right", "both", "none"]


# --- references: Python loops, no masks, no hooks -------------------------------------------------------------------


def reduce_slowly(tokens: list[Tensor], readout: str, prompt_length: int = 0) -> Tensor:
    """One text's real tokens, each (D,), to (D,) in float64."""
    kept = tokens[prompt_length:] or tokens[-1:]
    if readout == "eos":
        return kept[-1].double()
    total = torch.zeros_like(kept[0], dtype=torch.float64)
    for token in kept:
        total = total + token.double()
    return total / len(kept)


def real_tokens(hidden: Tensor, mask: Tensor, text: int) -> list[Tensor]:
    return [hidden[text, place] for place in range(mask.shape[1]) if mask[text, place] == 1]


def reference(backbone: LLMTransformer, features: dict[str, Any], prompt_length: int = 0) -> Tensor:
    """Summaries (B, L, D) of all layers from the model's own `hidden_states`."""
    inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
    states = backbone.model(**inputs, output_hidden_states=True).hidden_states[1:]
    rows = [
        [
            reduce_slowly(real_tokens(state, features["attention_mask"], text), backbone.layer_readout, prompt_length)
            for state in states
        ]
        for text in range(len(features["input_ids"]))
    ]
    return torch.stack([torch.stack(row) for row in rows]).float()


def padded(backbone: LLMTransformer, texts: list[str], padding: str) -> dict[str, Any]:
    """Features of `texts` with padding where it is wanted; none takes one text only."""
    rows = [backbone.tokenizer(text)["input_ids"] for text in (texts[1:2] if padding == "none" else texts)]
    width = max(map(len, rows)) + (0 if padding == "none" else 3)
    ids, mask = [], []
    for number, row in enumerate(rows):
        missing = width - len(row)
        left = {"left": missing, "right": 0, "both": 1 + number % 2, "none": 0}[padding]
        ids.append([0] * left + row + [0] * (missing - left))
        mask.append([0] * left + [1] * len(row) + [0] * (missing - left))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "modality": "text"}


def on(device: str, features: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()}


def flat(rows: list[list[int]]) -> dict[str, Any]:
    """Flat features, as sentence-transformers makes them for FlashAttention."""
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True)
    features = collate([{"input_ids": row} for row in rows])
    features.pop("labels")
    return {**features, "modality": "text"}


def weighted_sum(summaries: Tensor) -> Tensor:
    """A loss in which every text, layer and dimension counts differently."""
    weights = torch.linspace(-1, 1, summaries.numel()).view_as(summaries)
    return (weights * summaries).sum()


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}


def checkpoint(backbone: LLMTransformer, *, use_reentrant: bool) -> None:
    # transformers 5.23 renamed it.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(backbone.model, name) for name in names if hasattr(backbone.model, name))(
        {"use_reentrant": use_reentrant}
    )
    assert decoder_layers(backbone.model)[0].gradient_checkpointing


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        difference = (actual[name] - gradient).abs().max() / gradient.abs().max()
        assert difference < 1e-4, f"{name}: {difference}"


@pytest.fixture(scope="module")
def loaded(tiny_llm: str) -> dict[str, LLMTransformer]:
    return {mode: LLMTransformer(tiny_llm, attention=mode).eval() for mode in ("causal", "bidirectional")}


@pytest.fixture
def load(loaded: dict[str, LLMTransformer]) -> Callable[..., LLMTransformer]:
    """`load(attention, **settings)` gives a fresh copy, faster than from files."""

    def copied(attention: str = "bidirectional", **settings: Any) -> LLMTransformer:
        module = copy.deepcopy(loaded[attention])
        for name, value in settings.items():
            setattr(module, name, value)
        return module

    return copied


@pytest.fixture
def backbone(load: Callable[..., LLMTransformer]) -> LLMTransformer:
    return load()


# --- TokenSpans on tensors ------------------------------------------------------------------------------------------

shapes = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(
    shapes=shapes,
    prompt_length=st.integers(0, 7),
    readout=st.sampled_from(["eos", "mean"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_padded_reduction_equals_a_slow_loop_whatever_stands_in_the_padding(shapes, prompt_length, readout, dtype):
    width = max(sum(shape) for shape in shapes)
    mask = torch.zeros(len(shapes), width, dtype=torch.long)
    hidden = torch.full((len(shapes), width, 3), float("nan"), dtype=dtype)
    for text, (left, length, _) in enumerate(shapes):
        mask[text, left : left + length] = 1
        hidden[text, left : left + length] = torch.randn(length, 3).to(dtype)
    spans = TokenSpans.of({"attention_mask": mask, "prompt_length": prompt_length}, include_prompt=False)
    expected = [reduce_slowly(real_tokens(hidden, mask, t), readout, prompt_length) for t in range(len(shapes))]
    result = spans.reduce(hidden, readout)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.stack(expected).float(), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    prompt_length=st.integers(0, 7),
    readout=st.sampled_from(["eos", "mean"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_flat_reduction_equals_a_slow_loop(lengths, prompt_length, readout, dtype):
    texts = [torch.randn(length, 3).to(dtype) for length in lengths]
    features = flat([[0] * length for length in lengths]) | {"prompt_length": torch.tensor([prompt_length])}
    spans = TokenSpans.of(features, include_prompt=False)
    expected = torch.stack([reduce_slowly(list(text), readout, prompt_length) for text in texts])
    result = spans.reduce(torch.cat(texts)[None], readout)
    assert spans.text is not None
    torch.testing.assert_close(result, expected.float(), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), prompt_length=st.integers(0, 7))
def test_compact_flat_features_hold_the_tokens_after_the_prompt_and_no_others(lengths, prompt_length):
    texts = [torch.randn(length, 2) for length in lengths]
    features = flat([[0] * length for length in lengths]) | {"prompt_length": prompt_length}
    features["token_embeddings"] = torch.cat(texts)[None]
    compact = TokenSpans.of(features, include_prompt=False).compact(features)
    kept = [
        text[prompt_length:] if length > prompt_length else text[-1:]
        for text, length in zip(texts, lengths, strict=True)
    ]
    torch.testing.assert_close(compact["token_embeddings"][0], torch.cat(kept))
    assert compact["cu_seq_lens_q"].diff().tolist() == [len(text) for text in kept]
    assert compact["cu_seq_lens_q"].dtype == torch.int32
    assert compact["seq_idx"][0].tolist() == [number for number, text in enumerate(kept) for _ in text]
    assert "prompt_length" not in compact


def test_compact_padded_features_mask_the_prompt_and_leave_the_input_alone():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
    features = {"attention_mask": mask, "prompt_length": 2, "token_embeddings": torch.zeros(3, 4, 1)}
    compact = TokenSpans.of(features, include_prompt=False).compact(features)
    assert compact["attention_mask"].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert mask.tolist() == [[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]]
    assert features["prompt_length"] == 2


def test_the_prompt_counts_when_it_is_included():
    features = {"attention_mask": torch.tensor([[0, 1, 1, 1]]), "prompt_length": 2}
    assert TokenSpans.of(features).mask.tolist() == [[False, True, True, True]]


def test_spans_need_a_mask_or_offsets():
    with pytest.raises(KeyError, match="attention_mask"):
        TokenSpans.of({"input_ids": torch.tensor([[1]])})


@pytest.mark.parametrize("readout", ["eos", "mean"])
def test_masked_tokens_get_no_gradient(readout):
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    TokenSpans.of({"attention_mask": mask}).reduce(hidden, readout).square().sum().backward()
    assert hidden.grad[mask == 0].abs().max() == 0
    assert hidden.grad[0, 2].abs().min() > 0


def test_long_texts_keep_their_precision_in_half_precision():
    tokens = (torch.rand(1, 4096, 2) + 4).to(torch.float16)  # their sum is beyond float16's largest number / 4
    mean = TokenSpans.of({"attention_mask": torch.ones(1, 4096)}).reduce(tokens, "mean")
    torch.testing.assert_close(mean, tokens.double().mean(dim=1).float(), rtol=1e-5, atol=0)


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_unflatten_pads_each_text_on_the_right(lengths):
    texts = [torch.randn(length, 2) for length in lengths]
    offsets = flat([[0] * length for length in lengths])["cu_seq_lens_q"]
    tokens, mask = unflatten(torch.cat(texts)[None], offsets)
    assert tokens.shape == (len(lengths), max(lengths), 2)
    assert mask.sum(dim=1).tolist() == lengths
    for number, text in enumerate(texts):
        torch.testing.assert_close(tokens[number, : len(text)], text)
        assert tokens[number, len(text) :].abs().sum() == 0
        assert mask[number].tolist() == [True] * len(text) + [False] * (max(lengths) - len(text))


# --- a model, run in every way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("prompt_length", [0, 2, 50])
@pytest.mark.parametrize("readout", ["eos", "mean"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@torch.no_grad()
def test_summaries_equal_hidden_states_reduced(load, attention, readout, prompt_length, padding):
    backbone = load(attention=attention, layer_readout=readout, include_prompt=False)
    features = padded(backbone, TEXTS, padding)
    expected = reference(backbone, features, prompt_length)
    result = backbone({**features, "prompt_length": prompt_length})
    torch.testing.assert_close(result["layer_summaries"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result["readout"], expected[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("readout", ["eos", "mean"])
@torch.no_grad()
def test_a_text_has_the_same_summaries_under_every_padding(load, readout):
    backbone = load(layer_readout=readout)
    alone = backbone(padded(backbone, TEXTS, "none"))["layer_summaries"][0]
    for padding in ("left", "right", "both"):
        batch = backbone(padded(backbone, TEXTS, padding))["layer_summaries"][1]
        torch.testing.assert_close(batch, alone, rtol=1e-5, atol=1e-5)


def separated(features: dict[str, Any], *, causal: bool) -> dict[str, Any]:
    """Flat features with a mask (1, 1, N, N) that keeps the texts apart, as FlashAttention does by their offsets."""
    text = torch.repeat_interleave(features["cu_seq_lens_q"].diff().long())
    allowed = text[:, None] == text[None, :]
    return features | {"attention_mask": (allowed.tril() if causal else allowed)[None, None]}


@pytest.mark.parametrize("prompt_length", [0, 3])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("readout", ["eos", "mean"])
@torch.no_grad()
def test_flat_input_has_the_summaries_of_padded_input(load, readout, attention, prompt_length):
    backbone = load(attention=attention, layer_readout=readout, include_prompt=False)
    rows = [backbone.tokenizer(text)["input_ids"] for text in TEXTS]
    result = backbone({**separated(flat(rows), causal=attention == "causal"), "prompt_length": prompt_length})
    expected = reference(backbone, padded(backbone, TEXTS, "right"), prompt_length)
    torch.testing.assert_close(result["layer_summaries"], expected, rtol=1e-5, atol=1e-5)
    assert result["token_embeddings"].shape[1] == sum(max(len(row) - prompt_length, 1) for row in rows)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("way", ["sdpa", "eager", "no positions", "fast inference"])
@torch.no_grad()
def test_flat_texts_that_the_attention_would_mix_are_refused(tiny_llm, attention, way):
    """Without positions even a mask does not help: the second text would start at the position after the first."""
    loading = {"attn_implementation": "eager"} if way == "eager" else {}
    backbone = LLMTransformer(tiny_llm, attention=attention, model_kwargs=loading).eval()
    features = flat([backbone.tokenizer(text)["input_ids"] for text in TEXTS])
    if way == "no positions":
        features = separated(features, causal=attention == "causal")
        del features["position_ids"]
    if way == "fast inference":
        optimize_inference(backbone)
    with pytest.raises(InputError, match=rf"Flat input of {len(TEXTS)} texts.*Pad them"):
        backbone(features)


@pytest.mark.parametrize("readout", ["eos", "mean"])
@torch.no_grad()
def test_one_flat_text_is_read_bidirectionally(load, readout):
    backbone = load(attention="bidirectional", layer_readout=readout)
    expected = reference(backbone, padded(backbone, TEXTS, "none"))
    result = backbone(flat([backbone.tokenizer(TEXTS[1])["input_ids"]]))
    torch.testing.assert_close(result["layer_summaries"], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_the_chosen_layers_are_read(tiny_llm):
    backbone = LLMTransformer(tiny_llm, layers=[-1, 2]).eval()
    features = padded(backbone, TEXTS, "left")
    summaries = backbone(features)["layer_summaries"]
    torch.testing.assert_close(summaries, reference(backbone, features)[:, [1, 3]], rtol=1e-5, atol=1e-5)
    assert "layer_summaries" not in LLMTransformer(tiny_llm, layers=[])(features)


@torch.no_grad()
def test_without_gradients_a_hook_keeps_one_vector_per_text(backbone):
    features = padded(backbone, TEXTS, "both")
    with capture_layers(TokenSpans.of(features), "mean") as capture:
        backbone.model(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
    assert {number: tuple(output.shape) for number, output in capture.outputs.items()} == dict.fromkeys(
        (1, 2, 3), (4, 32)
    )


@pytest.mark.parametrize("trainable", [False, True])
def test_in_training_a_hook_keeps_tokens_only_where_autograd_keeps_them_too(backbone, trainable):
    backbone.model.requires_grad_(trainable)
    features = padded(backbone, TEXTS, "both")
    seen = []
    hooked = decoder_layers(backbone.model)[0].register_forward_hook(lambda *_: seen.append(_ACTIVE.get()))
    backbone(features)
    hooked.remove()
    assert {output.dim() for output in seen[0].outputs.values()} == {3 if trainable else 2}


def test_hooks_do_nothing_outside_a_capture_and_are_added_once(backbone):
    layers = decoder_layers(backbone.model)
    hook_layers(layers, [1, 2, 3, 4])
    assert [len(layer._forward_hooks) for layer in layers] == [1, 1, 1, 0]
    backbone.model(input_ids=torch.tensor([[3, 4]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_backbones_give_float32_summaries(load, dtype, device):
    backbone = load().to(device, dtype)
    features = on(device, padded(backbone, TEXTS, "left"))
    result = backbone(features)
    assert result["token_embeddings"].dtype == dtype
    assert result["layer_summaries"].dtype == result["readout"].dtype == torch.float32
    torch.testing.assert_close(result["layer_summaries"], reference(backbone, features), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("readout", ["eos", "mean"])
@torch.no_grad()
def test_an_encoder_is_read_like_a_decoder(make_llm, readout):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    backbone = LLMTransformer(make_llm(BertConfig(**sizes)), layer_readout=readout).eval()
    features = padded(backbone, TEXTS, "right")
    torch.testing.assert_close(
        backbone(features)["layer_summaries"], reference(backbone, features), rtol=1e-5, atol=1e-5
    )


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("readout", ["eos", "mean"])
def test_gradient_checkpointing_changes_no_gradient(load, readout, use_reentrant, device):
    plain, checkpointed = (load(layer_readout=readout).to(device).train() for _ in range(2))
    checkpoint(checkpointed, use_reentrant=use_reentrant)
    features = on(device, padded(plain, TEXTS, "both"))
    expected, actual = plain(features)["layer_summaries"], checkpointed(features)["layer_summaries"]
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(
        gradients(checkpointed, weighted_sum(actual)),
        gradients(plain, weighted_sum(expected)),
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(load, use_reentrant):
    def adapted() -> LLMTransformer:
        module = load(layer_readout="mean").train()
        torch.manual_seed(0)
        module.model.add_adapter(LoraConfig(target_modules="all-linear", init_lora_weights=False))
        return module

    plain, checkpointed = adapted(), adapted()
    checkpoint(checkpointed, use_reentrant=use_reentrant)
    checkpointed.model.enable_input_require_grads()
    features = padded(plain, TEXTS, "right")
    assert_same_gradients(
        gradients(checkpointed, weighted_sum(checkpointed(features)["layer_summaries"])),
        gradients(plain, weighted_sum(plain(features)["layer_summaries"])),
    )


def test_gradients_are_those_of_hidden_states(backbone):
    features = padded(backbone, TEXTS, "left")
    assert_same_gradients(
        gradients(backbone, weighted_sum(backbone(features)["layer_summaries"])),
        gradients(backbone, weighted_sum(reference(backbone, features))),
    )


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_several_forwards_may_precede_one_backward(backbone, checkpointing):
    batches = [padded(backbone, TEXTS[:2], "left"), padded(backbone, TEXTS[2:], "right")]
    alone = [gradients(backbone, weighted_sum(backbone(batch)["layer_summaries"])) for batch in batches]
    expected = {name: alone[0][name] + alone[1][name] for name in alone[0]}
    backbone.train()
    if checkpointing is not None:
        checkpoint(backbone, use_reentrant=checkpointing)
    losses = [weighted_sum(backbone(batch)["layer_summaries"]) for batch in batches]
    assert_same_gradients(gradients(backbone, sum(losses)), expected)


# --- wrappers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_distributed_data_parallel_changes_no_gradient(backbone):
    features = padded(backbone, TEXTS, "both")
    expected = gradients(backbone, weighted_sum(backbone(features)["layer_summaries"]))
    wrapped = nn.parallel.DistributedDataParallel(backbone)
    assert_same_gradients(gradients(backbone, weighted_sum(wrapped(features)["layer_summaries"])), expected)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_fully_sharded_data_parallel_changes_no_gradient(backbone, checkpointing):
    features = padded(backbone, TEXTS, "both")
    summaries = backbone(features)["layer_summaries"]
    expected = gradients(backbone, weighted_sum(summaries))
    mesh = init_device_mesh("cpu", (1,))
    for layer in decoder_layers(backbone.model):
        fully_shard(layer, mesh=mesh)
    model = fully_shard(SentenceTransformer(modules=[backbone], device="cpu"), mesh=mesh).train()
    if checkpointing is not None:
        checkpoint(backbone, use_reentrant=checkpointing)
    result = model(features)["layer_summaries"]
    torch.testing.assert_close(result, summaries)
    actual = gradients(backbone, weighted_sum(result))
    assert_same_gradients({name: gradient.full_tensor() for name, gradient in actual.items()}, expected)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("way", ["fully_shard", "flat", "flat, original parameters"])
def test_every_rank_runs_a_sharded_model_once_for_a_batch(tiny_llm, way):
    backbone = LLMTransformer(tiny_llm).eval()
    layers = decoder_layers(backbone.model)
    if way == "fully_shard":
        for layer in layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    else:
        policy = ModuleWrapPolicy({type(layers[0])})
        FullyShardedDataParallel(
            backbone, auto_wrap_policy=policy, use_orig_params="original" in way, device_id=torch.device("cpu")
        )
    with torch.no_grad(), computed_tokens(backbone) as shapes:
        backbone(id_batch([3, 60, 7, 4, 58, 30, 1, 31]))
    assert shapes == [(8, 60)]


@pytest.mark.parametrize("what", ["backbone", "model"])
def test_compiling_changes_no_summary_and_no_gradient(make_llm, what, device):
    torch._dynamo.reset()
    compiler = "aot_eager" if device == "cpu" else "inductor"
    small = LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
    backbone = LLMTransformer(make_llm(small)).eval()
    model = SentenceTransformer(modules=[backbone], device=device).eval()
    batches = [on(device, padded(backbone, *batch)) for batch in ((TEXTS, "both"), (TEXTS[2:], "right"))]
    expected = [model(batch)["layer_summaries"] for batch in batches]
    expected_gradients = gradients(backbone, weighted_sum(expected[0]))
    if what == "model":
        model.compile(backend=compiler, dynamic=True)
    else:
        backbone.model = torch.compile(backbone.model, backend=compiler, dynamic=True)
    for batch, summaries in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(batch)["layer_summaries"], summaries, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(batch)["layer_summaries"], summaries, rtol=1e-5, atol=1e-5)
    actual = gradients(backbone, weighted_sum(model(batches[0])["layer_summaries"]))
    actual = {name.replace("_orig_mod.", ""): gradient for name, gradient in actual.items()}
    assert_same_gradients(actual, expected_gradients)


@PEFT_WARNING
@pytest.mark.parametrize("wrap", ["add_adapter", "get_peft_model"])
def test_an_adapted_backbone_is_read_and_stays_bidirectional(backbone, wrap):
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    if wrap == "add_adapter":
        backbone.model.add_adapter(config)
    else:
        backbone.model = get_peft_model(backbone.model, config)
    backbone.eval()
    features = padded(backbone, TEXTS, "left")
    with torch.no_grad():
        torch.testing.assert_close(
            backbone(features)["layer_summaries"], reference(backbone, features), rtol=1e-5, atol=1e-5
        )
    # Bidirectional: the first token's last layer depends on the last token.
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    first, second = backbone({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["token_embeddings"][:, 0]
    assert (first - second).abs().max() > 1e-4


def test_a_backbone_put_in_later_is_read_with_the_same_attention(backbone, tiny_llm):
    backbone.model = AutoModel.from_pretrained(tiny_llm)
    features = padded(backbone, TEXTS, "left")
    with torch.no_grad():
        before = reference(backbone, features)  # causal, as a fresh model is
        summaries = backbone(features)["layer_summaries"]
        after = reference(backbone, features)
    torch.testing.assert_close(summaries, after, rtol=1e-5, atol=1e-5)
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_reads_its_own_layers(backbone, copied):
    twin = copied(backbone)
    assert [len(layer._forward_hooks) for layer in decoder_layers(twin.model)] == [1, 1, 1, 0]
    with torch.no_grad():
        decoder_layers(twin.model)[0].mlp.down_proj.weight.zero_()
    for module in (backbone, twin):
        features = padded(module, TEXTS, "left")
        with torch.no_grad():
            torch.testing.assert_close(
                module(features)["layer_summaries"], reference(module, features), rtol=1e-5, atol=1e-5
            )


def test_a_pickled_model_gives_the_same_vectors_in_another_process(backbone, tmp_path):
    model = SentenceTransformer(modules=[backbone, Pooling(32)], device="cpu")
    buffer = io.BytesIO()
    pickle.dump((model, TEXTS), buffer)
    (tmp_path / "model.bin").write_bytes(buffer.getvalue())
    code = (
        "import pickle, sys, torch\n"
        "model, texts = pickle.load(open(sys.argv[1], 'rb'))\n"
        "torch.save(model.encode(texts, convert_to_tensor=True, show_progress_bar=False), sys.argv[2])\n"
    )
    output = tmp_path / "vectors.pt"
    command = [sys.executable, "-c", code, str(tmp_path / "model.bin"), str(output)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    expected = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(torch.load(output), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_pool_of_worker_processes_gives_the_same_vectors(backbone):
    model = SentenceTransformer(modules=[backbone, Pooling(32)], device="cpu")
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        vectors = model.encode(TEXTS, pool=pool, chunk_size=2)
    finally:
        model.stop_multi_process_pool(pool)
    torch.testing.assert_close(torch.tensor(vectors), torch.tensor(model.encode(TEXTS)), rtol=1e-5, atol=1e-6)


def test_two_threads_may_read_one_model(backbone):
    batches = [padded(backbone, TEXTS, "left"), padded(backbone, TEXTS[2:] * 3, "right")]
    with torch.no_grad():
        expected = [backbone(batch)["layer_summaries"] for batch in batches]
    # Both threads are in the same layer at the same time, so state on the module would mix them.
    meeting = threading.Barrier(2, timeout=60)

    def meet(*_: Any) -> None:
        meeting.wait()

    for layer in decoder_layers(backbone.model):
        layer.register_forward_pre_hook(meet)
    results: dict[int, Tensor] = {}

    def read(number: int) -> None:
        with torch.no_grad():
            results[number] = backbone(batches[number])["layer_summaries"]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, summaries in enumerate(expected):
        torch.testing.assert_close(results[number], summaries, rtol=1e-5, atol=1e-5)


def test_an_error_in_one_forward_leaves_no_trace_in_the_next(backbone):
    features = padded(backbone, TEXTS, "left")
    with pytest.raises(IndexError):
        backbone({**features, "input_ids": features["input_ids"] + 10_000})
    assert _ACTIVE.get() is None
    with torch.no_grad():
        torch.testing.assert_close(
            backbone(features)["layer_summaries"], reference(backbone, features), rtol=1e-5, atol=1e-5
        )


def test_layers_that_return_tuples_are_read():
    class TupleLayer(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
            return hidden * 2, None

    layers = [TupleLayer(), TupleLayer()]
    hook_layers(layers, [1, 2])
    hidden = torch.randn(1, 3, 2)
    spans = TokenSpans.of({"attention_mask": torch.tensor([[1, 1, 0]])})
    with torch.no_grad(), capture_layers(spans, "eos") as capture:
        last = layers[1](layers[0](hidden)[0])[0]
    torch.testing.assert_close(
        capture.summaries(last, [1, 2], num_layers=2)[0], torch.stack([hidden[0, 1] * 2, hidden[0, 1] * 4])
    )


def test_layers_of_several_streams_are_refused_by_name():
    layers = [nn.Identity(), nn.Identity()]
    hook_layers(layers, [1, 2])
    spans = TokenSpans.of({"attention_mask": torch.tensor([[1, 1, 0]])})
    with capture_layers(spans, "mean"), pytest.raises(ConfigurationError, match=r"Identity returns.*layers=\[\]"):
        layers[0](torch.randn(4, 1, 3, 2))


def test_a_deep_model_reads_every_layer(make_llm):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=36)
    backbone = LLMTransformer(make_llm(config)).eval()
    features = padded(backbone, TEXTS[:2], "right")
    with torch.no_grad():
        torch.testing.assert_close(
            backbone(features)["layer_summaries"], reference(backbone, features), rtol=1e-4, atol=1e-5
        )
