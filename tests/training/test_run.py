import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import AutoModel

from st_llmpool import build_embedder
from st_llmpool.data.training_data import DatasetSettings, load_pairs
from st_llmpool.modules.errors import ConfigurationError, InputError
from st_llmpool.training import Recipe, train
from st_llmpool.training import run as run_file
from st_llmpool.training.trainer import EmbedderTrainer
from st_llmpool.utils.settings import merge

TUNES = {
    "full": {"tune": "full"},
    "lora": {"tune": "lora", "lora": {"r": 4, "lora_dropout": 0.2}},
    "dora": {"tune": "lora", "lora": {"r": 4, "lora_dropout": 0.2, "use_dora": True}},
    "nf4": {"tune": "lora", "lora": {"r": 4, "lora_dropout": 0.2}, "quantization": "nf4"},
    "int8": {"tune": "lora", "lora": {"r": 4, "lora_dropout": 0.2}, "quantization": "int8"},
    "pooling": {"tune": "pooling"},
}


#: In 8 bits only on a GPU, where its kernels differ most: a run takes as long as one in 4 bits.
PARAMS = [pytest.param(name, marks=pytest.mark.gpu) if name == "int8" else name for name in TUNES]


@pytest.fixture(scope="module", params=PARAMS)
def unbroken(request, tmp_path_factory, tiny_llm, write_pairs):
    """A run of 5 steps over two weighted sets, 3 steps to an epoch, with a checkpoint after steps 2 and 4."""
    folder = tmp_path_factory.mktemp(request.param)
    sets = [
        {"source": write_pairs(folder / "a.jsonl", rows=8, seed=1), "weight": 1, "instruction": "Find:"},
        {"source": write_pairs(folder / "b.jsonl", rows=4, seed=2), "weight": 2},
    ]
    training = {
        "max_steps": 5,
        "batch_size": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 3,
        "learning_rate": 1e-3,
    }
    recipe = Recipe.from_dict(
        {
            "output_dir": str(folder / "run"),
            "model": {"base": tiny_llm, "max_seq_length": 24, **TUNES[request.param]},
            "data": sets,
            "training": training,
        }
    )
    return recipe, train(recipe)


def weights(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def assert_same_weights(first: SentenceTransformer, second: SentenceTransformer) -> None:
    theirs = weights(second)
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, theirs[name]), name


def changed_output(recipe: Recipe, folder: Path, *overrides: str) -> Recipe:
    return Recipe.from_dict(recipe.to_dict(), [f"output_dir={folder}", *overrides])


def stopped_after(step: int, recipe: Recipe, folder: Path) -> Path:
    """A folder as a run leaves it that is killed while it writes the checkpoint after `step`."""
    run = Path(recipe.output_dir)
    shutil.copytree(run / "checkpoints" / f"checkpoint-{step}", folder / "checkpoints" / f"checkpoint-{step}")
    shutil.copy(run / "recipe.yaml", folder)
    half = folder / "checkpoints" / f"checkpoint-{step + 2}"
    half.mkdir()
    shutil.copy(run / "checkpoints" / f"checkpoint-{step + 2}" / "modules.json", half)
    return folder


@pytest.mark.logs_warning
def test_a_resumed_run_has_the_losses_and_weights_of_one_that_was_never_stopped(unbroken, tmp_path):
    recipe, expected = unbroken
    folder = stopped_after(2, recipe, tmp_path)
    resumed = train(changed_output(recipe, folder), resume=True)
    assert resumed.report["losses"] == expected.report["losses"]
    assert resumed.report["pooling_share"] == expected.report["pooling_share"]
    assert_same_weights(resumed.model, expected.model)


def test_mixing_begins_at_its_step_and_goes_on_after_a_resumption_as_if_never_stopped(make_recipe, tmp_path):
    training = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
    model = {"tune": "lora", "lora": {"r": 4, "lora_dropout": 0.2}}
    plain = make_recipe({"training": training, "model": model})
    mixed = changed_output(plain, tmp_path / "mixed", "loss.mixing.start_step=2")
    expected, losses = train(mixed), train(plain).report["losses"]
    assert expected.report["losses"][:2] == losses[:2]
    assert expected.report["losses"][2][1] > losses[2][1]  # the same weights still, and more negatives

    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "mixed/checkpoints/checkpoint-2", folder / "checkpoints/checkpoint-2")
    shutil.copy(tmp_path / "mixed/recipe.yaml", folder)
    resumed = train(changed_output(mixed, folder), resume=True)
    assert resumed.report["losses"] == expected.report["losses"]
    assert_same_weights(resumed.model, expected.model)


