from __future__ import annotations

import gzip
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from st_llmpool.data import training_data
from st_llmpool.data.training_data import DatasetSettings, TextSettings, load_pairs, load_texts, load_views
from st_llmpool.modules.errors import DataError

docstring_file = importlib.import_module("st_llmpool.data.docstring_pairs")  # the package has a function of that name

ROWS = {
    "query": ["What, then?", "Null"],
    "positive": ["It is\nthis.", "007"],
    "negative": ["It is “that”.", "NA"],
}


WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".parquet": lambda frame, path: frame.to_parquet(path),
    ".jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    ".json": lambda frame, path: frame.to_json(path, orient="records"),
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
}


def write(path: Path, columns: dict[str, list]) -> str:
    WRITERS[path.suffix](pd.DataFrame(columns), path)
    return str(path)


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_texts_as_they_were_written(tmp_path, suffix):
    path = write(tmp_path / f"pairs{suffix}", ROWS)
    assert load_pairs(DatasetSettings(path)).to_dict() == ROWS


def test_columns_are_mapped_by_name_and_the_rest_is_left_out(tmp_path):
    path = write(tmp_path / "pairs.jsonl", {"id": [1, 2], "answer": ROWS["positive"], "question": ROWS["query"]})
    pairs = load_pairs(DatasetSettings(path, columns={"query": "question", "positive": "answer"}))
    assert pairs.column_names == ["query", "positive"]
    assert pairs.to_dict() == {"query": ROWS["query"], "positive": ROWS["positive"]}


def test_one_column_may_play_two_roles(tmp_path):
    path = write(tmp_path / "pairs.jsonl", {"text": ["a", "b"]})
    assert load_pairs(DatasetSettings(path, columns={"query": "text", "positive": "text"})).to_dict() == {
        "query": ["a", "b"],
        "positive": ["a", "b"],
    }


@pytest.mark.parametrize("as_list", [True, False])
def test_several_negatives_come_from_several_columns_or_from_one_of_lists(tmp_path, as_list):
    columns = {"query": ["q", "r"], "positive": ["p", "o"]}
    if as_list:
        columns |= {"hard": [["n1", "n2", "n3"], ["m1", "m2", "m3"]]}
        names = "hard"
    else:
        columns |= {"x": ["n1", "m1"], "y": ["n2", "m2"], "z": ["n3", "m3"]}
        names = ["x", "y", "z"]
    settings = DatasetSettings(write(tmp_path / "pairs.parquet", columns), columns={"negative": names})
    expected = {"negative_1": ["n1", "m1"], "negative_2": ["n2", "m2"], "negative_3": ["n3", "m3"]}
    assert load_pairs(settings).to_dict() == {"query": ["q", "r"], "positive": ["p", "o"], **expected}
    assert load_pairs(settings, num_negatives=1).column_names == ["query", "positive", "negative"]
    assert load_pairs(settings, num_negatives=0).column_names == ["query", "positive"]


def test_a_folder_holds_a_file_for_each_split(tmp_path):
    write(tmp_path / "train.parquet", ROWS)
    write(tmp_path / "validation.parquet", {"query": ["q"], "positive": ["p"]})
    assert len(load_pairs(DatasetSettings(str(tmp_path)))) == 2
    assert len(load_pairs(DatasetSettings(str(tmp_path), split="validation"))) == 1
    with pytest.raises(DataError, match=r"split 'valid'.*train\.parquet.*Did you mean 'validation'"):
        load_pairs(DatasetSettings(str(tmp_path), split="valid"))


def test_a_limit_takes_the_first_rows_of_lists_too(tmp_path):
    columns = {"query": list("abc"), "positive": list("xyz"), "negative": [["1"], ["2"], ["3"]]}
    path = write(tmp_path / "pairs.parquet", columns)
    limited = load_pairs(DatasetSettings(path, limit=2)).to_dict()
    assert limited == {"query": ["a", "b"], "positive": ["x", "y"], "negative": ["1", "2"]}


