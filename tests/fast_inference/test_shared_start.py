"""The tokens that all texts of a batch start with, computed once: the same vectors, or not used and said so."""

from __future__ import annotations

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import (
    BambaConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from st_llmpool.fast_inference import optimize_inference
from st_llmpool.fast_inference.shared_start import shared_start, why_not_shared
from st_llmpool.modules.attention import set_attention
from st_llmpool.modules.llm_transformer import LLMTransformer
from tests.architecture_zoo import build
from tests.conftest import save_tiny_llm
from tests.modules.token_batches import assert_same, computed_tokens, id_batch, plain, switch_on

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# Windows are shorter than the shared start, so that they slide over its end.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=7),
    "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=128),
}
SHARED, LENGTHS = 12, [13, 40, 20, 14, 39, 13, 22, 33, 17, 28]
PROMPT = "the quick brown fox: over the lazy dog: "


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLMTransformer:
    folder = save_tiny_llm(tmp_path_factory.mktemp(request.param), copy.deepcopy(CONFIGS[request.param]))
    return LLMTransformer(folder, attention="causal").eval()


@pytest.fixture
def llama(tiny_llm: str) -> LLMTransformer:
    backbone = LLMTransformer(tiny_llm, attention="causal").eval()
    switch_on(backbone, "shared start", "length groups")
    return backbone


