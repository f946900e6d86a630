"""A card says what the model is, is valid on the Hub, and survives being saved again with its pictures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from st_llmpool import build_embedder
from st_llmpool.hub.export import export
from st_llmpool.model_card.card import EmbedderCardData, read_results, training_facts, write_card
from st_llmpool.modules.errors import ConfigurationError, DataError, StLlmpoolError

RESULTS = [
    {"task": "LocalSts", "type": "STS", "metric": "cosine_spearman", "score": 0.5, "interval": "0.4 to 0.6"},
    {"task": "LocalSearch", "type": "Retrieval", "metric": "ndcg_at_10", "score": 0.25},
]
TRAINING = {
    "wall_seconds": 12.0,
    "processes": 1,
    "device": "cpu",
    "precision": "fp32",
    "rows": {"pairs": 1234},
    "licenses": {"pairs": "cc-by-4.0"},
    "parameters": 100,
    "trained_parameters": 50,
    "versions": {"torch": "2.13.0"},
    "steps": 3,
    "losses": [[1, 3.0], [3, 2.0]],
    "pooling_share": [[3, 0.42]],
}


@pytest.fixture(scope="module")
def run(tiny_llm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a trained-looking model and its card. Read only."""
    folder = tmp_path_factory.mktemp("run")
    model = build_embedder(tiny_llm, prompts={"query": "find: "})
    torch.nn.init.normal_(model[1].to_embedding.weight)
    model.save_pretrained(str(folder / "model"))
    (folder / "training.json").write_text(json.dumps(TRAINING))
    (folder / "recipe.yaml").write_text(
        "output_dir: /srv/me/run\nseed: 7\ndata:\n- {source: /srv/me/sets/pairs.csv, license: cc-by-4.0}\n"
    )
    write_card(folder / "model", results=RESULTS, model_id="user/model", license="apache-2.0", trust_remote_code=True)
    return folder


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return (run / "model" / "README.md").read_text()


def test_the_plain_save_writes_the_card(tiny_llm, tmp_path):
    build_embedder(tiny_llm, attention="causal", pooling="eos", verify=False).save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "**causal attention**" in text
    assert "Not trained:" in text
    assert (tmp_path / "assets" / "design.png").is_file()


def test_the_card_of_an_untrained_pooling_says_so_in_place_of_a_table_of_zeros(tiny_llm, tmp_path):
    build_embedder(tiny_llm, verify=False).save_pretrained(str(tmp_path))
    section = (tmp_path / "README.md").read_text().partition("## Layer use\n")[2].partition("\n## ")[0]
    assert section.strip() == "The embedding does not depend on any layer's summary yet: the pooling is untrained."


def test_the_front_matter_carries_results_and_licence(run):
    data = ModelCard.load(run / "model" / "README.md").data
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {("LocalSts", "cosine_spearman"): 0.5, ("LocalSearch", "ndcg_at_10"): 0.25}
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "sentence-transformers",
        "sentence-similarity",
    )


def test_the_card_says_what_was_given_and_measured(text):
    for part in (
        "bidirectional",
        "MultiLayerPooling",
        "`query`: `find: `",
        "| pairs | 1,234 | cc-by-4.0 |",
        "| LocalSts | STS | cosine_spearman | 0.5000 | 0.4 to 0.6 |",
        "changed the embedding by 42 %",
        "seed: 7",
        "source: pairs.csv",
        "2409.02727",
    ):
        assert part in text


def test_no_folder_of_the_machine_is_told(text):
    assert "/srv/me" not in text


def test_the_parameters_are_those_of_the_model(run, text):
    model = SentenceTransformer(str(run / "model"), trust_remote_code=True)
    total = sum(parameter.numel() for parameter in model.parameters())
    pooling = sum(parameter.numel() for parameter in model[1].parameters())
    assert f"| parameters | {total:,} |" in text
    assert f"| in the pooling | {pooling:,} |" in text


def test_every_picture_that_the_card_shows_is_there(run, text):
    shown = re.findall(r"\]\((assets/.*?)\)", text)
    assert len(shown) == 3
    assert all((run / "model" / name).stat().st_size > 1000 for name in shown)


def test_the_way_to_load_that_it_shows_is_the_one_that_works(text, run):
    (call,) = re.findall(r"model = (SentenceTransformer\(.*\))", text)
    assert call == 'SentenceTransformer("user/model", trust_remote_code=True)'


def test_card_and_pictures_survive_saving_elsewhere_and_deleting_the_first(run, text, tmp_path):
    shutil.copytree(run / "model", tmp_path / "first")
    model = SentenceTransformer(str(tmp_path / "first"), trust_remote_code=True)
    model.save_pretrained(str(tmp_path / "second"))
    shutil.rmtree(tmp_path / "first")
    SentenceTransformer(str(tmp_path / "second"), trust_remote_code=True).save_pretrained(str(tmp_path / "third"))
    assert (tmp_path / "third" / "README.md").read_text() == text
    assert {file.name for file in (tmp_path / "third" / "assets").iterdir()} == {
        file.name for file in (run / "model" / "assets").iterdir()
    }


