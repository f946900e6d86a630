"""Texts run without padding through a kernel for different lengths: the same vectors, or not used and said so.

The kernel of CPUs is compared with plain attention under masks, and through whole models; that of CUDA through whole
models, on a GPU.
"""

from __future__ import annotations

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BambaConfig,
    BertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    RobertaConfig,
)

from st_llmpool import build_embedder, optimize_inference, verify_attention
from st_llmpool.analysis.cost import measure_cost
from st_llmpool.attention_proof import PACKED_SDPA
from st_llmpool.fast_inference import packing
from st_llmpool.fast_inference.length_groups import NotApplicable
from st_llmpool.fast_inference.packing import Texts
from st_llmpool.modules.llm_transformer import LLMTransformer
from tests.conftest import save_tiny_llm
from tests.fast_inference.test_shared_start import SIZES
from tests.modules.token_batches import assert_same, computed_tokens, id_batch, plain, switch_on

LENGTHS = [3, 60, 7, 4, 58, 30, 1, 31]
ENCODER = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "granite": GraniteConfig(**SIZES, attention_multiplier=0.9),
    "bert": BertConfig(**ENCODER),
    "roberta": RobertaConfig(**ENCODER, pad_token_id=1),
}
MODES = [
    (name, mode)
    for name, config in CONFIGS.items()
    for mode in ("causal", "bidirectional")
    if mode == "bidirectional" or not isinstance(config, BertConfig | RobertaConfig)
]