def test_docstrings_are_a_set_like_any_other(monkeypatch):
    asked = []

    def fake(split):
        asked.append(split)
        return [docstring_file.DocstringPair("q", "p", "n", distribution="d", module="m")]

    monkeypatch.setattr(docstring_file, "docstring_pairs", fake)
    pairs = load_pairs(DatasetSettings("docstrings", split="validation"))
    assert pairs.to_dict() == {"query": ["q"], "positive": ["p"], "negative": ["n"]}
    assert asked == ["validation"]


def test_a_name_that_is_no_file_is_asked_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def fake(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_pairs(DatasetSettings("org/pairs", subset="triplet", split="dev")).to_dict() == ROWS
    assert asked == [(("org/pairs", "triplet"), {"split": "dev"})]


def test_what_the_hub_does_not_give_is_a_data_error(monkeypatch):
    import datasets

    def fails(*args, **kwargs):
        raise ConnectionError("no route") from TimeoutError("too slow")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match=r"'org/pairs' is neither a file or folder.*too slow"):
        load_pairs(DatasetSettings("org/pairs"))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"question": ["q"], "positive": ["p"]}, {}, r"no column 'query'.*\['question', 'positive'\]"),
        ({"query": ["q"], "positive": ["p"]}, {"columns": {"negative": "hard"}}, "no column 'hard' for the negative"),
        (
            {"query": ["q"], "positive": ["p"]},
            {"columns": {"query": ["query", "positive"]}},
            "query must be one column",
        ),
        ({"query": ["q", " \t"], "positive": ["p", "p"]}, {}, r"query of row 2 is blank \(1 such rows\)"),
        ({"query": ["q", "r"], "positive": [None, "p"]}, {}, "positive of row 1 is blank"),
        ({"query": [1, 2], "positive": ["p", "p"]}, {}, "query is of type int64, not text"),
        ({"query": ["q"], "positive": [["p"]]}, {}, "positive is of type list.*not text"),
        ({"query": ["q"] * 3, "positive": ["p"] * 3, "negative": [["a", "b"], ["a"], []]}, {}, "0 to 2.*row 3 has 0"),
        ({"query": ["q"], "positive": ["p"], "negative": [["a", None]]}, {}, "negative_2 of row 1 is blank"),
        ({"query": [], "positive": []}, {}, "is empty"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(tmp_path, columns, options, message):
    path = write(tmp_path / "pairs.parquet", columns)
    with pytest.raises(DataError, match=message):
        load_pairs(DatasetSettings(path, **options))


def test_fewer_negatives_than_asked_for_are_refused(tmp_path):
    path = write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match=r"1 negatives to a query.*loss\.num_negatives=2"):
        load_pairs(DatasetSettings(path), num_negatives=2)


def test_mixed_types_in_a_jsonl_file_are_refused(tmp_path):
    rows = [{"query": "text", "positive": "p"}, {"query": {"nested": 1}, "positive": "p"}]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"mixed\.jsonl"):
        load_pairs(DatasetSettings(str(path)))


@pytest.mark.parametrize("name", ["none.jsonl", "./folder/none", "/no/such/folder"])
def test_a_missing_file_is_named_with_the_folder_that_paths_start_at(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"There is no file '{name}'.*{tmp_path}"):
        load_pairs(DatasetSettings(name))


def test_an_unreadable_ending_and_an_empty_file_are_refused(tmp_path):
    (tmp_path / "pairs.xlsx").write_text("x")
    (tmp_path / "pairs.jsonl").touch()
    with pytest.raises(DataError, match=r"ends in '\.xlsx'; readable are"):
        load_pairs(DatasetSettings(str(tmp_path / "pairs.xlsx")))
    with pytest.raises(DataError, match="is empty"):
        load_pairs(DatasetSettings(str(tmp_path / "pairs.jsonl")))


def test_every_ending_that_is_named_is_tested():
    assert WRITERS.keys() == training_data.FORMATS.keys()


