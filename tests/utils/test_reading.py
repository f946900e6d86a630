"""Whatever a file holds, reading it ends in a value or in one line of our own."""

from __future__ import annotations

import gzip
import os

import pytest

from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.utils.reading import check_plain, read_json, read_json_object, read_text, read_yaml, shown

#: A file of 500 bytes that stands for 9 ** 8 values.
LAUGHS = b"a0: &a0 [x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (level, level, b",".join([b"*a%d" % (level - 1)] * 9)) for level in range(1, 9)
)


def test_plain_settings_are_read_as_they_are(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\nb: [1.5, x, null, true]\nc: &x {d: \xc3\xa9}\ne: *x\n")
    assert read_yaml(file) == {"a": 1, "b": [1.5, "x", None, True], "c": {"d": "é"}, "e": {"d": "é"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: .inf", "numbers must be finite"),
        (b"a: .nan", "numbers must be finite"),
        (b"a: " + b"9" * 5000, "not YAML"),
        (b"a: " + b"9" * 400, "at most 64 can be used"),
        (b"[" * 3000 + b"]" * 3000, "nested deeper than 64"),
        (b"a: " + b"[" * 100 + b"]" * 100, "nested deeper than 64"),
        (b"a: 2020-01-01", "of type date; text that looks like one needs quotes"),
        (b"a: 2020-99-01", "not YAML: month must be in 1..12"),
        (b"a: !!binary aGVsbG8=", "of type bytes"),
        (b"a: !!set {x, y}", "of type set"),
        (b"a: !!python/object:os.system x", "not YAML"),
        (b"a: &a [*a]", "nested deeper than 64"),
        (b'a: "\\ud800"', "lone surrogate"),
        (b"a: 1\nb: 2\na: 3", "the key 'a' of line 3 is there twice"),
        (b"a: [", "not YAML"),
        (b"a: caf\xe9", "not UTF-8: byte 0xe9 at position 6"),
        ("a: 1".encode("utf-16"), "is UTF-16, not UTF-8"),
        (gzip.compress(b"a: 1", mtime=0), "compressed with gzip"),
        (b"x" * 600_000, "the limit is 524,288"),
        (LAUGHS, "more than 100,000 values"),
    ],
)
def test_yaml_that_breaks_later_is_refused_on_one_line(tmp_path, content, message):
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as refusal:
        read_yaml(file)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 700


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 64"),
        (b'{"a": ' * 70 + b"1" + b"}" * 70, "nested deeper than 64"),
        (b"9" * 5000, "not JSON"),
        (b'"\\ud800"', "lone surrogate"),
        (b'{"a": 1', "not JSON"),
        (b"", "not JSON"),
        (b'"caf\xe9"', "not UTF-8"),
        (gzip.compress(b"{}", mtime=0), "compressed with gzip"),
    ],
)
def test_json_that_breaks_later_is_refused_on_one_line(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        read_json(file)
    assert "\n" not in str(refusal.value)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in [("pipe", "a pipe or device"), (".", "a folder"), ("none", "No such file"), ("a\0b", "null")]:
        with pytest.raises(DataError, match=message):
            read_text(tmp_path / path)


def test_an_object_is_asked_for_by_name(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(DataError, match=r"must hold a JSON object; found \[1\]"):
        read_json_object(tmp_path / "a.json")


def test_nan_passes_where_it_is_a_score():
    check_plain({"score": float("nan")}, "results")


def test_large_values_are_shown_short():
    assert len(shown({"a": ["x" * 1000] * 1000})) < 200
    assert shown(10**5000) == "a int that is too large to print"
