"""Adaptation: exact resumption, figures that say what they claim, and a base folder at the end."""

import dataclasses
import gc
import json
import shutil
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig
from typer.testing import CliRunner

from st_llmpool import build_embedder, set_attention
from st_llmpool.cli import app
from st_llmpool.data.training_data import TextSettings
from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.training import AdaptRecipe, adapt
from st_llmpool.training.mntp import adaptation
from st_llmpool.training.mntp.masked_next_token import masked_score
from st_llmpool.training.run_folder import seal_checkpoint

TUNES = {
    "full": {"tune": "full", "masking": {"replacement": "bert"}},
    "lora": {"tune": "lora", "lora": {"r": 4, "lora_dropout": 0.2}},
    "old token": {"tune": "lora", "lora": {"r": 4, "lora_dropout": 0.2}, "masking": {"token": "<pad>"}},
}


def make(folder: Path, base: str, words_file: str, **changes) -> AdaptRecipe:
    training = {"max_steps": 5, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2}
    values = {
        "output_dir": str(folder),
        "base": base,
        "texts": [{"source": words_file}],
        "max_seq_length": 24,
        "training": training | {"save_total_limit": 3, "warmup_steps": 0},
    }
    return AdaptRecipe.from_dict(values | changes)


@pytest.fixture(scope="module", params=TUNES)
def unbroken(request, tmp_path_factory, tiny_lm, words_file):
    recipe = make(tmp_path_factory.mktemp("adapt") / "run", tiny_lm, words_file, **TUNES[request.param])
    return recipe, adapt(recipe)


def test_a_resumed_adaptation_is_one_that_was_never_stopped(unbroken, tmp_path):
    recipe, expected = unbroken
    folder = tmp_path / "resumed"
    for name in ("checkpoints/checkpoint-2", "recipe.yaml"):
        source = Path(recipe.output_dir) / name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    state = folder / "checkpoints/checkpoint-2/trainer_state.json"
    values = json.loads(state.read_text())
    values["stateful_callbacks"]["ElapsedTimeCallback"]["attributes"]["seconds"] = 1000.0  # of the part before the stop
    state.write_text(json.dumps(values))
    seal_checkpoint(state.parent)
    resumed = adapt(dataclasses.replace(recipe, output_dir=str(folder)), resume=True)
    assert resumed.report["losses"] == expected.report["losses"]
    assert resumed.report["wall_seconds"] >= 1000
    assert resumed.report["masked_accuracy"] == expected.report["masked_accuracy"]
    first, second = (load_file(result.model_dir / "model.safetensors") for result in (resumed, expected))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_result_is_a_base_like_any_other(unbroken, tiny_lm):
    recipe, result = unbroken
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    config, before = model.config.to_dict(), AutoModelForCausalLM.from_pretrained(tiny_lm).config.to_dict()
    different = {key for key in config.keys() | before.keys() if config.get(key) != before.get(key)}
    assert different <= {"_name_or_path", "vocab_size"}  # and nothing of the attention
    assert not (result.model_dir / "adapter_config.json").exists()
    assert AutoModel.from_pretrained(result.model_dir).embed_tokens.weight.equal(model.model.embed_tokens.weight)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    assert tokenizer.mask_token == (recipe.masking.token or "<mask>")
    assert len(tokenizer) == model.config.vocab_size == before["vocab_size"] + (recipe.masking.token is None)
    embedder = build_embedder(str(result.model_dir), pooling="mean", device="cpu")
    assert embedder.encode(["a text"]).shape == (1, 32)
    assert sorted(path.name for path in result.model_dir.parent.iterdir() if path.name.startswith(".")) == []


def test_training_moved_the_weights_it_should(unbroken, tiny_lm):
    recipe, result = unbroken
    before, after = AutoModel.from_pretrained(tiny_lm), AutoModel.from_pretrained(result.model_dir)
    rows = len(before.embed_tokens.weight)
    moved = not torch.equal(before.embed_tokens.weight, after.embed_tokens.weight[:rows])
    assert moved is (recipe.tune == "full")
    assert not torch.equal(before.layers[0].mlp.up_proj.weight, after.layers[0].mlp.up_proj.weight)
    assert result.report["losses"][-1][1] < result.report["losses"][0][1]