@pytest.mark.parametrize("unbroken", ["lora"], indirect=True)
def test_a_run_that_was_killed_after_its_last_step_is_only_saved(unbroken, tmp_path):
    recipe, expected = unbroken
    shutil.copytree(recipe.output_dir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "training.json").unlink()
    resumed = train(changed_output(recipe, tmp_path), resume=True)
    assert resumed.report["losses"] == expected.report["losses"]
    assert resumed.report["steps"] == 5
    assert_same_weights(resumed.model, expected.model)
    assert (tmp_path / "model" / "modules.json").is_file()


def test_the_saved_model_is_the_trained_one(unbroken):
    recipe, result = unbroken
    loaded = SentenceTransformer(str(result.model_dir), trust_remote_code=True)
    texts = ["q1 quick fox", "a much longer text about the lazy dog and the cats"]
    assert loaded.prompts["query"] == "Find:"
    tolerance = 0.1 if recipe.model.quantization else 1e-6  # an adapter is saved beside a base that is not quantised
    np.testing.assert_allclose(loaded.encode_query(texts), result.model.encode_query(texts), atol=tolerance)
    assert sorted(path.name for path in result.model_dir.parent.iterdir() if path.name.startswith(".")) == []


def test_only_what_the_recipe_names_trains(unbroken, tiny_llm):
    recipe, result = unbroken
    trained = {name for name, parameter in result.model.named_parameters() if parameter.requires_grad}
    backbone = {name for name in trained if name.startswith("0.")}
    assert {name for name, _ in result.model[1].named_parameters(prefix="1")} <= trained
    if recipe.model.tune == "full":
        assert len(backbone) == len(list(result.model[0].parameters()))
    elif recipe.model.tune == "pooling":
        assert backbone == set()
    else:
        assert backbone
        assert all("lora_" in name for name in backbone)


def test_the_report_tells_losses_sizes_and_versions(unbroken):
    recipe, result = unbroken
    report = json.loads((Path(recipe.output_dir) / "training.json").read_text())
    assert report == result.report
    assert [step for step, _ in report["losses"]] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(loss) for _, loss in report["losses"])
    assert report["rows"] == {"a": 8, "b": 4}
    assert report["licenses"] == {"a": None, "b": None}
    assert report["steps"] == 5
    assert report["wall_seconds"] > 0
    assert {"torch", "transformers", "sentence-transformers"} <= report["versions"].keys()
    assert (Path(recipe.output_dir) / "loss.png").stat().st_size > 1000
    assert Recipe.from_yaml(Path(recipe.output_dir) / "recipe.yaml") == recipe


def test_a_finished_run_is_not_trained_again(unbroken, monkeypatch):
    recipe, result = unbroken
    monkeypatch.setattr(run_file, "build_embedder", None)
    again = train(recipe, resume=True)
    assert again.report == result.report
    texts = ["the fox", "the dog"]
    if recipe.model.quantization is None:
        np.testing.assert_allclose(again.model.encode(texts), result.model.encode(texts), atol=1e-6)


def test_neither_a_second_run_nor_a_changed_recipe_enters_a_used_folder(unbroken):
    recipe, _ = unbroken
    with pytest.raises(ConfigurationError, match="already holds a run"):
        train(recipe)
    changed = changed_output(recipe, Path(recipe.output_dir), "training.batch_size=2", "training.logging_steps=3")
    with pytest.raises(ConfigurationError, match=r"training\.batch_size changed"):
        train(changed, resume=True)


def test_a_run_without_a_checkpoint_yet_is_resumed_from_its_start(make_recipe):
    recipe = make_recipe({"training": {"max_steps": 1}})
    Path(recipe.output_dir).mkdir()
    recipe.to_yaml(Path(recipe.output_dir) / "recipe.yaml")
    assert train(recipe, resume=True).report["steps"] == 1