def run(backbone: LLMTransformer, features: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    with torch.no_grad(), computed_tokens(backbone) as shapes:
        return backbone(features), shapes


@pytest.mark.parametrize("readout", ["eos", "mean"])
def test_vectors_are_those_of_the_plain_forward(backbone, readout, monkeypatch):
    monkeypatch.setattr(backbone, "layer_readout", readout)
    for include_prompt, prompt_length in ((True, 5), (False, 5), (False, SHARED), (False, 15)):
        monkeypatch.setattr(backbone, "include_prompt", include_prompt)
        for split in (True, False):
            switch_on(backbone, "shared start", *["length groups"] * split)
            features = id_batch(LENGTHS, shared=SHARED, seed=prompt_length) | {"prompt_length": prompt_length}
            outputs, shapes = run(backbone, features)
            assert_same(outputs, plain(backbone, features))
            assert shapes[0] == (1, SHARED)
            assert shapes[1:] == [(10, 28)] if not split else len(shapes) > 2
            assert max(columns for _, columns in shapes) == 40 - SHARED


def test_bfloat16_differs_by_rounding_only(backbone):
    features = id_batch(LENGTHS, shared=SHARED)
    model = copy.deepcopy(backbone).to(torch.bfloat16)
    switch_on(model, "shared start")
    outputs, shapes = run(model, features)
    expected = plain(model, features)
    assert shapes[0] == (1, SHARED)
    assert outputs["token_embeddings"].dtype == torch.bfloat16
    for name in ("readout", "layer_summaries"):
        one, other = outputs[name].flatten(0, -2), expected[name].flatten(0, -2)
        assert ((one - other).norm(dim=1) / other.norm(dim=1)).max() < 0.03


@pytest.mark.parametrize("include_prompt", [True, False], ids=["prompt kept", "prompt excluded"])
def test_encode_with_a_prompt_gives_the_same_vectors(backbone, include_prompt):
    model = SentenceTransformer(
        modules=[backbone, Pooling(32, pooling_mode="mean")], device="cpu", prompts={"query": PROMPT}
    )
    model.set_pooling_include_prompt(include_prompt)
    words = PROMPT.split()
    many = [" ".join(words[n % 5 : n % 8]) for n in range(200)]
    for texts in (["", "fox", "a quick dog"], ["fox"], ["", ""], ["dog"] * 9, many):
        switch_on(backbone, "shared start", "length groups")
        with computed_tokens(backbone) as shapes:
            fast = model.encode(texts, prompt_name="query", batch_size=64, convert_to_tensor=True)
        optimize_inference(model, False)
        with computed_tokens(backbone) as plain_shapes:
            slow = model.encode(texts, prompt_name="query", batch_size=64, convert_to_tensor=True)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    tokens, plain_tokens = (sum(rows * columns for rows, columns in each) for each in (shapes, plain_shapes))
    assert tokens < 0.7 * plain_tokens


def test_the_shared_start_ends_before_the_last_token_of_any_text():
    def start(*rows: list[int], **more: torch.Tensor) -> int:
        width = max(map(len, rows))
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return shared_start({"input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]), **more}, mask)

    assert start([5, 6, 7, 1], [5, 6, 8, 1]) == 2
    assert start([5, 6, 7], [5, 6, 7]) == 2
    assert start([5], [5, 6]) == 0
    assert start([5, 6, 9, 9], [5, 6, 9], [4, 6, 9, 9]) == 0
    assert start([5, 0, 0, 7], [5]) == 0  # padding repeats an id
    assert start([5, 6, 7], [5, 6, 7], token_type_ids=torch.tensor([[0, 0, 0], [0, 1, 0]])) == 1


def test_padding_on_the_left_reuses_nothing_and_changes_no_vector(backbone):
    features = id_batch(LENGTHS, shared=SHARED, side="left")
    switch_on(backbone, "shared start", "length groups")
    outputs, shapes = run(backbone, features)
    assert sum(rows for rows, _ in shapes) == len(LENGTHS)
    assert_same(outputs, plain(backbone, features))
    right = run(backbone, id_batch(LENGTHS, shared=SHARED))[0]
    torch.testing.assert_close(outputs["layer_summaries"], right["layer_summaries"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda features: {name: value[1:2] for name, value in features.items()},
        lambda features: {name: value[:2] for name, value in features.items()},
        lambda features: {name: value.flip(1) for name, value in features.items()},
    ],
    ids=["one text", "two texts", "padded on the left"],
)
def test_where_it_spares_too_little_the_batch_is_run_at_once(llama, change):
    switch_on(llama, "shared start")
    features = change(id_batch(LENGTHS, shared=SHARED))
    assert run(llama, features)[1] == [tuple(features["input_ids"].shape)]


def test_models_whose_start_depends_on_what_follows_are_run_as_they_are(tiny_llm, make_llm):
    both = LLMTransformer(tiny_llm, attention="bidirectional").eval()
    # Trained on 16 tokens: a batch of 40 is read with other positions than one of 13.
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    stretched = LLMTransformer(
        make_llm(LlamaConfig(**SIZES | {"max_position_embeddings": 16}, rope_parameters=rope)), attention="causal"
    ).eval()
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
    hybrid = BambaConfig(**SIZES, **mamba, attn_layer_indices=[1])
    recurrent = LLMTransformer(make_llm(hybrid), attention="causal").eval()
    features = id_batch(LENGTHS, shared=SHARED)
    for model, reason in ((both, "bidirectional"), (stretched, "rotary"), (recurrent, "more than keys and values")):
        assert reason in optimize_inference(model).reasons["shared start"]
        outputs, shapes = run(model, features)
        assert (1, SHARED) not in shapes
        assert_same(outputs, plain(model, features))


def test_switching_to_bidirectional_attention_later_ends_it(llama):
    set_attention(llama.model, "bidirectional")
    features = id_batch(LENGTHS, shared=SHARED)
    outputs, shapes = run(llama, features)
    assert (1, SHARED) not in shapes
    assert_same(outputs, plain(llama, features))


def forget_positions(llama: LLMTransformer) -> None:
    """What a family does that numbers the tokens of each forward from zero."""
    llama.model.rotary_emb.register_forward_pre_hook(_from_zero, with_kwargs=True)


def _from_zero(rotary: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "position_ids": torch.arange(args[0].shape[1])[None]}


def test_an_architecture_that_takes_it_wrongly_is_told_apart_when_it_is_switched_on(tiny_llm):
    sound, faulty = (LLMTransformer(tiny_llm, attention="causal").eval() for _ in range(2))
    forget_positions(faulty)
    assert "differ by" in optimize_inference(faulty).reasons["shared start"]
    assert "no shared start: vectors of LlamaModel differ by" in str(optimize_inference(faulty))
    features = id_batch(LENGTHS, shared=SHARED)
    expected = plain(faulty, features)
    for model in (faulty, copy.deepcopy(faulty), pickle.loads(pickle.dumps(faulty))):
        outputs, shapes = run(model, features)
        assert (1, SHARED) not in shapes
        torch.testing.assert_close(outputs["readout"], expected["readout"], rtol=0, atol=1e-5)
    assert optimize_inference(sound).uses("shared start")


def _no_cache(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("past_key_values") is not None:
        raise RuntimeError("no cache here")


def test_an_error_of_a_fast_path_is_an_error(tiny_llm):
    backbone = LLMTransformer(tiny_llm, attention="causal").eval()
    switch_on(backbone, "shared start")
    backbone.model.layers[2].register_forward_pre_hook(_no_cache, with_kwargs=True)
    with pytest.raises(RuntimeError, match="no cache here"):
        run(backbone, id_batch(LENGTHS, shared=SHARED))
    with pytest.raises(RuntimeError, match="no cache here"):
        optimize_inference(backbone)
    assert backbone.batch_runner is None


def test_a_model_that_takes_no_cache_does_without(make_llm):
    config = OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=128)
    backbone = LLMTransformer(make_llm(config), attention="causal").eval()
    assert "takes no keys and values" in optimize_inference(backbone).reasons["shared start"]
    features = id_batch(LENGTHS, shared=SHARED)
    assert_same(run(backbone, features)[0], plain(backbone, features))


def test_threads_share_a_model(llama):
    batches = [id_batch(3 * [13 + n, 40, 20, 14], shared=SHARED, seed=n) for n in range(8)]
    expected = [plain(llama, features) for features in batches]
    with ThreadPoolExecutor(4) as pool:
        for outputs, other in zip(pool.map(torch.no_grad()(functools.partial(llama)), batches), expected, strict=True):
            assert_same(outputs, other)


def test_a_family_without_keys_and_values_is_known_in_advance():
    assert "takes no keys and values" in why_not_shared(build("xlstm", "eager"))
    assert why_not_shared(build("llama", "sdpa")) is None