def test_a_finished_adaptation_is_not_done_again_and_another_does_not_enter(unbroken, monkeypatch):
    recipe, result = unbroken
    monkeypatch.setattr(adaptation, "load_language_model", None)
    assert adapt(recipe, resume=True).report == result.report
    with pytest.raises(ConfigurationError, match="already holds a run"):
        adapt(recipe)
    changed = dataclasses.replace(recipe, seed=5)
    with pytest.raises(ConfigurationError, match="seed changed"):
        adapt(changed, resume=True)


def slow_accuracy(base, attention: str, texts: list[tuple[list[int], list[int]]], *, unmasked: bool) -> float:
    """One text and one masked token at a time, from the logits of the whole text."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    set_attention(model, attention)
    hits = []
    for masked, labels in texts:
        for place, label in enumerate(labels):
            if label == -100:
                continue
            hidden = zip(masked, labels, strict=True)
            ids = [token if unmasked and token != -100 else seen for seen, token in hidden]
            read = ids[:place] if unmasked else ids  # a causal model needs no more than the prefix
            hits.append(model(torch.tensor([read])).logits[0, place - 1].argmax().item() == label)
    return sum(hits) / len(hits)


def test_the_figures_are_those_of_a_slow_loop(tmp_path, tiny_lm, words_file, monkeypatch):
    kept = {}
    write_report = adaptation.write_report

    def spy(folder, trainer, facts):
        kept.update(held_out=trainer.eval_dataset, pieces=trainer.train_dataset.pieces)
        return write_report(folder, trainer, facts)

    monkeypatch.setattr(adaptation, "write_report", spy)
    masking = {"token": "<pad>"}  # one that the base has too
    result = adapt(make(tmp_path / "run", tiny_lm, words_file, tune="full", evaluation={"limit": 4}, masking=masking))
    texts = [(one["input_ids"].tolist(), one["labels"].tolist()) for one in kept["held_out"]]
    assert len(texts) == 4
    found = result.report["masked_accuracy"]
    assert found["adapted"] == slow_accuracy(result.model_dir, "bidirectional", texts, unmasked=False)
    assert found["base"] == slow_accuracy(tiny_lm, "bidirectional", texts, unmasked=False)
    assert found["causal"] == slow_accuracy(tiny_lm, "causal", texts, unmasked=True)
    targets = [label for _, labels in texts for label in labels if label != -100]
    (most_frequent, _), *_ = Counter(
        token for ids in kept["pieces"]["input_ids"][:] for token in ids.tolist()
    ).most_common()
    assert found["no_context"] == pytest.approx(targets.count(most_frequent) / len(targets))
    assert result.report["masked_tokens"] == len(targets)
    pad = AutoTokenizer.from_pretrained(tiny_lm).pad_token_id
    assert all(masked[place] == pad for masked, labels in texts for place, label in enumerate(labels) if label != -100)


def test_held_out_texts_are_not_trained_on(tmp_path, words_file):
    recipe = make(tmp_path, "base", words_file, evaluation={"limit": 3})
    train, held_out = adaptation._load(recipe)
    lines = Path(words_file).read_text().splitlines()
    assert len(held_out) == 3
    assert sorted([*train["text"], *held_out["text"]]) == sorted(lines)
    given = dataclasses.replace(recipe.evaluation, texts=[TextSettings(words_file, limit=2)])
    train, held_out = adaptation._load(dataclasses.replace(recipe, evaluation=given))
    assert (len(train), held_out["text"][:]) == (40, lines[:2])


@pytest.mark.parametrize("unbroken", ["lora"], indirect=True)
def test_evaluation_while_training_changes_nothing(unbroken, tmp_path):
    recipe, expected = unbroken
    evaluation = dataclasses.replace(recipe.evaluation, eval_steps=2)
    result = adapt(dataclasses.replace(recipe, output_dir=str(tmp_path / "run"), evaluation=evaluation))
    assert result.report["losses"] == expected.report["losses"]
    steps = [step for step, metrics in result.report["evaluations"]]
    assert steps == [2, 4, 5]
    assert 0 <= result.report["evaluations"][0][1]["masked_accuracy"] <= 1


def test_the_share_of_trained_weights_with_the_best_accuracy_is_taken(tmp_path, tiny_lm, words_file):
    whole = make(tmp_path / "whole", tiny_lm, words_file, tune="full", masking={"token": "<pad>"})
    base, tuned = (load_file(Path(f) / "model.safetensors") for f in (tiny_lm, adapt(whole).model_dir))
    result = adapt(dataclasses.replace(whole, output_dir=str(tmp_path / "mixed"), merge=[0.25, 0.75]))
    share, scores = result.report["merge"], dict(result.report["merge_scores"])
    assert scores.keys() == {0.25, 0.75}
    assert scores[share] == max(scores.values()) == result.report["masked_accuracy"]["adapted"]
    for name, weight in load_file(result.model_dir / "model.safetensors").items():
        expected = (1 - share) * base[name].double() + share * tuned[name].double()
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unbroken", ["full", "lora"], indirect=True)
def test_the_base_comes_into_memory_when_the_trained_model_is_gone_from_it(unbroken, tmp_path, monkeypatch):
    recipe, expected = unbroken
    weights, loads = [], []
    load, merge, write_report = adaptation.load_language_model, adaptation.merge_with_base, adaptation.write_report

    def spy_on_merge(model, *args):
        weights.extend(weakref.ref(weight) for weight in model.parameters())
        return merge(model, *args)

    def spy_on_report(folder, trainer, facts):
        assert trainer.optimizer is None
        assert trainer.callback_handler.optimizer is None
        return write_report(folder, trainer, facts)

    def spy_on_load(*args, **kwargs):
        gc.collect()
        held = [weight for reference in weights if (weight := reference()) is not None]
        loads.append(sum(weight.numel() for weight in held if not weight.is_meta))
        return load(*args, **kwargs)

    monkeypatch.setattr(adaptation, "merge_with_base", spy_on_merge)
    monkeypatch.setattr(adaptation, "write_report", spy_on_report)
    monkeypatch.setattr(adaptation, "load_language_model", spy_on_load)
    result = adapt(dataclasses.replace(recipe, output_dir=str(tmp_path / "run")))
    assert weights
    assert loads == [0, 0, 0]  # the base, the reload check, the base again to compare with
    assert result.report["masked_accuracy"] == expected.report["masked_accuracy"]


@pytest.mark.parametrize("unbroken", ["old token"], indirect=True)
def test_a_share_of_the_trained_weights_leaves_the_rest_to_the_base(unbroken, tmp_path):
    recipe, expected = unbroken
    result = adapt(dataclasses.replace(recipe, output_dir=str(tmp_path / "run"), merge=0.25))
    assert (result.report["merge"], result.report["merge_scores"]) == (0.25, [])
    assert result.report["masked_accuracy"]["base"] == expected.report["masked_accuracy"]["base"]
    base, tuned, merged = (
        load_file(Path(folder) / "model.safetensors") for folder in (recipe.base, expected.model_dir, result.model_dir)
    )
    for name, weight in merged.items():
        torch.testing.assert_close(weight, 0.75 * base[name] + 0.25 * tuned[name], rtol=1e-5, atol=1e-6)


CHANGES = [
    ({"limit": 4}, "evaluation.limit"),
    ({"texts": [{"source": "other.txt"}]}, "evaluation.texts"),
    ({"eval_steps": 3, "batch_size": 2}, None),
]


@pytest.mark.parametrize("unbroken", ["lora"], indirect=True)
@pytest.mark.parametrize(("change", "refused"), CHANGES)
def test_what_changes_the_training_texts_is_not_free_when_a_run_is_resumed(unbroken, change, refused):
    recipe, result = unbroken
    values = recipe.to_dict()
    changed = AdaptRecipe.from_dict(values | {"evaluation": values["evaluation"] | change})
    if refused is None:
        assert adapt(changed, resume=True).report == result.report
        return
    with pytest.raises(ConfigurationError, match=f"{refused} changed"):
        adapt(changed, resume=True)


@pytest.mark.parametrize("options", [[], ["--merge", "0.5", "--tune", "full"]])
def test_the_command_leaves_a_base_and_says_what_it_brought(tmp_path, tiny_lm, words_file, options):
    out = tmp_path / "adapted"
    arguments = ["adapt", tiny_lm, "--data", words_file, "--out", str(out), "--max-steps", "2", "--batch-size", "4"]
    settings = ["max_seq_length=24", "lora.r=4", "lora.lora_dropout=0"] if not options else ["max_seq_length=24"]
    result = CliRunner().invoke(app, [*arguments, "--mlm-probability", "0.3", *options, *settings])
    assert result.exit_code == 0, result.output
    report = json.loads((out / "training.json").read_text())
    assert f"{report['masked_accuracy']['adapted']:.1%}".replace("%", " %") in result.output
    assert str(out / "model") in result.output
    assert report["steps"] == 2
    recipe = AdaptRecipe.from_yaml(out / "recipe.yaml")
    assert (recipe.masking.mlm_probability, recipe.max_seq_length, recipe.training.batch_size) == (0.3, 24, 4)
    assert recipe.merge == (0.5 if options else None)
    assert build_embedder(str(out / "model"), pooling="mean", device="cpu").encode(["a text"]).shape == (1, 32)
    again = CliRunner().invoke(app, [*arguments, "--mlm-probability", "0.3", *options, *settings])
    assert again.exit_code != 0
    assert "already holds a run" in again.output + str(again.exception)


def test_scoring_keeps_the_model_as_it_was(tiny_lm):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm).train()
    example = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 7])}
    assert masked_score(model, [example], batch_size=4).tokens == 1
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base": "/no/such/base", "tune": "full"}, ConfigurationError, "/no/such/base"),
        ({"texts": [{"source": "none.txt"}]}, DataError, r"none\.txt"),
        ({"lora": {"target_modules": ["q_prj"]}}, ConfigurationError, "matches no layer"),
        ({"merge": 1.5}, ConfigurationError, "merge=1.5 must lie between"),
        ({"merge": []}, ConfigurationError, "empty list"),
        ({"texts": []}, ConfigurationError, "texts is empty"),
        ({"output_dir": ""}, ConfigurationError, "output_dir='' is empty"),
        ({"max_seq_length": 1}, ConfigurationError, "max_seq_length=1 must be at least 2"),
        ({"training": {"precision": "fp16"}}, ConfigurationError, "needs a GPU"),
        ({"masking": {"mlm_prob": 0.2}}, ConfigurationError, "Did you mean 'mlm_probability'"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(
    tmp_path, tiny_lm, words_file, monkeypatch, changes, error, message
):
    if "precision" in str(changes) and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(adaptation, "load_language_model", None)
    with pytest.raises(error, match=message):
        adapt(make(tmp_path / "run", **{"base": tiny_lm, "words_file": words_file} | changes))
    assert not (tmp_path / "run").exists()


def test_a_base_without_a_head_and_an_encoder_are_refused(tmp_path, tiny_llm, make_llm, words_file):
    with pytest.raises(ConfigurationError, match=r"lacks 1 weights .*lm_head"):
        adapt(make(tmp_path / "run", tiny_llm, words_file))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    with pytest.raises(ConfigurationError, match="is an encoder"):
        adapt(make(tmp_path / "run", make_llm(BertConfig(**sizes)), words_file, tune="full"))


def test_a_saved_embedder_is_refused_though_its_tied_head_could_be_trained(tmp_path, tiny_lm, words_file):
    build_embedder(tiny_lm, prompts={"query": "Q:"}).save_pretrained(str(tmp_path / "embedder"))
    with pytest.raises(ConfigurationError, match=r"is a saved embedder, whose pooling and prompts.*would lose"):
        adapt(make(tmp_path / "run", str(tmp_path / "embedder"), words_file))


def test_the_recipe_is_written_with_every_value(unbroken):
    recipe, _ = unbroken
    assert AdaptRecipe.from_yaml(Path(recipe.output_dir) / "recipe.yaml") == recipe
    report = json.loads((Path(recipe.output_dir) / "training.json").read_text())
    assert {"losses", "versions", "masked_accuracy", "mask_token", "pieces"} <= report.keys()