def test_a_folder_that_holds_a_model_of_another_kind_is_left_alone(make_recipe):
    recipe = make_recipe()
    (Path(recipe.output_dir) / "model").mkdir(parents=True)
    for resume in (True, False):
        with pytest.raises(ConfigurationError, match="already holds a model"):
            train(recipe, resume=resume)


@pytest.mark.logs_warning
@pytest.mark.parametrize("unbroken", ["lora"], indirect=True)
def test_a_checkpoint_of_another_model_is_refused(unbroken, tmp_path):
    recipe, _ = unbroken
    folder = stopped_after(2, recipe, tmp_path)
    wider = changed_output(recipe, folder, "model.lora.r=8")
    wider.to_yaml(folder / "recipe.yaml")
    with pytest.raises(InputError, match="is of another model"):
        train(wider, resume=True)


@pytest.mark.parametrize("unbroken", ["lora"], indirect=True)
def test_evaluation_while_training_changes_neither_losses_nor_weights(unbroken, tmp_path, write_pairs):
    recipe, expected = unbroken
    held_out = write_pairs(tmp_path / "held_out.jsonl", rows=6, seed=3)
    changes = [f"evaluation.data=[{{source: {held_out}}}]", "evaluation.eval_steps=2", "evaluation.eval_on_start=true"]
    result = train(changed_output(recipe, tmp_path / "run", *changes))
    assert result.report["losses"] == expected.report["losses"]
    assert_same_weights(result.model, expected.model)
    assert {0, 2, 4} <= {step for step, _ in result.report["evaluations"]}
    metrics = result.report["evaluations"][-1][1]
    assert 0 < metrics["held_out_cosine_ndcg@10"] <= 1


def test_a_suite_is_evaluated_while_training(make_recipe, monkeypatch):
    import st_llmpool.evaluation as evaluation

    signature = inspect.signature(evaluation.SuiteEvaluator)

    class Fake(BaseEvaluator):
        def __init__(self, *args, **kwargs):
            self.arguments = signature.bind(*args, **kwargs).arguments

        def __call__(self, model, output_path=None, epoch=-1, steps=-1):
            assert self.arguments == {"suite": "squad", "data_dir": "data", "batch_size": 8}
            return {"mean": 0.5}

    monkeypatch.setattr(evaluation, "SuiteEvaluator", Fake)
    suite = {"suite": "squad", "data_dir": "data", "eval_steps": 1, "batch_size": 8, "load_best_model_at_end": True}
    result = train(make_recipe({"evaluation": suite, "training": {"max_steps": 1}}))
    assert result.report["evaluations"] == [[1, {"mean": 0.5}]]


def infonce(queries: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, scale: float) -> float:
    """The loss as its formula says, one query at a time, in float64."""
    losses = []
    for query, own in zip(queries, positives, strict=True):
        scores = [scale * torch.cosine_similarity(query, other, dim=0) for other in [*positives, *negatives]]
        own_score = scale * torch.cosine_similarity(query, own, dim=0)
        losses.append(torch.logsumexp(torch.stack(scores), dim=0) - own_score)
    return torch.stack(losses).mean().item()


def test_the_first_loss_is_infonce_over_positives_and_negatives_of_the_batch(make_recipe, tiny_llm, pairs):
    recipe = make_recipe(
        {
            "model": {"tune": "pooling"},
            "data": [{"source": pairs, "instruction": "Find:"}],
            "loss": {"scale": 7.0},
            "training": {"max_steps": 1, "batch_size": 12},
        }
    )
    result = train(recipe)
    model = build_embedder(tiny_llm, max_seq_length=24)
    rows = load_pairs(DatasetSettings(pairs))
    columns = [
        torch.as_tensor(model.encode(rows[name][:], prompt=prompt)).double()
        for name, prompt in [("query", "Find:"), ("positive", None), ("negative", None)]
    ]
    assert result.report["losses"][0][1] == pytest.approx(infonce(*columns, scale=7.0), abs=1e-5)


@pytest.mark.parametrize("changes", [{"loss": {"mini_batch_size": 3}}, {"training": {"gradient_checkpointing": True}}])
def test_saving_memory_changes_nothing(make_recipe, tmp_path, changes):
    plain = {"model": {"lora": {"r": 4, "lora_dropout": 0.0}}, "training": {"max_steps": 3, "learning_rate": 1e-3}}
    expected = train(make_recipe(plain))
    result = train(
        make_recipe(
            plain | {"output_dir": str(tmp_path / "other")} | changes,
            "training.max_steps=3",
            "training.learning_rate=1e-3",
        )
    )
    np.testing.assert_allclose(np.array(result.report["losses"]), np.array(expected.report["losses"]), atol=1e-5)


