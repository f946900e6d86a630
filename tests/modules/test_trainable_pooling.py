"""What holds for every trainable pooling: float32 parameters, exact saving, and nothing taken from batch mates."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.modules.latent_attention_pooling import LatentAttentionPooling
from st_llmpool.modules.multi_layer_pooling import MultiLayerPooling
from st_llmpool.modules.scalar_mix_pooling import ScalarMixPooling
from st_llmpool.modules.trainable_pooling import TrainablePooling
from st_llmpool.poolings.attsets_pooling import AttSetsPooling
from st_llmpool.poolings.generalized_mean_pooling import GeneralizedMeanPooling
from st_llmpool.poolings.hopfield_pooling import HopfieldPooling
from st_llmpool.poolings.linear_pooling import LinearPooling
from st_llmpool.poolings.ponet_pooling import PoNetPooling
from st_llmpool.poolings.pyramid_pooling import PyramidPooling

BUILDERS = {
    "multi_layer": lambda: MultiLayerPooling(16, num_layers=3),
    "multi_layer, inputs query, no skip": lambda: MultiLayerPooling(16, 3, queries="inputs", readout_skip=False),
    "multi_layer, layer norm": lambda: MultiLayerPooling(16, num_layers=3, layer_norm=True),
    "linear": lambda: LinearPooling(16),
    "last_layer": lambda: LatentAttentionPooling(16, mlp_ratio=2.5),
    "last_layer, inputs query": lambda: LatentAttentionPooling(16, queries="inputs"),
    "scalar_mix": lambda: ScalarMixPooling(16, num_layers=3),
    "hopfield": lambda: HopfieldPooling(16, num_heads=3, head_dim=2, update_steps=2),
    "hopfield over layers": lambda: HopfieldPooling(16, reads="layers", num_layers=3),
    "attsets": lambda: AttSetsPooling(16),
    "attsets over layers, no skip": lambda: AttSetsPooling(16, reads="layers", num_layers=3, readout_skip=False),
    "gem": lambda: GeneralizedMeanPooling(16, num_groups=4),
    "gem over layers": lambda: GeneralizedMeanPooling(16, reads="layers", num_layers=3),
    "pyramid": lambda: PyramidPooling(16, levels=[3, 2]),
    "pyramid over layers, no skip": lambda: PyramidPooling(16, reads="layers", num_layers=3, readout_skip=False),
    "ponet": lambda: PoNetPooling(16, num_heads=2, segment_length=2),
}


def repr_of(value: object) -> str:
    return repr(value)[:25]


@pytest.fixture(params=BUILDERS)
def pooling(request: pytest.FixtureRequest) -> TrainablePooling:
    torch.manual_seed(0)
    pooling = BUILDERS[request.param]()
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return pooling.eval()


@pytest.fixture
def features() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "layer_summaries": torch.randn(4, 3, 16),
        "token_embeddings": torch.randn(4, 5, 16),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]),
        "readout": torch.randn(4, 16),
    }


def embed(pooling: TrainablePooling, features: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return pooling(dict(features))["sentence_embedding"]


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.to("cpu", torch.float16),
        lambda module: torch.nn.Sequential(module).bfloat16(),
    ],
)
def test_parameters_stay_float32_bit_for_bit_under_every_cast(pooling, cast):
    before = copy.deepcopy(pooling.state_dict())
    cast(pooling)
    assert dtypes(pooling) == {torch.float32}
    assert all(torch.equal(tensor, before[name]) for name, tensor in pooling.state_dict().items())


def test_moves_between_devices_still_move(pooling):
    assert {parameter.device.type for parameter in pooling.to("meta", torch.bfloat16).parameters()} == {"meta"}
    assert dtypes(pooling) == {torch.float32}


def test_bfloat16_default_dtype_is_undone_by_float(pooling):
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = ScalarMixPooling(4, 2).float()
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes(built) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_the_float32_result_rounded_once(pooling, features, dtype):
    low = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in features.items()}
    high = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in low.items()}
    embedding = embed(pooling, low)
    assert embedding.dtype == dtype
    assert torch.equal(embedding, embed(pooling, high).to(dtype))


def test_autocast_changes_nothing(pooling, features, device):
    pooling, features = pooling.to(device), {name: value.to(device) for name, value in features.items()}
    expected = embed(pooling, features)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(embed(copy.deepcopy(pooling), features), expected)
        assert torch.equal(embed(pooling.train(), features), embed(copy.deepcopy(pooling).train(), features))


def test_embedding_does_not_depend_on_batch_or_order(pooling, features):
    together = embed(pooling, features)
    for index in (2, 0, 3, 1):
        alone = embed(pooling, {name: tensor[[index]] for name, tensor in features.items()})
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-5)
    backwards = embed(pooling, {name: tensor.flip(0) for name, tensor in features.items()})
    torch.testing.assert_close(backwards.flip(0), together, rtol=0, atol=1e-5)


def test_saved_pooling_gives_the_same_bits(pooling, features, tmp_path):
    expected = embed(pooling, features)
    folder = tmp_path / "1_Pooling"
    folder.mkdir()
    pooling.save(str(folder), safe_serialization=False)
    reloaded = type(pooling).load(str(tmp_path), subfolder="1_Pooling").eval()
    assert torch.equal(embed(reloaded, features), expected)
    assert reloaded.get_config_dict() == pooling.get_config_dict()
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_that_were_saved_in_bfloat16_load_as_float32(pooling, tmp_path):
    folder = tmp_path / "1_Pooling"
    folder.mkdir()
    pooling.save(str(folder))
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    assert dtypes(type(pooling).load(str(tmp_path), subfolder="1_Pooling")) == {torch.float32}


def test_pickled_pooling_gives_the_same_bits(pooling, features):
    expected = embed(pooling, features)
    assert torch.equal(embed(pickle.loads(pickle.dumps(pooling)), features), expected)


def test_sentence_transformers_in_bfloat16_keeps_the_pooling_in_float32(tiny_llm: str, tmp_path: Path):
    backbone = Transformer(tiny_llm, model_kwargs={"dtype": torch.bfloat16})
    pooling = LatentAttentionPooling(32, readout_skip=False)
    before = copy.deepcopy(pooling.state_dict())
    model = SentenceTransformer(modules=[backbone, pooling, Normalize()], device="cpu")
    model.save_pretrained(str(tmp_path))
    arguments = {"trust_remote_code": True, "device": "cpu", "model_kwargs": {"dtype": torch.bfloat16}}
    reloaded = SentenceTransformer(str(tmp_path), **arguments)
    for module in (model[1], reloaded[1], reloaded.bfloat16()[1]):
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        assert dtypes(module) == {torch.float32}
    assert dtypes(reloaded[0]) == {torch.bfloat16}
    assert reloaded.get_embedding_dimension() == 32


@pytest.mark.parametrize("wrong", [10**18, 10**400, -1, "3", "no", float("nan"), {}, [10**18]], ids=repr_of)
def test_a_tampered_setting_is_refused_at_once_in_one_line_that_names_it(pooling, wrong):
    config = pooling.get_config_dict()
    for name in config:
        with pytest.raises(ConfigurationError, match=name.removesuffix("s")) as caught:
            type(pooling)(**config | {name: wrong})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("number", ["embedding_dimension", "num_latents", "head_dim", "mlp_ratio"])
def test_a_boolean_is_no_number(number):
    with pytest.raises(ConfigurationError, match=f"{number}=True must be a"):
        LatentAttentionPooling(**{"embedding_dimension": 16, number: True})


def test_a_saved_config_with_an_impossible_size_is_refused_before_any_memory_is_asked_for(tmp_path):
    folder = tmp_path / "1_Pooling"
    folder.mkdir()
    MultiLayerPooling(16, num_layers=3).save(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_latents": 10**18}))
    with pytest.raises(ConfigurationError, match="num_latents=1000000000000000000 must be a positive integer up to"):
        MultiLayerPooling.load(str(tmp_path), subfolder="1_Pooling")


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: ScalarMixPooling(0, 3), "embedding_dimension=0"),
        (lambda: ScalarMixPooling(4, -1), "num_layers=-1"),
        (lambda: MultiLayerPooling(4, 2.0), "num_layers=2.0"),
        (lambda: LatentAttentionPooling("768"), "embedding_dimension='768'"),
    ],
)
def test_sizes_that_are_not_positive_integers_are_refused(build, name):
    with pytest.raises(ConfigurationError, match=f"{name} must be a positive integer"):
        build()
