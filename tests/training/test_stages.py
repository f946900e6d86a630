"""A recipe with stages: each starts from what the one before it left, and can be resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, Trainer

from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.training import Recipe, train
from st_llmpool.training import run as run_file
from st_llmpool.training import stages as stages_file

LORA = {"r": 4, "lora_dropout": 0.2}
FEW = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "warmup_steps": 0}


def chain(folder: Path, base: str, words_file: str, pairs: str) -> Recipe:
    stages = [
        {"kind": "mntp", "texts": [{"source": words_file}], "tune": "full", "masking": {"mlm_probability": 0.3}},
        {"kind": "simcse", "texts": [{"source": words_file}], "merge": 0.5},
        {"kind": "contrastive", "data": [{"source": pairs}], "merge": [0.3, 0.9]},
    ]
    return Recipe.from_dict(
        {
            "output_dir": str(folder),
            "model": {"base": base, "max_seq_length": 24, "lora": LORA},
            "data": [{"source": pairs}],
            "training": FEW,
            "evaluation": {"data": [{"source": pairs, "name": "held_out"}], "eval_steps": 50},
            "stages": stages,
        }
    )


@pytest.fixture(scope="module")
def chained(tmp_path_factory, tiny_lm, words_file, pairs):
    """A finished chain, and from where each model was built."""
    built = []
    build = run_file.build_embedder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_file, "build_embedder", lambda base, **options: built.append(base) or build(base, **options))
        recipe = chain(tmp_path_factory.mktemp("chain") / "run", tiny_lm, words_file, pairs)
        return recipe, train(recipe), built


def backbone(folder: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): weight for name, weight in load_file(folder / "model.safetensors").items()}


def test_each_stage_starts_from_what_the_one_before_it_left(chained):
    recipe, _, built = chained
    stages = Path(recipe.output_dir).resolve() / "stages"
    names = ["1-mntp", "2-simcse", "3-contrastive"]
    assert sorted(path.name for path in stages.iterdir()) == names
    assert built == [str(stages / name / "model") for name in names]
    assert recipe.stages[1].loss is None  # the default


def test_every_stage_leaves_an_ordinary_atomic_folder(chained):
    recipe, result, _ = chained
    stages = Path(recipe.output_dir) / "stages"
    AutoModelForCausalLM.from_pretrained(stages / "1-mntp" / "model")
    for name in ("2-simcse", "3-contrastive"):
        assert not (stages / name / "model" / "adapter_config.json").exists()
        model = SentenceTransformer(str(stages / name / "model"), trust_remote_code=True, device="cpu")
        assert model.encode(["a text"]).shape == result.model.encode(["a text"]).shape
    assert Recipe.from_yaml(Path(recipe.output_dir) / "recipe.yaml") == recipe


def test_the_model_at_the_end_stands_without_its_stages_and_names_no_local_path(chained, tmp_path):
    recipe, result, _ = chained
    shutil.copytree(result.model_dir, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "adapter_config.json").exists()  # its base would be a stage's model
    for file in (tmp_path / "elsewhere").rglob("*"):
        if file.suffix in (".json", ".md", ".txt"):
            assert str(Path(recipe.output_dir).parent) not in file.read_text(encoding="utf-8"), file
    moved = SentenceTransformer(str(tmp_path / "elsewhere"), trust_remote_code=True, device="cpu")
    expected = result.model.encode(["the quick fox"])
    torch.testing.assert_close(moved.encode(["the quick fox"]), expected, rtol=0, atol=1e-6)
    checkpoint = Path(recipe.output_dir) / "checkpoints/checkpoint-2"  # with the adapter, on the last stage's model
    trained = SentenceTransformer(str(checkpoint), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(trained.encode(["the quick fox"]), expected, rtol=0, atol=1e-5)


def test_a_stage_leaves_its_share_between_start_and_trained_weights(chained, tmp_path):
    """The adapter's own product is added by hand."""
    recipe, _, _ = chained
    stages = Path(recipe.output_dir) / "stages"
    adapter = load_file(stages / "2-simcse/checkpoints/checkpoint-2/adapter_model.safetensors")
    start, left = backbone(stages / "1-mntp/model"), backbone(stages / "2-simcse/model")
    name = "layers.1.self_attn.q_proj"
    first, second = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    trained = second @ first * (8 / 4)  # peft's default alpha over r
    assert trained.abs().max() > 1e-4
    torch.testing.assert_close(left[f"{name}.weight"].double(), start[f"{name}.weight"].double() + 0.5 * trained)
    assert torch.equal(left["embed_tokens.weight"], start["embed_tokens.weight"])