def test_pooling_and_adapter_have_learning_rates_of_their_own(make_recipe, tmp_path, caplog):
    recipe = make_recipe()
    recipe.training.learning_rate = 0.0  # which a file may not ask for
    still_adapter = train(recipe)
    before = build_embedder(still_adapter.model[0].model.name_or_path)
    lora_b = [tensor for name, tensor in weights(still_adapter.model).items() if "lora_B" in name]
    assert lora_b
    assert all(not tensor.any() for tensor in lora_b)
    assert still_adapter.report["pooling_share"][-1][1] > 0
    assert len(list(before[1].parameters())) == len(list(still_adapter.model[1].parameters()))

    recipe = make_recipe({"output_dir": str(tmp_path / "other"), "training": {"pooling_learning_rate": 0.0}})
    still_pooling = train(recipe)
    assert any(tensor.any() for name, tensor in weights(still_pooling.model).items() if "lora_B" in name)
    assert [share for _, share in still_pooling.report["pooling_share"]] == [0.0, 0.0]
    assert still_pooling.report["pooling_did_nothing"]
    assert "The pooling has no effect" in caplog.text


def test_the_instruction_is_put_before_queries_only(make_recipe, pairs, monkeypatch):
    texts = {}
    compute_loss = EmbedderTrainer.compute_loss

    def spy(self, model, inputs, **kwargs):
        for column in ("query", "positive", "negative"):
            texts[column] = self.processing_class.batch_decode(inputs[f"{column}_input_ids"], skip_special_tokens=True)
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(EmbedderTrainer, "compute_loss", spy)
    train(make_recipe({"data": [{"source": pairs, "instruction": "Find:"}], "training": {"max_steps": 1}}))
    assert all(text.startswith("Find:q") for text in texts["query"])
    assert all(text.startswith("p") for text in texts["positive"])
    assert all(text.startswith("n") for text in texts["negative"])


def test_what_trains_is_float32_even_on_a_16_bit_backbone(make_recipe, tiny_llm):
    recipe = make_recipe({"training": {"precision": "bf16"}})
    with torch.device("cpu"):
        arguments = type("Arguments", (), {"device": torch.device("cpu"), "bf16": True})()
        model = run_file._build_model(recipe, tiny_llm, arguments)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}