def text_by_text(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, window: tuple[int, int], scale: float | None
) -> Tensor:
    """What a kernel computes, from the documentation of CUDA's: windows of keys to the left and right, -1 for all."""
    found = []
    for start, end in zip(texts.offsets[:-1].tolist(), texts.offsets[1:].tolist(), strict=True):
        assert end - start <= texts.longest
        distance = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= distance >= -window[0] if window[0] >= 0 else seen
        seen &= distance <= window[1] if window[1] >= 0 else seen
        one, keys, values = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
        out = F.scaled_dot_product_attention(one, keys, values, attn_mask=seen, scale=scale, enable_gqa=True)
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (0, 0), (3, 0), (3, 3), (6, 0), (6, 6), (7, 7), (100, 0)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_the_kernel_of_cpus_is_attention_within_each_text_and_window(window, groups, scale):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 7, 3, 8, 20])
    texts = Texts(F.pad(lengths.cumsum(0), (1, 0)).int(), 20)
    query, key, value = (torch.randn(39, heads, 8) for heads in (4, 4 // groups, 4 // groups))
    found = packing._text_by_text(query, key, value, texts, window, scale)
    torch.testing.assert_close(found, text_by_text(query, key, value, texts, window, scale), rtol=0, atol=1e-6)
    assert found.is_contiguous()


def run(backbone: LLMTransformer, features: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    with torch.no_grad(), computed_tokens(backbone) as shapes:
        return backbone(features), shapes


@pytest.fixture(
    scope="module",
    params=MODES,
    ids="-".join,
)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLMTransformer:
    name, mode = request.param
    folder = save_tiny_llm(tmp_path_factory.mktemp(name), copy.deepcopy(CONFIGS[name]))
    backbone = LLMTransformer(folder, attention=mode).eval()
    switch_on(backbone, "packing")
    return backbone


@pytest.fixture
def llama(tiny_llm: str) -> LLMTransformer:
    backbone = LLMTransformer(tiny_llm, attention="bidirectional").eval()
    switch_on(backbone, "packing")
    return backbone


@pytest.mark.parametrize("readout", ["eos", "mean"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_vectors_are_those_of_the_padded_batch_and_no_padding_is_computed(backbone, side, readout, monkeypatch):
    monkeypatch.setattr(backbone, "layer_readout", readout)
    for include_prompt in (True, False):
        monkeypatch.setattr(backbone, "include_prompt", include_prompt)
        features = id_batch(LENGTHS, side=side, extra=2) | {"prompt_length": 4}
        expected = plain(backbone, features)
        outputs, shapes = run(backbone, features)
        assert shapes == [(1, sum(LENGTHS))]
        assert_same(outputs, expected)
        assert not outputs["token_embeddings"][~features["attention_mask"].bool()].any()
    assert_same(plain(backbone, features), expected)  # padded forwards of a model that was packed


def test_batches_without_padding_and_flat_ones_are_left(llama):
    assert run(llama, id_batch([9, 9, 9]))[1] == [(3, 9)]


def test_every_feature_with_an_entry_per_token_is_packed(make_llm):
    backbone = LLMTransformer(make_llm(BertConfig(**ENCODER))).eval()
    switch_on(backbone, "packing")
    features = id_batch(LENGTHS)
    features["token_type_ids"] = torch.randint(0, 2, features["input_ids"].shape)
    outputs, shapes = run(backbone, features)
    assert shapes == [(1, sum(LENGTHS))]
    assert_same(outputs, plain(backbone, features))


@pytest.mark.parametrize("design", [{"pooling": "multi_layer"}, {"pooling": "pyramid"}, {"pooling": "mean"}])
def test_encode_gives_the_same_vectors_for_hundreds_of_texts(tiny_llm, design):
    model = build_embedder(tiny_llm, attention="bidirectional", **design)
    words = "the quick brown fox jumps over the lazy dog " * 2
    texts = [words[n % 9 : n % 9 + 3 * n % 70] for n in range(300)]
    optimize_inference(model)
    with computed_tokens(model[0]) as shapes:
        fast = model.encode(texts, batch_size=16, convert_to_tensor=True)
    assert sum(rows == 1 for rows, _ in shapes) > 12
    optimize_inference(model, False)
    torch.testing.assert_close(fast, model.encode(texts, batch_size=16, convert_to_tensor=True), rtol=0, atol=1e-5)


def test_where_it_cannot_be_used_the_report_says_why(make_llm, tiny_llm):
    capped = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=5.0)
    gemma2 = LLMTransformer(make_llm(capped), model_kwargs={"attn_implementation": "eager"})
    double = LLMTransformer(tiny_llm).to(torch.float64)
    gemma3 = Gemma3TextConfig(**SIZES, head_dim=8, use_bidirectional_attention=True)  # W-1 tokens to each side
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
    bamba = LLMTransformer(make_llm(BambaConfig(**SIZES, **mamba, attn_layer_indices=[1])), attention="causal")
    convolved = Lfm2Config(**SIZES, layer_types=["conv", "full_attention"] * 2)  # from one text into the next
    lfm2 = LLMTransformer(make_llm(convolved), attention="causal")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    stretched = LlamaConfig(**SIZES | {"max_position_embeddings": 16}, rope_parameters=rope)
    for model, reason in (
        (gemma2, "its attention is eager"),
        (double, "in torch.float64"),
        (LLMTransformer(make_llm(gemma3)), "windows"),
        (bamba, "cannot be replaced"),
        (lfm2, "more than keys and values"),
        (LLMTransformer(make_llm(stretched)), "rotary positions"),
    ):
        used = model.model.config._attn_implementation
        assert reason in optimize_inference(model).reasons["packing"]
        assert model.model.config._attn_implementation == used
        assert (1, sum(LENGTHS)) not in run(model.eval(), id_batch(LENGTHS))[1]


def test_a_model_that_is_packed_is_proven_and_measured_as_one_of_sdpa(tiny_llm):
    model = build_embedder(tiny_llm, pooling="mean", verify=False).eval()
    before = measure_cost(model, lengths=(8,), repeats=1).lengths[0].flops
    optimize_inference(model)
    assert model[0].model.config._attn_implementation == PACKED_SDPA
    assert measure_cost(model, lengths=(8,), repeats=1).lengths[0].flops == before > 0
    assert verify_attention(model).attn_implementation == "sdpa"


def wrong_kernel(*args: Any) -> Tensor:
    *parts, texts, window, scale = args
    return text_by_text(*parts, Texts(torch.tensor([0, int(texts.offsets[-1])]), 10_000), window, scale)


def test_a_wrong_kernel_is_seen_when_it_is_switched_on(llama, monkeypatch):
    monkeypatch.setitem(packing.KERNELS, "cpu", ((torch.float32,), wrong_kernel))
    assert "differ by" in optimize_inference(llama).reasons["packing"]
    assert llama.model.config._attn_implementation == "sdpa"


def one_too_far(query: Tensor, key: Tensor, value: Tensor, texts: Texts, window: Any, scale: Any) -> Tensor:
    return text_by_text(query, key, value, texts, (window[0] + 1, window[1] + 1), scale)


def other_scale(query: Tensor, key: Tensor, value: Tensor, texts: Texts, window: Any, scale: float) -> Tensor:
    return text_by_text(query, key, value, texts, window, 1.2 * scale)


@pytest.mark.parametrize(
    ("fault", "weights"), [(one_too_far, 0.02), (other_scale, 0.1), (text_by_text, 0.02), (text_by_text, 0.1)]
)
def test_in_half_precision_too_wrong_vectors_turn_it_off_and_rounding_does_not(make_llm, fault, weights, monkeypatch):
    monkeypatch.setitem(packing.KERNELS, "cpu", ((torch.bfloat16,), fault))
    config = MistralConfig(**SIZES, sliding_window=6, initializer_range=weights)
    backbone = LLMTransformer(make_llm(config), attention="bidirectional").to(torch.bfloat16).eval()
    assert optimize_inference(backbone).uses("packing") == (fault is text_by_text)


def kernel_of_torch_2_13(query, key, value, *places, scale=None, window_size=(-1, -1), enable_gqa=False):
    return torch.full_like(query, scale), window_size, enable_gqa, key.shape


def kernel_of_torch_2_11(query, key, value, *places, scale=None, window_size=(-1, -1)):
    return torch.full_like(query, scale), window_size, None, key.shape


@pytest.mark.parametrize(
    ("kernel", "groups", "heads_of_keys"), [(kernel_of_torch_2_13, True, 2), (kernel_of_torch_2_11, None, 4)]
)
def test_the_kernel_of_cuda_is_given_scale_window_and_groups_of_heads(kernel, groups, heads_of_keys, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch has no variable-length attention")
    calls = []

    def recorded(*args, **kwargs):
        out, *others = kernel(*args, **kwargs)
        calls.append(others)
        return out

    monkeypatch.setattr(varlen, "varlen_attn", functools.wraps(kernel)(recorded))
    query, key = torch.zeros(9, 4, 8), torch.zeros(9, 2, 8)
    texts = Texts(torch.tensor([0, 4, 9], dtype=torch.int32), 5)
    out = packing._by_varlen_kernel(query, key, key, texts, (3, 0), 0.7)
    assert calls == [[(3, 0), groups, (9, heads_of_keys, 8)]]
    assert torch.equal(out, torch.full_like(query, 0.7))


def test_a_torch_without_windows_in_its_kernel_does_not_pack(llama, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch has no variable-length attention")
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal=False: query)  # as in torch 2.10
    backbone = copy.deepcopy(llama.model).to(torch.bfloat16)
    assert "no variable-length attention" in packing.why_not_packed(backbone, "cuda")


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_the_kernel_does_not_know_is_an_error_and_not_left_out(llama, name):
    query = torch.zeros(1, 4, 9, 8)
    texts = Texts(torch.tensor([0, 4, 9], dtype=torch.int32), 5)
    with packing._within(texts), pytest.raises(NotApplicable, match=name):
        packing._attention(llama.model.layers[0].self_attn, query, query, query, None, **{name: 1.0})


def test_threads_share_a_model(llama):
    batches = [id_batch([13 + n, 40, 20, 14], seed=n) for n in range(8)]
    expected = [plain(llama, features) for features in batches]
    with ThreadPoolExecutor(4) as pool:
        for outputs, other in zip(pool.map(torch.no_grad()(functools.partial(llama)), batches), expected, strict=True):
            assert_same(outputs, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_packing_in_16_bits_gives_the_vectors_of_the_padded_batch(make_llm, mode, dtype, device):
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 192}  # heads of 32
    folder = make_llm(MistralConfig(**sizes, sliding_window=6))
    backbone = LLMTransformer(folder, attention=mode).to(device, dtype).eval()
    switch_on(backbone, "packing")
    features = {name: value.to(device) for name, value in id_batch(LENGTHS).items()}
    outputs, shapes = run(backbone, features)
    assert shapes == [(1, sum(LENGTHS))]
    expected = plain(backbone, features)
    for name in ("readout", "layer_summaries"):
        one, other = outputs[name].flatten(0, -2), expected[name].flatten(0, -2)
        assert ((one - other).norm(dim=1) / other.norm(dim=1)).max() < 0.03