def test_of_several_shares_that_with_the_best_ranking_is_taken(chained):
    recipe, _, _ = chained
    report = json.loads((Path(recipe.output_dir) / "stages/3-contrastive/training.json").read_text())
    scores = dict(report["merge_scores"])
    assert scores.keys() == {0.3, 0.9}
    assert report["merge"] == max(scores, key=scores.get)


def test_the_pooling_goes_on_from_the_stage_before(chained, tmp_path):
    """With learning rates of next to nothing the end is what the stages left."""
    recipe, _, _ = chained
    folder = tmp_path / "run"
    shutil.copytree(recipe.output_dir, folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints")
    still = ["training.learning_rate=1e-30", "training.pooling_learning_rate=1e-30"]
    frozen = Recipe.from_dict(recipe.to_dict(), [f"output_dir={folder}", *still])
    for stage in frozen.stages:
        stage.training = recipe.training  # as it was when the stages ran
    for name in ("2-simcse", "3-contrastive", "1-mntp"):
        text = (folder / "stages" / name / "recipe.yaml").read_text()
        (folder / "stages" / name / "recipe.yaml").write_text(text.replace(recipe.output_dir, str(folder)))
    frozen.to_yaml(folder / "recipe.yaml")
    result = train(frozen, resume=True)
    file = "1_MultiLayerPooling/model.safetensors"
    left, kept = (load_file(place / file) for place in (folder / "stages/3-contrastive/model", result.model_dir))
    assert all(torch.equal(left[name], kept[name]) for name in left)
    assert left["to_embedding.weight"].any()  # zero in a new pooling
    texts = ["the quick fox", "a dog"]
    stage = SentenceTransformer(str(folder / "stages/3-contrastive/model"), trust_remote_code=True, device="cpu")
    torch.testing.assert_close(result.model.encode(texts), stage.encode(texts), rtol=0, atol=1e-6)


def test_a_chain_that_was_killed_is_resumed_where_it_stopped(chained, tmp_path, monkeypatch, caplog):
    """Killed in its second stage: the first is passed over, the second goes on, the third and the end follow."""
    recipe, expected, _ = chained
    source, folder = Path(recipe.output_dir), tmp_path / "run"
    shutil.copytree(source / "stages" / "1-mntp", folder / "stages" / "1-mntp")
    (folder / "stages" / "2-simcse").mkdir()
    shutil.copy(source / "stages/2-simcse/recipe.yaml", folder / "stages/2-simcse")
    shutil.copy(source / "recipe.yaml", folder)
    monkeypatch.setattr("st_llmpool.training.mntp.adaptation.load_language_model", None)
    moved = Recipe.from_dict(recipe.to_dict(), [f"output_dir={folder}"])
    resumed = train(moved, resume=True)
    assert resumed.report["losses"] == expected.report["losses"]
    first, second = (load_file(place.model_dir / "model.safetensors") for place in (resumed, expected))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_simcse_step_compares_two_dropout_views_of_each_text(tmp_path, tiny_lm, words_file, pairs, monkeypatch):
    seen = []
    compute_loss = run_file.EmbedderTrainer.compute_loss

    def spy(self, model, inputs, **kwargs):
        sides = [
            {key.removeprefix(f"{side}_"): value for key, value in inputs.items() if key.startswith(f"{side}_")}
            for side in ("query", "positive")
        ]
        with torch.random.fork_rng():
            views = [self.model(side)["sentence_embedding"] for side in sides]
        seen.append((sides[0]["input_ids"], sides[1]["input_ids"], *views))
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(run_file.EmbedderTrainer, "compute_loss", spy)
    recipe = chain(tmp_path, tiny_lm, words_file, pairs)
    stage = recipe.stages[1]
    stage.merge = None
    run_file._train_stage(stages_file.embedder_recipe(recipe, stage, tmp_path / "run"), None, stage)
    for number, (first, second, one, other) in enumerate(seen[:2]):
        assert torch.equal(first, second)
        assert torch.equal(one, other) is (number == 0)  # LoRA's B is zero before the first step
    report = json.loads((tmp_path / "run/training.json").read_text())
    assert report["merge"] == 1.0
    assert report["rows"] == {"words": 40}


@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        ({"kind": "simcse", "tune": "full"}, ConfigurationError, "LlamaModel .* has none"),
        ({"kind": "simcse", "lora": {"r": 4}}, ConfigurationError, "LlamaModel .* has none"),
        ({"kind": "simcse", "texts": [{"source": "none.txt"}]}, DataError, r"none\.txt"),
        ({"kind": "mntp", "texts": [{"source": "none.txt"}]}, DataError, r"none\.txt"),
        ({"kind": "mntp", "lora": {"target_modules": ["q_prj"]}}, ConfigurationError, "matches no layer"),
        ({"kind": "simcse", "training": {"batch_size": 41}}, DataError, "40 rows, fewer"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_stage_starts(
    tmp_path, tiny_lm, words_file, pairs, monkeypatch, stage, error, message
):
    monkeypatch.setattr(run_file, "build_embedder", None)
    monkeypatch.setattr(stages_file, "adapt", None)
    recipe = chain(tmp_path / "run", tiny_lm, words_file, pairs).to_dict()
    recipe["stages"] = [recipe["stages"][0], {"texts": [{"source": words_file}]} | stage]
    with pytest.raises(error, match=message):
        train(Recipe.from_dict(recipe))


TEXTS = [{"source": "t.txt"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"kind": "mlm", "texts": TEXTS}]}, "'mlm' is unknown"),
        ({"stages": [{"kind": "mntp"}]}, "kind=mntp needs texts"),
        ({"stages": [{"kind": "contrastive", "texts": TEXTS}]}, "texts does not apply to kind=contrastive"),
        ({"stages": [{"kind": "simcse", "texts": TEXTS, "masking": {}}]}, "masking does not apply to kind=simcse"),
        ({"stages": [{"kind": "simcse", "texts": TEXTS}, {"kind": "mntp", "texts": TEXTS}]}, "Put it first"),
        ({"stages": [{"kind": "mntp", "texts": TEXTS, "merge": 2}]}, "merge=2.0 must lie between"),
        ({"stages": [{"kind": "simcse", "texts": TEXTS, "merge": [0.5, 1]}]}, "needs a score to choose by"),
        ({"stages": [{"kind": "mntp", "texts": TEXTS}], "model": {"tune": "pooling"}}, "Set its tune"),
        ({"stages": [{"kind": "mntp", "texts": TEXTS}], "model": {"quantization": "nf4"}}, "does not apply to mntp"),
        ({"stages": [{"kind": "mntp", "texts": TEXTS, "stpes": 3}]}, "stages.0.stpes is not a key"),
    ],
)
def test_stages_that_contradict_themselves_are_refused_when_they_are_read(make_recipe, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        make_recipe(changes)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_layers_to_freeze_are_refused_before_an_mntp_stage_would_train_them(
    tmp_path, tiny_lm, words_file, pairs, monkeypatch, tune
):
    monkeypatch.setattr(run_file, "build_embedder", None)
    monkeypatch.setattr(stages_file, "adapt", None)
    recipe = chain(tmp_path / "run", tiny_lm, words_file, pairs).to_dict()
    recipe["model"] |= {"freeze_layers": 1, "tune": tune}
    with pytest.raises(ConfigurationError, match=r"freeze_layers=1 does not apply to .*kind=mntp.*model\.base"):
        train(Recipe.from_dict(recipe))


class Killed(Exception):
    """What stops a run in a test."""


@pytest.mark.parametrize("kind", ["mntp", "simcse"])
def test_a_stage_that_was_killed_between_its_checkpoints_ends_as_one_that_was_not(
    tmp_path, tiny_lm, words_file, pairs, monkeypatch, kind
):
    """Killed in the fourth of five steps, with a checkpoint after the second."""
    training = FEW | {"max_steps": 5, "save_steps": 2, "learning_rate": 1e-2}
    stage = {"kind": kind, "texts": [{"source": words_file}], "tune": "lora", "training": training}

    def recipe(name: str) -> Recipe:
        values = chain(tmp_path / name, tiny_lm, words_file, pairs).to_dict() | {"stages": [stage]}
        return Recipe.from_dict(values, ["training.max_steps=1", "evaluation.data=[]"])

    expected = train(recipe("unbroken"))
    step, calls = Trainer.training_step, []

    def killed(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == 4:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", killed)
        with pytest.raises(Killed):
            train(recipe("killed"))
    folders = [tmp_path / name / "stages" / f"1-{kind}" for name in ("unbroken", "killed")]
    assert not (folders[1] / "model").exists()
    assert [path.name for path in (folders[1] / "checkpoints").iterdir()] == ["checkpoint-2"]

    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(
            Trainer, "training_step", lambda self, *a, **k: seen.append(self.state.global_step) or step(self, *a, **k)
        )
        resumed = train(recipe("killed"), resume=True)
    assert seen == [2, 3, 4, 0]  # and one of the recipe's own training
    reports = [json.loads((folder / "training.json").read_text()) for folder in folders]
    assert reports[0]["losses"] == reports[1]["losses"]
    first, second = (load_file(folder / "model/model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.report["losses"] == expected.report["losses"]
