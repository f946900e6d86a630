"""Model soups: averages of whole models, adapters and poolings included, and what cannot be averaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from st_llmpool import build_embedder
from st_llmpool.cli import app
from st_llmpool.data.training_data import DatasetSettings
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.tools import soup as soup_file
from st_llmpool.tools.soup import average, soup

TEXTS = ["the quick brown fox", "a lazy dog"]


def save(folder: Path, base: str, seed: int, **options) -> str:
    """A model whose trainable weights are moved away from the base's, as training would."""
    model = build_embedder(base, verify=False, device="cpu", **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llm) -> list[str]:
    """Two models trained in full and one with an adapter, of one design."""
    folder = tmp_path_factory.mktemp("models")
    adapter = {"peft_config": {"r": 2, "lora_alpha": 4}}
    return [
        save(folder / "first" / "model", tiny_llm, 1),
        save(folder / "second" / "model", tiny_llm, 2),
        save(folder / "adapted" / "model", tiny_llm, 3, **adapter),
    ]


def merged_by_hand(folder: str, base: str) -> dict[str, torch.Tensor]:
    """All weights in float64, the products of an adapter added to the base's."""
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    if not any("lora_" in name for name in state):
        return state
    whole = build_embedder(base, verify=False, device="cpu")
    weights = {}
    for name in whole.state_dict():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in state:
            first, second = (state[f"{stem}.lora_{part}.default.weight"] for part in "AB")
            weights[name] = state[f"{stem}.base_layer.weight"] + second @ first * (4 / 2)
        else:
            weights[name] = state[name]
    return weights


def test_a_uniform_soup_is_the_mean_made_by_hand(models, tiny_llm, tmp_path):
    made = soup(models, tmp_path / "soup", trust_remote_code=True)
    loaded = SentenceTransformer(str(made.model_dir), trust_remote_code=True, device="cpu")
    parts = [merged_by_hand(folder, tiny_llm) for folder in models]
    state = loaded.state_dict()
    assert not any("lora" in name for name in state)
    assert state.keys() == parts[0].keys()
    for name, tensor in state.items():
        expected = sum(part[name] for part in parts) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    assert made.ingredients == models
    assert loaded[0].attention == "bidirectional"
    assert json.loads((made.model_dir / "soup.json").read_text())["ingredients"] == [
        "first/model",
        "second/model",
        "adapted/model",
    ]
    assert "Average of 3 models" in (made.model_dir / "README.md").read_text()