ROW = '{"query": "caf\u00e9 a", "positive": "b"}\n'
DEEP = b'{"query": "a", "positive": "b", "x": %s}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", ROW.encode("latin-1"), "Line 1 of .* is not UTF-8: byte 0xe9 at position 14.*iconv"),
        ("a.jsonl", ROW.encode("utf-16"), "is UTF-16, not UTF-8"),
        ("a.jsonl", gzip.compress(ROW.encode(), mtime=0), "compressed with gzip"),
        ("a.jsonl", b'{"query": "\\ud800", "positive": "b"}\n', "Line 1 of .* lone surrogate"),
        ("a.jsonl", DEEP % (b"[" * 200_000 + b"]" * 200_000), "Line 1 of .* nested deeper than 64"),
        ("a.jsonl", b"What is it?\n", r"Line 1 of .* is 'What is it\?', not a JSON object"),
        ("a.jsonl", b'[{"query": "a", "positive": "b"}]\n', "Line 1 of .* not a JSON object"),
        ("a.json", b"[" + DEEP % (b"[" * 200_000 + b"]" * 200_000) + b"]", "nested deeper than 64"),
        ("a.csv", "query,positive\ncaf\u00e9,b\n".encode("latin-1"), "Line 2 of .* is not UTF-8"),
        ("a.csv", b"query,positive\na,b\nc,d,e\n", "Line 3 of .* has 3 cells, not 2"),
        ("a.tsv", b"query\tpositive\na\tb\tc\n", "Line 2 of .* has 3 cells, not 2"),
        ("a.csv", b"query,query\na,b\n", "must name every column once"),
        ("a.csv", b'query,positive\n"a,b\nc,d\n', "Line 3 of .* is not CSV"),
        ("a.csv", b"query,positive\na,\0b\n", "holds zero bytes"),
        ("a.parquet", b"query,positive", "cannot be read as .parquet"),
    ],
)
def test_a_file_that_no_reader_gets_right_is_refused_on_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        load_pairs(DatasetSettings(str(tmp_path / name)))
    assert "\n" not in str(refusal.value)


def test_the_index_that_pandas_writes_without_a_name_is_left_out_unless_asked_for(tmp_path):
    pd.DataFrame({"query": ["a", "b"], "positive": ["c", "d"]}).to_csv(tmp_path / "a.csv")
    assert load_pairs(DatasetSettings(str(tmp_path / "a.csv"))).to_dict() == {
        "query": ["a", "b"],
        "positive": ["c", "d"],
    }
    asked = DatasetSettings(str(tmp_path / "a.csv"), columns={"positive": "Unnamed: 0"})
    assert load_pairs(asked)["positive"][:] == ["0", "1"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is a pipe or device"):
        load_pairs(DatasetSettings(str(tmp_path / "a.jsonl")))


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    texts = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xe9")]
    )
    pq.write_table(pa.table({"query": texts, "positive": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the query is not valid UTF-8"):
        load_pairs(DatasetSettings(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_that_was_replaced_by_one_of_the_same_size_and_time_is_read_again(tmp_path, suffix):
    """The copy that `datasets` caches is found by name, size and time of the file."""
    file = tmp_path / f"pairs{suffix}"
    lines = {".jsonl": '{"query": "%s", "positive": "p"}\n', ".csv": "query,positive\n%s,p\n"}[suffix]
    seen = []
    for text in ("first", "other"):
        file.write_text(lines % text)
        os.utime(file, (1_000_000_000, 1_000_000_000))
        seen.append(load_pairs(DatasetSettings(str(file)))["query"][:])
    assert seen == [["first"], ["other"]]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        ({"query": False}, "query=False"),
        ({"query": 5}, "query=5"),
        ({"query": []}, r"query=\[\]"),
        ({"negative": {"a": 1}}, "negative={'a': 1}"),
        ({"negative": ["n", 1]}, r"negative=\['n', 1\]"),
    ],
)
def test_columns_that_are_no_names_are_refused(columns, shown):
    with pytest.raises(DataError, match=f"{shown} must be the name of a column, or a list"):
        DatasetSettings("pairs.csv", columns=columns)


def test_brackets_and_stars_in_a_name_are_no_pattern(tmp_path):
    for name in ("pairs[1].jsonl", "pairs1.jsonl", "pair*.jsonl"):
        (tmp_path / name).write_text(json.dumps({"query": name, "positive": "p"}))
    for name in ("pairs[1].jsonl", "pair*.jsonl"):
        assert load_pairs(DatasetSettings(str(tmp_path / name)))["query"][:] == [name]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "query,positive\n"),
        ("a.tsv", "query\tpositive\n"),
        ("a.csv", "\n\n"),
        ("a.jsonl", "\n"),
        ("a.json", "[]"),
    ],
)
def test_a_file_with_a_header_alone_holds_no_rows(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}' holds no rows"):
        load_pairs(DatasetSettings(str(tmp_path / name)))


