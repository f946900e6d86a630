"""A model's name is its weights' own, so that mteb never gives one model the results of another."""

from __future__ import annotations

import copy
import pickle

import torch
from sentence_transformers import SentenceTransformer

from st_llmpool import build_embedder
from st_llmpool.model_card.identity import fingerprint
from st_llmpool.modules.portable import complete_model
from tests.evaluation.tiny_suite import static_model


def test_fingerprint_is_that_of_the_weights_wherever_they_lie(tmp_path):
    model = static_model()
    model.save_pretrained(str(tmp_path / "a"))
    model.save_pretrained(str(tmp_path / "b"))
    reloaded = [SentenceTransformer(str(tmp_path / name), device="cpu") for name in "ab"]
    assert fingerprint(reloaded[0]) == fingerprint(reloaded[1]) == fingerprint(model)


def test_fingerprint_changes_with_whatever_changes_the_embedding():
    model = static_model()
    seen = {fingerprint(model), fingerprint(static_model(1))}
    model.prompts = {"query": "query: "}
    seen.add(fingerprint(model))
    model.truncate_dim = 4
    seen.add(fingerprint(model))
    model.similarity_fn_name = "dot"
    seen.add(fingerprint(model))
    with torch.no_grad():
        model[0].embedding.weight[0, 0] += 1e-6
    seen.add(fingerprint(model))
    model.to(torch.bfloat16)
    seen.add(fingerprint(model))
    assert len(seen) == 7


def test_fingerprint_sees_attention_and_tokenizer_of_a_transformer(tiny_llm):
    def load():
        return SentenceTransformer(tiny_llm, device="cpu")

    first = fingerprint(load())
    used = load()
    used.encode(["a", "a longer text"], batch_size=2)
    assert fingerprint(used) == first
    bidirectional, other_tokenizer = load(), load()
    bidirectional[0].auto_model.config.is_causal = False
    other_tokenizer.tokenizer.add_tokens(["<new>"])
    shorter = load()
    shorter.max_seq_length = 7
    assert len({first, fingerprint(bidirectional), fingerprint(other_tokenizer), fingerprint(shorter)}) == 4


def test_the_name_is_that_of_the_weights_and_prompts_at_this_moment(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm)
    card = model.model_card_data
    first = card.model_name
    assert first.startswith("local/unnamed-")
    card.model_name = "my embedder"
    assert card.model_name == first.replace("unnamed", "my-embedder")
    with torch.no_grad():
        model[1].layer_table[0, 0] += 1
    second = card.model_name
    model.prompts["query"] = "q: "
    assert len({first[-12:], second[-12:], card.model_name[-12:]}) == 3


def test_a_loaded_model_is_named_by_its_weights(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm)
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    assert "transformers_modules." in type(loaded[0]).__module__
    assert loaded.model_card_data.model_name == f"local/unnamed-{fingerprint(model)[:12]}"


def test_the_card_itself_has_the_plain_title(tiny_llm, tmp_path):
    model = build_embedder(tiny_llm)
    model.model_card_data.model_name = "My embedder"
    model.save_pretrained(str(tmp_path))
    assert "\n# My embedder\n" in (tmp_path / "README.md").read_text()
    assert "local/" not in (tmp_path / "README.md").read_text()


def test_a_model_of_the_hub_keeps_its_id_until_it_is_trained(tiny_llm):
    model = build_embedder(tiny_llm)
    card = model.model_card_data = static_model().model_card_data
    card.register_model(model)
    card.base_model, card.base_model_revision = "org/model", "c0ffee"
    complete_model(model)
    assert card.model_name is None  # mteb then takes id and commit
    card.add_tags("generated_from_trainer")
    assert card.model_name == f"local/unnamed-{fingerprint(model)[:12]}"


def test_a_folder_that_is_named_like_a_hub_id_is_no_model_of_the_hub(tiny_llm, tmp_path, monkeypatch):
    model = build_embedder(tiny_llm)
    card = model.model_card_data = static_model().model_card_data
    card.register_model(model)
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card.base_model, card.base_model_revision = "org/model", "c0ffee"
    complete_model(model)
    assert card.model_name.startswith("local/")


def test_card_data_of_somebody_else_are_left_alone():
    class Own(type(static_model().model_card_data)):
        pass

    model = static_model()
    model.model_card_data.__class__ = Own
    complete_model(model)
    assert type(model.model_card_data) is Own


def test_a_named_model_is_copied_and_pickled(tiny_llm):
    model = build_embedder(tiny_llm)
    name = model.model_card_data.model_name
    assert copy.deepcopy(model).model_card_data.model_name == name
    assert pickle.loads(pickle.dumps(model)).model_card_data.model_name == name


def test_a_save_goes_on_where_the_pictures_of_the_card_cannot_be_fetched(tiny_llm, tmp_path, monkeypatch, caplog):
    model = build_embedder(tiny_llm, pooling="mean", verify=False)
    model[0].loaded_from = ("alice/model", {})

    def fail(*args: object, **kwargs: object) -> str:
        raise RuntimeError("as the HTTP library of the Hub does, outside OSError")

    monkeypatch.setattr("st_llmpool.model_card.identity.load_dir_path", fail)
    model.save_pretrained(str(tmp_path))
    assert "The pictures of the card of alice/model could not be copied" in caplog.text
    SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