def test_a_greedy_soup_takes_what_does_not_lower_the_score(models, tmp_path, monkeypatch):
    """Of three models scored 0.5, 0.7 and 0.6: the best, then the next lowers the pair's score, then the last helps."""
    solo = dict(zip(models, (0.5, 0.7, 0.6), strict=True))
    loaded = {name: soup_file._load_embedder(name, Path(name), True).weights for name in models}
    together = {(models[1], models[2]): 0.65, (models[1], models[0]): 0.7}
    asked = []

    def score(model: SentenceTransformer) -> float:
        state = model.state_dict()
        for names, value in [*(((name,), value) for name, value in solo.items()), *together.items()]:
            mean = average([loaded[name] for name in names])
            if all(torch.equal(state[name], mean[name]) for name in mean):
                asked.append(names)
                return value
        raise AssertionError("an average of other models was scored")

    monkeypatch.setattr(soup_file, "_score", lambda *args: score)
    made = soup(models, tmp_path / "soup", validation=DatasetSettings("pairs.jsonl"), trust_remote_code=True)
    assert made.ingredients == [models[1], models[0]]
    assert made.scores == solo
    assert made.score == 0.7
    assert asked == [(models[0],), (models[1],), (models[2],), (models[1], models[2]), (models[1], models[0])]
    state = SentenceTransformer(str(made.model_dir), trust_remote_code=True, device="cpu").state_dict()
    expected = average([loaded[models[1]], loaded[models[0]]])
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_the_command_scores_by_validation_pairs(models, tmp_path):
    rows = [{"query": f"the quick fox {row}", "positive": f"a dog {row}"} for row in range(6)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["soup", *models[:2], "--out", str(tmp_path / "soup"), "--greedy", str(tmp_path / "held_out.jsonl")]
    result = CliRunner().invoke(app, [*command, "--trust-remote-code"])
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert facts["score"] >= max(facts["scores"].values())
    assert "Written" in result.output
    model = SentenceTransformer(str(tmp_path / "soup"), trust_remote_code=True, device="cpu")
    assert np.isfinite(model.encode(TEXTS)).all()


def test_half_precision_weights_are_averaged_in_float32():
    weights = [{"w": torch.tensor([value]).half(), "n": torch.tensor([3])} for value in (60000.0, 60000.0, 2048.0)]
    assert torch.equal(average(weights)["w"], torch.tensor([(2 * 60000.0 + 2048.0) / 3]).half())
    assert average(weights)["n"].dtype == torch.long


def test_models_that_differ_are_refused_and_told_in_what(models, tiny_llm, tmp_path):
    cases = {
        "attention": ({"attention": "causal"}, "LLMTransformer.attention is 'causal' in"),
        "pooling": ({"pooling": "mean"}, "modules is .*Pooling"),
        "readout": ({"layer_readout": "eos"}, "LLMTransformer.layer_readout is 'eos' in"),
        "layers": ({"layers": [1, -1]}, r"LLMTransformer.layers is \[1, 4\] in"),
        "sizes": ({"pooling_kwargs": {"num_latents": 4}}, "num_latents is 4 in"),
        "length": ({"max_seq_length": 17}, "max_seq_length is 17 in"),
    }
    for name, (options, message) in cases.items():
        other = save(tmp_path / name, tiny_llm, 4, **options)
        with pytest.raises(ConfigurationError, match=message):
            soup([models[0], other], tmp_path / "soup", trust_remote_code=True)
    assert not (tmp_path / "soup").exists()


def test_other_tokenizers_are_refused(models, tmp_path):
    model = SentenceTransformer(models[1], trust_remote_code=True, device="cpu")
    model.tokenizer.add_special_tokens({"mask_token": "<pad>"})
    model.save_pretrained(str(tmp_path / "other"), create_model_card=False)
    with pytest.raises(ConfigurationError, match="different tokenizers"):
        soup([models[0], str(tmp_path / "other")], tmp_path / "soup", trust_remote_code=True)


def test_what_is_no_choice_of_models_is_refused(models, tiny_llm, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigurationError, match="exists"):
        soup(models, tmp_path / "there", trust_remote_code=True)
    for few in (models[:1], [models[0], models[0]]):
        with pytest.raises(ConfigurationError, match="two different models"):
            soup(few, tmp_path / "soup", trust_remote_code=True)
    with pytest.raises(
        ConfigurationError, match=r"none is neither a folder nor a readable repository on the Hub"
    ) as refusal:
        soup([tmp_path / "none", tmp_path / "other"], tmp_path / "out")
    assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigurationError, match="not a saved model"):
        soup([str(tmp_path / "there"), models[0]], tmp_path / "soup", trust_remote_code=True)
    with pytest.raises(ConfigurationError, match="cannot be averaged with each other"):
        soup([tiny_llm, models[0]], tmp_path / "soup", trust_remote_code=True)


def test_foreign_code_is_refused_before_data_are_read(models, tmp_path):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "modules.json").write_text('[{"type": "evil.Evil", "path": ""}]')
    with pytest.raises(ConfigurationError, match=r"type 'evil\.Evil'.*--trust-remote-code"):
        soup([models[0], tmp_path / "evil"], tmp_path / "out", suite="squad", data_dir=tmp_path / "none")


def test_models_of_ours_need_no_flag(models, tmp_path):
    assert soup(models, tmp_path / "soup").ingredients == models


def test_a_soup_of_adapted_bases_is_a_base(tiny_llm, tmp_path):
    folders = [str(tmp_path / f"adapted-{seed}") for seed in range(3)]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llm)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(folder)
    made = soup(folders, tmp_path / "soup")
    parts = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders]
    for name, tensor in AutoModelForCausalLM.from_pretrained(made.model_dir).state_dict().items():
        expected = sum(part[name].double() for part in parts) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    assert build_embedder(str(made.model_dir)).encode(TEXTS).shape[0] == 2
    with pytest.raises(ConfigurationError, match="are base language models, which validation cannot score"):
        soup(folders, tmp_path / "greedy", validation=DatasetSettings("pairs.jsonl"))