@pytest.mark.parametrize("source", ["a" * 300 + ".jsonl", "", "~nobody-of-this-name/pairs.jsonl", "a\0.jsonl"])
@pytest.mark.parametrize(
    "load", [lambda name: load_pairs(DatasetSettings(name)), lambda name: load_texts(TextSettings(name))]
)
def test_a_name_that_no_file_can_have_is_a_missing_file(source, load):
    with pytest.raises(DataError, match="There is no file"):
        load(source)


def test_what_the_json_reader_logs_does_not_stand_beside_our_line(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"query": "a\n')
    with pytest.raises(DataError, match=r"cannot be read as \.jsonl"):
        load_pairs(DatasetSettings(str(tmp_path / "a.jsonl")))
    assert caplog.text == ""


TEXTS = ["a text", "NA", "a third, with a comma"]


def write_texts(folder, ending: str) -> str:
    import pyarrow as pa
    from pyarrow import parquet

    path = folder / f"texts.{ending}"
    if ending == "parquet":
        parquet.write_table(pa.table({"body": TEXTS, "id": [1, 2, 3]}), path)
    elif ending == "jsonl":
        path.write_text("\n".join(json.dumps({"body": text, "id": 1}) for text in TEXTS))
    elif ending == "csv":
        path.write_text("id,body\n" + "\n".join(f'1,"{text}"' for text in TEXTS))
    else:
        path.write_text("a text\n\nNA\n   \na third, with a comma\n")
    return str(path)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "txt"])
def test_every_kind_of_file_gives_its_texts(tmp_path, ending):
    settings = TextSettings(write_texts(tmp_path, ending), column="body")
    assert load_texts(settings)["text"][:] == TEXTS
    assert load_texts(TextSettings(settings.source, column="body", limit=2))["text"][:] == TEXTS[:2]
    views = load_views(settings)
    assert views["query"][:] == views["positive"][:] == TEXTS
    assert settings.label == "texts"


def test_a_folder_may_hold_a_text_file_for_each_split(tmp_path):
    (tmp_path / "train.txt").write_text("a text\n")
    (tmp_path / "test.txt").write_text("another\n")
    assert load_texts(TextSettings(str(tmp_path), split="test"))["text"][:] == ["another"]


def test_what_is_not_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no column 'text' for the text.*'body'"):
        load_texts(TextSettings(write_texts(tmp_path, "jsonl")))
    with pytest.raises(DataError, match="is of type int64, not text"):
        load_texts(TextSettings(write_texts(tmp_path, "parquet"), column="id"))
    with pytest.raises(DataError, match="limit=0"):
        TextSettings("texts.txt", limit=0)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="is empty"):
        load_texts(TextSettings(str(tmp_path / "empty.txt")))
    (tmp_path / "blank.jsonl").write_text('{"text": "a"}\n{"text": " "}')
    with pytest.raises(DataError, match="row 2 is blank"):
        load_texts(TextSettings(str(tmp_path / "blank.jsonl")))
