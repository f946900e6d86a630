from __future__ import annotations

import math

import pytest

from st_llmpool.evaluation.task_files import Column, find_table, read_table
from st_llmpool.modules.errors import DataError
from tests.evaluation.tiny_suite import write_table

COLUMNS = (Column("id", "id"), Column("text", "text"), Column("score", "number", default=1))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_table_gives_the_columns_under_the_names_of_the_task(tmp_path, suffix):
    path = tmp_path / f"test{suffix}"
    write_table(path, {"_id": [3, 4], "body": ["a", "b"], "other": [None, None]})
    table = read_table(path, COLUMNS, {"id": "_id", "text": "body"})
    assert table == {"id": ["3", "4"], "text": ["a", "b"], "score": [1, 1]}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_missing_column_is_named_with_the_nearest_and_all_that_are_there(tmp_path, suffix):
    path = tmp_path / f"test{suffix}"
    write_table(path, {"id": [3], "texts": ["a"]})
    with pytest.raises(DataError, match=rf"test\{suffix} has no column 'text'; it has id, texts. Did you mean 'texts'"):
        read_table(path, COLUMNS, {})


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("text", "text", ["a", None]),
        ("score", "number", [1.0, math.nan]),
        ("score", "number", [1.0, None]),
        ("grade", "integer", [1.0, 0.5]),
        ("texts", "texts", [["a"], []]),
        ("id", "id", ["a", None]),
        ("label", "label", [1, None]),
    ],
)
def test_value_of_the_wrong_kind_is_named_with_its_row(tmp_path, suffix, name, kind, values):
    path = tmp_path / f"test{suffix}"
    write_table(path, {name: values})
    with pytest.raises(DataError, match=rf"test\{suffix}: column '{name}' holds .* in row 2, expected"):
        read_table(path, [Column(name, kind)], {})


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_table_without_rows_is_an_error(tmp_path, suffix):
    path = tmp_path / f"test{suffix}"
    write_table(path, {"id": [], "text": []})
    with pytest.raises(DataError, match="has no rows"):
        read_table(path, COLUMNS, {})


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.parquet").write_text("no parquet")
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "a"}\nno json\n')
    (tmp_path / "b.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 1}\n')
    (tmp_path / "c.jsonl").write_text("[1]\n")
    for name, message in [
        ("a.parquet", "a.parquet is not a readable Parquet file"),
        ("a.jsonl", "Line 2 of .*a.jsonl' is not JSON"),
        ("b.jsonl", "b.jsonl: row 2 differs from the first row in the columns text"),
        ("c.jsonl", "c.jsonl: row 1 is list"),
    ]:
        with pytest.raises(DataError, match=message):
            read_table(tmp_path / name, COLUMNS, {})


def test_missing_file_is_an_error_that_lists_what_is_there(tmp_path):
    write_table(tmp_path / "corpus.parquet", {"id": [1]})
    assert find_table(tmp_path, "corpus", None) == tmp_path / "corpus.parquet"
    with pytest.raises(DataError, match=r"queries.jsonl \(the task's queries file\).*holds corpus.parquet"):
        find_table(tmp_path, "queries", None)
    with pytest.raises(DataError, match=r"Did you mean 'corpus.parquet'"):
        find_table(tmp_path, "corpus", "corpsu.parquet")
    with pytest.raises(DataError, match=r"suffix must be one of .parquet, .jsonl"):
        find_table(tmp_path, "corpus", "corpus.csv")
    with pytest.raises(DataError, match="is not a folder"):
        find_table(tmp_path / "nowhere", "corpus", None)
