"""`st-llmpool select`: the vectors are the paper's, the rows are kept whole, the note says what was chosen."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from st_llmpool import build_embedder
from st_llmpool.cli import app
from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.tools import select as select_file
from st_llmpool.tools.select import ADDED, select

ANIMALS = ["the fox jumps", "lazy dogs sleep near the fox", "a fox", "brown dogs and a fox over there"]
NUMBERS = ["12 + 34 = 46", "7 7 7 7", "3.1415 92", "100 200 300 400", "8 / 2"]


@pytest.fixture
def files(tmp_path):
    first = pa.table({"text": [*NUMBERS, ANIMALS[0]], "score": [0.5] * 6, "topic": ["n"] * 5 + ["a"]})
    second = pa.table({"text": ANIMALS[1:], "tags": [["x"], [], ["y", "z"]]})
    target = pa.table({"sentence": ["the quick fox", "dogs sleep", "a brown fox"]})
    for name, table in {"first": first, "second": second, "target": target}.items():
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    return tmp_path


def choose(files, count, out="chosen", **options):
    pool = [files / "second.parquet", files / "first.parquet"]
    options = {"target_columns": ["sentence"]} | options
    return select(pool, files / "target.parquet", count, files / "out" / f"{out}.parquet", **options)


def weighted_mean(model, tokenizer, text):
    """Token by token in float64, from transformers' own forward of the causal model."""
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).last_hidden_state[0].double()
    mean = sum((place + 1) * state for place, state in enumerate(states)) / sum(range(1, len(states) + 1))
    return (mean / mean.norm()).numpy()


@pytest.mark.parametrize("chunk", [2, 1024])
def test_each_target_row_in_turn_takes_the_nearest_row_by_the_papers_vectors(files, tiny_llm, chunk, monkeypatch):
    monkeypatch.setattr(select_file, "CHUNK", chunk)
    chosen = parquet.read_table(choose(files, 7, model=tiny_llm).file).to_pylist()
    model, tokenizer = AutoModel.from_pretrained(tiny_llm).eval(), AutoTokenizer.from_pretrained(tiny_llm)
    texts = [*ANIMALS[1:], *NUMBERS, ANIMALS[0]]
    pool = [weighted_mean(model, tokenizer, text) for text in texts]
    target = [weighted_mean(model, tokenizer, text) for text in ("the quick fox", "dogs sleep", "a brown fox")]
    left = set(range(len(texts)))
    for rank, row in enumerate(chosen):
        similarities = {place: pool[place] @ target[rank % 3] for place in left}
        best = max(similarities, key=similarities.get)
        left.remove(best)
        assert row["text"] == texts[best]
        assert row["selection_rank"] == rank + 1
        assert row["selection_target_row"] == rank % 3
        assert row["selection_score"] == pytest.approx(similarities[best], abs=1e-5)


def test_chosen_rows_keep_their_columns_and_say_where_they_were(files, tiny_llm):
    first, second = (parquet.read_table(files / f"{name}.parquet").to_pylist() for name in ("first", "second"))
    chosen = choose(files, 9, model=tiny_llm).file
    rows = parquet.read_table(chosen).to_pylist()
    assert {row["selection_rank"] for row in rows} == set(range(1, 10))
    for row in rows:
        origin = (first if row["selection_source"].endswith("first.parquet") else second)[row["selection_source_row"]]
        missing = {"score": None, "topic": None, "tags": None}
        assert {name: value for name, value in row.items() if name not in ADDED} == missing | origin
    assert sorted(path.name for path in chosen.parent.iterdir()) == ["chosen.json", "chosen.parquet"]


def test_the_note_counts_by_file_and_column_and_shows_both_ends(files, tiny_llm):
    result = choose(files, 6, model=tiny_llm, by="topic")
    note = json.loads((files / "out" / "chosen.json").read_text())
    rows = parquet.read_table(result.file).to_pylist()
    scores = [row["selection_score"] for row in rows]
    first = sum(row["selection_source"].endswith("first.parquet") for row in rows)
    by_file = {path.rpartition("/")[2]: count for path, count in note["histograms"]["source"].items()}
    assert by_file == {"first.parquet": first, "second.parquet": 6 - first}
    assert sum(note["histograms"]["topic"].values()) == 6
    assert [row["score"] for row in note["nearest"]] == sorted(scores, reverse=True)[:5]
    assert [row["score"] for row in note["farthest"]] == sorted(scores)[:5]
    assert note["nearest"][0]["text"] == rows[int(np.argmax(scores))]["text"]
    assert note["score"] == {"min": min(scores), "median": pytest.approx(np.median(scores)), "max": max(scores)}
    assert note["target_rows"] == 3
    assert result.note == note


def test_a_trained_model_chooses_with_its_own_backbone(files, tiny_llm, tmp_path):
    model = build_embedder(tiny_llm, peft_config={"r": 4, "init_lora_weights": False})
    model.save_pretrained(str(tmp_path / "trained"))
    base = choose(files, 9, model=tiny_llm).note
    trained = choose(files, 9, "trained", model=str(tmp_path / "trained"), trust_remote_code=True).note
    assert trained["score"] != base["score"]
    SentenceTransformer(modules=[Transformer(tiny_llm), Pooling(64, "mean")]).save_pretrained(str(tmp_path / "plain"))
    plain = choose(files, 9, "plain", model=str(tmp_path / "plain")).note
    assert plain["score"] == pytest.approx(base["score"], abs=1e-5)