def test_a_save_that_breaks_off_leaves_no_model_folder(make_recipe, monkeypatch):
    save = SentenceTransformer.save_pretrained

    def half(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        if "checkpoint" not in path:
            raise OSError("disk full")

    monkeypatch.setattr(SentenceTransformer, "save_pretrained", half)
    recipe = make_recipe({"training": {"max_steps": 1}})
    with pytest.raises(OSError, match="disk full"):
        train(recipe)
    assert [path.name for path in Path(recipe.output_dir).iterdir() if "model" in path.name] == []


@pytest.fixture(scope="module")
def saved_embedder(tiny_llm, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("saved"))
    model = build_embedder(
        tiny_llm, attention="causal", layers=[1, -1], max_seq_length=20, prompts={"query": "Q:"}, peft_config={"r": 4}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.startswith("1."):
                parameter += 0.2
    model.save_pretrained(folder)
    return folder


def test_a_saved_embedder_as_the_base_is_trained_on_with_all_that_it_has(make_recipe, saved_embedder):
    settings = {"base": saved_embedder, "max_seq_length": None, "lora": {"r": 4}}
    training = {"max_steps": 1, "learning_rate": 1e-9, "pooling_learning_rate": 1e-9}
    trained = train(make_recipe({"model": settings, "training": training})).model
    start = SentenceTransformer(saved_embedder, trust_remote_code=True)
    assert (trained.prompts["query"], trained.max_seq_length, trained[0].attention) == ("Q:", 20, "causal")
    texts = ["fox", "the quick brown fox " * 9]
    np.testing.assert_allclose(trained.encode(texts), start.encode(texts), atol=1e-5)
    moved = [name for name, weight in start.named_parameters() if not torch.equal(weight, trained.get_parameter(name))]
    assert {name[0] for name in moved} == {"0", "1"}
    assert all("lora_" in name or name.startswith("1.") for name in moved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "mean", "lora": {"r": 4}}, "pooling_init='new'"),
        ({"design": "5", "lora": {"r": 4}}, "attention='causal'"),
        ({}, r"adapter with r=4, .*r=16"),
        ({"tune": "full"}, r"carries an adapter, and model\.tune=full"),
    ],
)
def test_a_recipe_that_contradicts_the_saved_embedder_is_refused(make_recipe, saved_embedder, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        train(make_recipe({"model": {"base": saved_embedder, **settings}}))


def test_a_run_on_cached_summaries_is_the_run_without_and_is_resumed_like_it(make_recipe, write_pairs, tmp_path):
    """Losses, evaluations, weights and the saved model; with float32 to the rounding of other batches."""
    held_out = write_pairs(tmp_path / "held_out.jsonl", rows=6, seed=9)
    values = {
        "model": {"tune": "pooling"},
        "data": [{"source": write_pairs(tmp_path / "train.jsonl", rows=12, seed=8), "instruction": "Find:"}],
        "training": {"max_steps": 4, "save_steps": 2, "pooling_learning_rate": 1e-3},
        "evaluation": {"data": [{"source": held_out, "instruction": "Find:"}], "eval_steps": 2},
    }
    plain = train(make_recipe(values))
    cached = make_recipe(values, f"training.cache={tmp_path / 'cache'}", "training.cache_dtype=float32")
    cached = changed_output(cached, tmp_path / "cached")
    result = train(cached)
    assert np.allclose(result.report["losses"], plain.report["losses"], atol=1e-5)
    for (_, one), (_, two) in zip(result.report["evaluations"], plain.report["evaluations"], strict=True):
        assert one == pytest.approx(two, abs=1e-6)
    expected = weights(plain.model)
    for name, tensor in weights(result.model).items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    assert "the backbone was frozen" in (result.model_dir / "README.md").read_text(encoding="utf-8")
    loaded = SentenceTransformer(str(result.model_dir), trust_remote_code=True, device="cpu")
    texts = ["a text", "another one"]
    assert np.allclose(loaded.encode(texts), plain.model.encode(texts), atol=1e-5)
    shutil.copytree(tmp_path / "cached", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "model")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "checkpoint-4")
    resumed = train(changed_output(cached, tmp_path / "stopped"), resume=True)
    assert resumed.report["losses"] == result.report["losses"]
    assert_same_weights(resumed.model, result.model)


def test_a_run_on_cached_summaries_trains_in_bf16_on_a_cpu(make_recipe, tmp_path):
    recipe = make_recipe(
        {"model": {"tune": "pooling"}, "training": {"cache": str(tmp_path / "cache"), "precision": "bf16"}}
    )
    assert all(np.isfinite(loss) for _, loss in train(recipe).report["losses"])


def test_a_base_that_fails_its_proof_is_refused_with_a_cache_too(make_recipe, tiny_llm, tmp_path):
    broken = AutoModel.from_pretrained(tiny_llm)
    broken.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    shutil.copytree(tiny_llm, tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")
    values = {"model": {"tune": "pooling", "base": str(tmp_path / "broken")}}
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="holds NaN or infinity"):
            train(make_recipe(values, f"training.cache={tmp_path / 'cache'}"), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"tune": "lora"}}, "holds what a frozen backbone gives"),
        ({"loss": {"name": "gist", "guide": "g"}}, "whose guide reads tokens"),
        ({"model": {"tune": "pooling", "pooling": "last_layer"}}, "model.pooling=last_layer reads every token"),
        ({"model": {"tune": "pooling", "pooling": "gem"}}, "model.pooling=gem reads every token"),
    ],
)
def test_a_recipe_that_cannot_use_the_cache_is_refused_by_name(make_recipe, tmp_path, changes, message):
    values = {"model": {"tune": "pooling"}, "training": {"cache": str(tmp_path / "cache")}}
    with pytest.raises(ConfigurationError, match=message):
        train(make_recipe(merge(values, changes)))
    assert not (tmp_path / "cache").exists()
