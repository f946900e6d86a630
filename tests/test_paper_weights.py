"""The paper's own modules, run once and stored as tensors in `tests/golden`, are reproduced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from st_llmpool.modules.cross_attention import CrossAttentionPooling
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.modules.latent_attention_pooling import LatentAttentionPooling
from st_llmpool.modules.multi_layer_pooling import MultiLayerPooling
from st_llmpool.paper_weights import pooling_from_paper
from tests.modules.cross_attention_reference import slow_cross_attention

GOLDEN = Path(__file__).parent / "golden"
HEADS = 4


@pytest.fixture
def multi_layer() -> dict[str, Tensor]:
    return load_file(GOLDEN / "multi_layer_small.safetensors")


@pytest.fixture
def last_layer() -> dict[str, Tensor]:
    return load_file(GOLDEN / "last_layer_small.safetensors")


def pooled(pooling: CrossAttentionPooling, inputs: Tensor) -> Tensor:
    features = {
        "layer_summaries": inputs,
        "token_embeddings": inputs,
        "attention_mask": torch.ones(inputs.shape[:2], dtype=torch.long),
    }
    return pooling(features)["sentence_embedding"]


def assert_reproduces(pooling: CrossAttentionPooling, golden: dict[str, Tensor]) -> None:
    unfolded = pooled(pooling.train(), golden["input"])
    with torch.inference_mode():
        folded = pooled(pooling.eval(), golden["input"])
    assert pooling.cross_attention._folded is not None
    for embedding in (unfolded, folded):
        torch.testing.assert_close(embedding, golden["output"], rtol=0, atol=1e-5)
        normalised = torch.nn.functional.normalize(embedding, dim=1)
        torch.testing.assert_close(normalised, golden["output_normalized"], rtol=0, atol=1e-5)


def test_multi_layer_output_is_the_papers_folded_and_not(multi_layer):
    assert_reproduces(pooling_from_paper(MultiLayerPooling, multi_layer, num_heads=HEADS), multi_layer)


def test_last_layer_output_is_the_papers_folded_and_not(last_layer):
    assert_reproduces(pooling_from_paper(LatentAttentionPooling, last_layer, num_heads=HEADS), last_layer)


def test_keys_without_prefix_give_the_same_pooling(multi_layer):
    bare = {name.removeprefix("weights."): tensor for name, tensor in multi_layer.items()}
    assert_reproduces(pooling_from_paper(MultiLayerPooling, bare, num_heads=HEADS), multi_layer)


def test_slow_reference_is_the_papers_function(multi_layer, last_layer):
    for golden in (multi_layer, last_layer):
        weights = {name.removeprefix("weights."): tensor for name, tensor in golden.items()}
        inputs = golden["input"][0] + weights.get("pos_emb.weight", 0)
        slow = torch.tensor(slow_cross_attention(weights, inputs, HEADS))
        torch.testing.assert_close(slow, golden["output"][0], rtol=0, atol=1e-5)


def test_sizes_are_inferred_and_the_skip_is_off(multi_layer):
    config = pooling_from_paper(MultiLayerPooling, multi_layer, num_heads=HEADS).get_config_dict()
    assert config == {
        "embedding_dimension": 48,
        "num_layers": 5,
        "num_latents": 6,
        "num_heads": 4,
        "head_dim": 8,
        "mlp_ratio": 4,
        "queries": "latents",
        "readout_skip": False,
        "layer_weights": True,
        "layer_norm": False,
    }


def test_half_precision_checkpoint_gives_float32_parameters(multi_layer):
    half = {name: tensor.half() for name, tensor in multi_layer.items()}
    pooling = pooling_from_paper(MultiLayerPooling, half, num_heads=HEADS)
    assert {parameter.dtype for parameter in pooling.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("weights.latents"), "does not fit MultiLayerPooling.*cross_attention.latents"),
        (lambda state: state.pop("weights.pos_emb.weight"), "pos_emb.weight.*missing .*num_layers"),
        (
            lambda state: state.update({"weights.cross_attend_blocks.2.norm.bias": torch.zeros(48)}),
            "[Uu]nexpected.*cross_attend_blocks.2.norm.bias",
        ),
        (
            lambda state: state.update({"weights.cross_attend_blocks.0.fn.to_out.weight": torch.zeros(48, 31)}),
            r"to_output.weight.*\[48, 31\].*\[48, 32\]",
        ),
        (
            lambda state: state.update({"weights.latents": torch.zeros(48)}),
            "does not fit MultiLayerPooling.*not enough values",
        ),
    ],
)
def test_state_dict_that_does_not_fit_is_refused(multi_layer, change, message):
    change(multi_layer)
    with pytest.raises(ConfigurationError, match=message):
        pooling_from_paper(MultiLayerPooling, multi_layer, num_heads=HEADS)


def test_layer_weights_are_refused_by_the_pooling_that_has_none(multi_layer):
    with pytest.raises(ConfigurationError, match=r"pos_emb.weight.*MultiLayerPooling.*num_layers"):
        pooling_from_paper(LatentAttentionPooling, multi_layer, num_heads=HEADS)


@pytest.mark.parametrize("num_heads", [5, 0])
def test_heads_that_do_not_divide_are_refused(multi_layer, num_heads):
    with pytest.raises(ConfigurationError, match=f"num_heads={num_heads}"):
        pooling_from_paper(MultiLayerPooling, multi_layer, num_heads=num_heads)