def test_the_command_prints_what_it_chose(files, tiny_llm):
    arguments = ["select", str(files / "first.parquet"), "--target", str(files / "target.parquet"), "--k", "4"]
    arguments += ["--target-column", "sentence", "--model", tiny_llm, "--out", str(files / "chosen.parquet")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Nearest" in result.output
    assert "Farthest" in result.output
    assert parquet.read_metadata(files / "chosen.parquet").num_rows == 4


def test_without_out_the_rows_go_into_a_new_file_here_that_is_named_after_the_pool(files, tiny_llm, monkeypatch):
    (files / "here").mkdir()
    monkeypatch.chdir(files / "here")
    arguments = ["select", "../first.parquet", "../second.parquet", "--target", "../target.parquet", "--k", "4"]
    arguments += ["--target-column", "sentence", "--model", tiny_llm]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Written: first_selected.parquet and first_selected.json" in result.output
    assert sorted(path.name for path in (files / "here").iterdir()) == ["first_selected.json", "first_selected.parquet"]
    assert parquet.read_metadata("first_selected.parquet").num_rows == 4
    again = CliRunner().invoke(app, arguments)
    assert "first_selected.parquet exists" in str(again.exception)


@pytest.mark.parametrize("name", ["chosen.parquet", "chosen.json"])
def test_a_file_that_is_there_is_not_replaced(files, name, monkeypatch):
    monkeypatch.setattr(select_file, "build_embedder", None)
    (files / "out").mkdir()
    (files / "out" / name).write_text("kept")
    with pytest.raises(ConfigurationError, match=rf"{name} exists; name another file"):
        choose(files, 3)
    assert (files / "out" / name).read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 10}, ConfigurationError, "10 rows cannot be chosen from a pool of 9: 1 to 9 can"),
        ({"columns": ["txt"]}, DataError, "no column 'txt'.*Did you mean 'text'"),
        ({"target_columns": []}, DataError, r"neither a column text nor query.*\['sentence'\]"),
        ({"by": "topics"}, DataError, "column 'topics' to count by.*Did you mean 'topic'"),
    ],
)
def test_what_cannot_be_chosen_is_refused_before_a_model_is_loaded(files, options, error, message, monkeypatch):
    monkeypatch.setattr(select_file, "build_embedder", None)
    options = {"count": 3} | options
    with pytest.raises(error, match=message):
        choose(files, **options)
    assert not (files / "out").exists()


def test_pools_that_do_not_fit_together_are_refused(files):
    parquet.write_table(pa.table({"text": [1]}), files / "second.parquet")
    with pytest.raises(DataError, match="do not fit into one file"):
        choose(files, 3)
    parquet.write_table(pa.table({"text": ["a"], "selection_rank": [1]}), files / "second.parquet")
    with pytest.raises(DataError, match="'selection_rank', which choosing adds"):
        choose(files, 3)


@pytest.mark.parametrize("blank", [" ", "\u3000\n", "", None])
@pytest.mark.parametrize("name", ["second", "target"])
def test_a_row_without_text_is_named_before_a_model_is_loaded(files, blank, name, monkeypatch):
    monkeypatch.setattr(select_file, "build_embedder", None)
    monkeypatch.setattr(select_file, "CHUNK", 2)
    column = "sentence" if name == "target" else "text"
    parquet.write_table(pa.table({column: ["a fox", "dogs", "b", blank, "c", blank]}), files / f"{name}.parquet")
    with pytest.raises(DataError, match=rf"Row 4 of .*{name}\.parquet.* has no text in \['{column}'\]"):
        choose(files, 3)
    assert not (files / "out").exists()


@pytest.mark.parametrize(("values", "kind"), [([7, 8], "int64"), ([b"x", b"y"], "binary"), ([["x"], ["y"]], "list")])
def test_a_column_that_holds_no_text_is_refused_with_its_first_value(files, values, kind, monkeypatch):
    monkeypatch.setattr(select_file, "build_embedder", None)
    parquet.write_table(pa.table({"text": values}), files / "second.parquet")
    parquet.write_table(pa.table({"text": values}), files / "first.parquet")
    message = rf"Column 'text' of .*second.parquet' is of type {kind}.*not text \(row 1: {re.escape(repr(values[0]))}\)"
    with pytest.raises(DataError, match=message):
        choose(files, 3)


def test_a_row_needs_text_in_one_of_the_columns_only(files, tiny_llm):
    table = pa.table({"title": [None, " ", "a fox"], "year": ["1999", "7", None], "body": ["x", None, ""]})
    parquet.write_table(table, files / "pool.parquet")
    arguments = ([files / "pool.parquet"], files / "target.parquet", 3)
    options = {"columns": ["title", "year", "body"], "target_columns": ["sentence"], "model": tiny_llm}
    note = select(*arguments, files / "chosen.parquet", **options).note
    assert {row["text"] for row in note["nearest"]} == {"1999\nx", " \n7", "a fox\n"}
    with pytest.raises(DataError, match=r"Row 2 of .* has no text in \['title', 'body'\]"):
        select(*arguments, files / "other.parquet", **options | {"columns": ["title", "body"]})


def test_the_vectors_have_no_name_that_a_kill_could_leave_behind(files, tiny_llm, monkeypatch):
    def killed(vectors, wanted, count):
        assert len(vectors) == 9
        assert np.abs(vectors).sum(axis=1).min() > 0
        raise KeyboardInterrupt(list((files / "out").iterdir()))

    monkeypatch.setattr(select_file, "round_robin", killed)
    with pytest.raises(KeyboardInterrupt) as stop:
        choose(files, 3, model=tiny_llm)
    assert stop.value.args == ([],)
    assert list((files / "out").iterdir()) == []


def test_a_model_that_is_not_there_is_named(files):
    with pytest.raises(DataError, match="no/such/model"):
        choose(files, 3, model="no/such/model")