def test_the_card_lists_the_training_sets_of_earlier_stages(run, tiny_llm, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    stages = {"1-mntp": {"licenses": {"words": "cc0-1.0"}}, "2-contrastive": {"rows": {"more": 77}}}
    for name, facts in stages.items():
        (folder / "stages" / name).mkdir(parents=True)
        (folder / "stages" / name / "training.json").write_text(json.dumps(facts))
    write_card(folder / "model", results=[], model_id=None, license=None, trust_remote_code=True)
    card = (folder / "model" / "README.md").read_text()
    for row in (
        "| words (mntp) |  | cc0-1.0 |",
        "| more (contrastive) | 77 | not stated |",
        "| pairs | 1,234 | cc-by-4.0 |",
    ):
        assert row in card


def test_an_adapters_card_names_its_base_and_size(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm, peft_config=LoraConfig(r=3, target_modules=["q_proj"]), verify=False)
    model.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    adapter = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    assert "| adapter | LoRA of rank 3 |" in text
    assert "That base is a folder of the machine on which it was trained: merge the adapter" in text
    assert 'SentenceTransformer("path/to/this/folder", trust_remote_code=True)' in text
    assert f"| in the adapter | {adapter:,} |" in text
    assert f"`{Path(tiny_llm).name}`" in text
    assert tiny_llm not in text  # a folder of this machine


def test_a_base_of_the_hub_is_linked(tiny_llm):
    model = build_embedder(tiny_llm, verify=False)
    model[0].config._name_or_path = "Qwen/Qwen3-0.6B"
    model.model_card_data.local_files_only = True
    assert model.model_card_data.to_dict()["base_model"] == "Qwen/Qwen3-0.6B"


def test_a_native_exports_card_asks_for_no_flag(tiny_llm, tmp_path):
    build_embedder(tiny_llm, attention="causal", pooling="eos", verify=False).save_pretrained(str(tmp_path / "model"))
    export(tmp_path / "model", tmp_path / "native", native=True, trust_remote_code=True)
    text = (tmp_path / "native" / "README.md").read_text()
    assert "trust_remote_code" not in text
    assert "Native" in text


def test_the_card_of_a_foreign_model_is_left_to_sentence_transformers(tiny_llm, tmp_path):
    SentenceTransformer(tiny_llm).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigurationError, match="no LLMTransformer"):
        write_card(tmp_path, trust_remote_code=True)


def test_missing_results_are_said(tmp_path):
    with pytest.raises(DataError, match="evaluate"):
        read_results(tmp_path)


def test_scores_that_are_not_defined_are_left_out(tmp_path):
    rows = [*RESULTS, {"task": "LocalEmpty", "type": "STS", "metric": "cosine_spearman", "score": None}]
    (tmp_path / "scores.json").write_text(json.dumps({"rows": rows}))
    assert read_results(tmp_path) == RESULTS


def test_users_can_fill_in_what_only_they_know(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm, pooling="mean", verify=False)
    assert isinstance(model.model_card_data, EmbedderCardData)
    model.model_card_data.license = "mit"
    model.save_pretrained(str(tmp_path))
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"


def test_what_the_trainer_wrote_stays_when_results_come(tiny_llm, tmp_path):
    build_embedder(tiny_llm).save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    card.data["tags"] = [*card.data["tags"], "loss:FocalRankingLoss", "dataset_size:1234"]
    card.data["widget"] = [{"source_sentence": "a", "sentences": ["b", "c"]}]
    card.data["model_name"] = "mine"
    earlier = {"task_type": "information-retrieval", "dataset_type": "held", "dataset_name": "held"}
    card.data["eval_results"] = [EvalResult(metric_type="cosine_ndcg@10", metric_value=0.7, **earlier)]
    card.save(tmp_path / "README.md")
    for _ in range(2):  # and nothing is doubled
        write_card(tmp_path, results=RESULTS, trust_remote_code=True)
    data = ModelCard.load(tmp_path / "README.md").data
    found = {(row.dataset_name, row.metric_type): row.metric_value for row in data.eval_results}
    assert found == {("held", "cosine_ndcg@10"): 0.7, ("LocalSts", "cosine_spearman"): 0.5} | {
        ("LocalSearch", "ndcg_at_10"): 0.25
    }
    assert data["metrics"] == ["cosine_ndcg@10", "cosine_spearman", "ndcg_at_10"]
    assert data["widget"] == [{"source_sentence": "a", "sentences": ["b", "c"]}]
    assert "Not trained" in ModelCard.load(tmp_path / "README.md").text
    assert data["tags"].count("loss:FocalRankingLoss") == data["tags"].count("sentence-transformers") == 1


def test_a_model_of_the_plain_trainer_is_not_called_untrained(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm)
    pairs = Dataset.from_dict({"query": ["a fox", "a dog"], "positive": ["foxes", "dogs"]})
    arguments = SentenceTransformerTrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", report_to="none")
    SentenceTransformerTrainer(model, arguments, pairs, loss=MultipleNegativesRankingLoss(model)).train()
    model.save_pretrained(str(tmp_path / "model"))
    for _ in range(2):  # as it was saved, then as it is regenerated
        text = (tmp_path / "model" / "README.md").read_text()
        assert "Trained with `SentenceTransformerTrainer`" in text
        assert "Not trained" not in text
        write_card(tmp_path / "model")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("training.json", b"[" * 3000),
        ("training.json", b'{"rows": 3}'),
        ("training.json", '{"rows": "\u00e9"}'.encode("latin-1")),
        ("training.json", b'{"rows": {}, "licenses": 3}'),
        ("recipe.yaml", b"model: 3"),
        ("recipe.yaml", b"- 1"),
        ("stages/x/training.json", b"{}"),
    ],
)
def test_facts_that_training_did_not_write_are_refused(tmp_path, file, content):
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(StLlmpoolError):
        training_facts(tmp_path)
