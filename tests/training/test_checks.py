"""A recipe is refused before its weights are loaded: names, machine, layers, adapter, pooling, dropout, batches."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, LlamaConfig

from st_llmpool import build_embedder
from st_llmpool.designs import POOLINGS
from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.training import Recipe, train
from st_llmpool.training import run as run_file
from st_llmpool.training import stages as stages_file
from st_llmpool.training.checks import check_pooling, check_split, check_views
from st_llmpool.training.recipe import StageSettings

from .test_stages import chain


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["model.design=6"], ConfigurationError, "model.design='6' is unknown"),
        (["model.pooling=multi_layr"], ConfigurationError, "Did you mean 'multi_layer'"),
        (["loss.name=infonse"], ConfigurationError, "Did you mean 'infonce'"),
        (["model.tune=pooling", "model.pooling=mean"], ConfigurationError, "trains nothing"),
        (["model.lora={target_modules: [q_prj]}"], ConfigurationError, "q_prj.*matches no layer.*q_proj"),
        (["model.lora={rank: 4}"], ConfigurationError, "rank"),
        (["model.lora=papr"], ConfigurationError, "the only name is 'paper'"),
        (["model.lora={init_lora_weights: pissa}"], ConfigurationError, "'pissa' does not work here.*gaussian"),
        (["model.lora={init_lora_weights: eva}"], ConfigurationError, "'eva' does not work here: it needs data"),
        (["model.lora={alora_invocation_tokens: [1]}"], ConfigurationError, "in no text to embed"),
        (["model.lora={init_lora_weights: loftq}"], ConfigurationError, "'loftq'.*in 4 bits.*nf4"),
        (["model.freeze_layers=4"], ConfigurationError, "leaves none of 4 layers.*at most 3"),
        (["model.freeze_layers=4", "model.tune=full"], ConfigurationError, "none of 4 layers"),
        (["training.sparse_tuning.layers=5"], ConfigurationError, "layers=5 is more than the 4 layers"),
        (
            ["training.sparse_tuning.layers=3", "model.freeze_layers=2"],
            ConfigurationError,
            "layers=3 is more than the 2 layers",
        ),
        (["training.optim=adamw_8bits"], ConfigurationError, "Did you mean 'adamw_8bit'"),
        (["model.base=/no/such/model"], ConfigurationError, "/no/such/model"),
        (["training.precision=fp16"], ConfigurationError, "needs a GPU"),
        (["training.batch_size=13"], DataError, "12 rows, fewer than training.batch_size=13.*batch_size=12"),
        (["data.0.source=none.jsonl"], DataError, r"no file 'none\.jsonl'"),
        (["data.0.columns={query: question}"], DataError, "no column 'question'"),
        (["loss.num_negatives=2"], DataError, "1 negatives.*loss.num_negatives=2"),
        (["evaluation.data=[{source: none.jsonl}]"], DataError, r"no file 'none\.jsonl'"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_loaded(make_recipe, monkeypatch, overrides, error, message):
    monkeypatch.setattr(run_file, "build_embedder", None)
    if any("precision" in text for text in overrides) and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    recipe = make_recipe({}, *overrides)
    with pytest.raises(error, match=message):
        train(recipe)
    assert not Path(recipe.output_dir).exists()


def test_a_set_of_repeated_texts_is_refused_where_a_batch_cannot_be_filled(make_recipe, tmp_path):
    rows = [json.dumps({"query": f"query {row}", "positive": f"positive {row % 3}"}) for row in range(12)]
    (tmp_path / "repeated.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match="ends at 3 rows"):
        train(make_recipe({"data": [{"source": str(tmp_path / "repeated.jsonl")}]}))


@pytest.mark.parametrize(
    "setting",
    ["pooling_kwargs.readout_skip='no'", "pooling_kwargs.num_heads='4'", "layers=[99]", "pooling_kwargs.nothing=1"],
)
def test_a_wrong_pooling_does_not_wait_for_the_stages_before_it(make_recipe, words_file, monkeypatch, setting):
    monkeypatch.setattr("st_llmpool.training.run.run_stages", None)
    stage = {"kind": "mntp", "texts": [{"source": words_file}]}
    with pytest.raises(ConfigurationError, match=setting.partition("=")[0].rpartition(".")[2].rstrip("s")):
        train(make_recipe({"stages": [stage]}, f"model.{setting}"))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_that_can_be_built_passes_its_check(make_recipe, tiny_llm, pooling):
    check_pooling(make_recipe({"model": {"pooling": pooling}}).model, tiny_llm)


@pytest.mark.parametrize(("size", "processes", "message"), [(5, 2, "use 4 or 6"), (3, 4, "use 4 or 8")])
def test_a_batch_that_processes_cannot_share_is_refused_with_the_nearest_that_they_can(size, processes, message):
    with pytest.raises(ConfigurationError, match=rf"batch_size={size} .* {processes} devices.* {message}"):
        check_split(size, processes)
    check_split(2 * processes, processes)


def test_dropout_in_the_backbone_is_enough(tmp_path, make_lm, words_file, pairs):
    base = make_lm(attention_dropout=0.1)
    recipe = chain(tmp_path / "run", base, words_file, pairs)
    recipe.stages = [recipe.stages[1]]
    recipe.stages[0].tune = "full"
    run_file._prepare(stages_file.embedder_recipe(recipe, recipe.stages[0], tmp_path), recipe.stages[0])
    assert LlamaConfig.from_pretrained(base).attention_dropout == 0.1


def simcse(folder: Path, base: str, words_file: str, pairs: str) -> tuple[Recipe, StageSettings]:
    recipe = chain(folder, base, words_file, pairs)
    stage = recipe.stages[1]
    stage.tune, stage.merge = "full", None
    return stages_file.embedder_recipe(recipe, stage, folder), stage


def falcon(folder: Path, tokenizer_of: str, **dropout: float) -> str:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FalconConfig(**sizes, **dropout)).save_pretrained(folder)
    return str(folder)


def test_a_dropout_that_the_architecture_never_calls_is_refused(tmp_path, tiny_lm, words_file, pairs):
    recipe, stage = simcse(tmp_path / "run", falcon(tmp_path, tiny_lm, attention_dropout=0.1), words_file, pairs)
    run_file._prepare(recipe, stage)  # the modules alone look as if they dropped
    with pytest.raises(ConfigurationError, match=r"FalconModel of .* has none: .*lora_dropout above 0"):
        run_file._train_stage(recipe, None, stage)
    assert not (tmp_path / "run").exists()


def test_looking_for_dropout_leaves_model_and_random_state_as_they_were(tmp_path, tiny_lm, words_file, pairs):
    recipe, _ = simcse(tmp_path / "run", falcon(tmp_path, tiny_lm, hidden_dropout=0.1), words_file, pairs)
    model = build_embedder(recipe.model.base, pooling="mean", device="cpu")
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        check_views(model, recipe.model)
        assert model.training is training
        assert torch.equal(torch.get_rng_state(), state)
    recipe.model.lora, recipe.model.tune = "paper", "lora"
    check_views(None, recipe.model)  # nothing to look at: the adapter's dropout shows after the first step only
