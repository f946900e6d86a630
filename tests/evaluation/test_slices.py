from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from random import Random

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_llmpool.evaluation import evaluate, load_suite, read_suite
from st_llmpool.evaluation.slices import cut, sample, sample_retrieval
from st_llmpool.modules.errors import ConfigurationError, DataError
from st_llmpool.stats.readers import read_results
from tests.evaluation.tiny_suite import CORPUS, QRELS, TEST, TRAIN, texts

SEARCH = {"name": "TinySearch", "type": "Retrieval", "folder": "search"}
CLASSES = {"name": "TinyClasses", "type": "Classification", "folder": "classes"}
CANDIDATES = {"name": "TinyCandidates", "type": "Reranking", "folder": "candidates"}
WORDS = {"test": {"text": ["who is it", "Whoever", "WHO?", "who", "the who"], "label": [3, 1, 3, 2, 1]}}


def kept(tables, **conditions):
    """Returns the numbers of the rows that stay."""
    numbered = {"test": tables["test"] | {"row": list(range(len(tables["test"]["text"])))}}
    return cut("Tiny", {"test": conditions}, numbered)["test"]["row"]


def data_of(suite):
    (task,) = load_suite(suite)
    task.load_data()
    return task.dataset


def test_conditions_keep_what_they_say_and_all_must_hold():
    assert kept(WORDS, text={"starts": ["who"]}) == [0, 2, 3]
    assert kept(WORDS, label={"in": [3, 2]}) == [0, 2, 3]
    assert kept(WORDS, text={"length": [0.0, 0.4]}) == [2, 3]
    assert kept(WORDS, text={"length": [0.4, 1.0], "starts": ["who"]}, label={"in": [3]}) == [0]


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_ranges_and_parts_side_by_side_divide_the_table(parts):
    table = {"test": {"text": texts(50, 1), "label": [number % 20 for number in range(50)]}}
    edges = np.linspace(0, 1, parts + 1).round(3).tolist()
    ranges = [kept(table, text={"length": list(pair)}) for pair in pairwise(edges)]
    groups = [kept(table, label={"part": f"{part + 1}/{parts}"}) for part in range(parts)]
    for slices in (ranges, groups):
        assert sorted(row for rows in slices for row in rows) == list(range(50))
    labels = [{row % 20 for row in rows} for rows in groups]
    assert sum(map(len, labels)) == 20, "a label is in two parts"
    assert max(map(len, labels)) - min(map(len, labels)) <= 1


@pytest.mark.parametrize(
    ("task", "where", "message"),
    [
        (SEARCH, {"corps": {"title": {"in": ["a"]}}}, "unknown table 'corps'.*Did you mean 'corpus'"),
        (SEARCH, {"corpus": {"titel": {"in": ["a"]}}}, "unknown column of corpus 'titel'.*Did you mean 'title'"),
        (SEARCH, {"corpus": {"title": {"is": ["a"]}}}, "unknown condition 'is'; known are in, starts, length, part"),
        (SEARCH, {"corpus": {"title": "a"}}, "where.corpus.title='a' must hold keys and values"),
        (SEARCH, {"corpus": {}}, "expected column of corpus"),
        (SEARCH, {"qrels": {"score": {"starts": ["1"]}}}, "does not fit a column of kind 'integer'"),
        (SEARCH, {"corpus": {"title": {"in": "a"}}}, "expected a list of texts or integers"),
        (SEARCH, {"corpus": {"title": {"starts": [1]}}}, "expected a list of words"),
        (SEARCH, {"corpus": {"text": {"length": [0.5, 0.5]}}}, "expected two numbers from 0 to 1, the smaller first"),
        (SEARCH, {"corpus": {"text": {"part": "3/2"}}}, "expected k/n"),
        (SEARCH, {"corpus": {"text": {"part": "1/" + "9" * 5000}}}, "expected k/n"),
        (CANDIDATES, {"test": {"positive": {"in": ["a"]}}}, "does not fit a column of kind 'texts'"),
    ],
)
def test_wrong_slice_is_refused_before_data_are_read(suite_of, task, where, message):
    with pytest.raises(ConfigurationError, match=message):
        load_suite(suite_of(task | {"where": where, "folder": "nowhere"}))


@pytest.mark.parametrize(
    ("task", "where", "message"),
    [
        (CLASSES, {"test": {"label": {"in": ["fruits"]}}}, "test.label is never 'fruits'.*Did you mean 'fruit'"),
        (CLASSES, {"test": {"text": {"starts": ["zebra"]}}}, "keeps no row of test.*zebra"),
        (SEARCH, {"queries": {"id": {"in": ["q0"]}}, "corpus": {"id": {"in": ["d1"]}}}, "keeps no query together"),
        (SEARCH, {"corpus": {"title": {"in": ["zebra"]}}}, "corpus.title is never 'zebra'"),
    ],
)
def test_empty_slice_is_refused_when_the_suite_is_loaded(suite_of, task, where, message):
    with pytest.raises(DataError, match=message):
        load_suite(suite_of(task | {"where": where}))


def test_search_in_some_documents_keeps_all_of_them_and_the_queries_that_they_answer(suite_of):
    documents = CORPUS["id"][:9]
    data = data_of(suite_of(SEARCH | {"where": {"corpus": {"id": {"in": documents}}}}))["default"]["test"]
    answers: dict[str, dict[str, int]] = {}
    for query, document, grade in zip(*QRELS.values(), strict=True):
        if document in documents:
            answers.setdefault(query, {})[document] = grade
    assert list(data["corpus"]["id"]) == documents
    assert data["relevant_docs"] == answers
    assert set(data["queries"]["id"]) == set(answers) != set(QRELS["query-id"])


def test_slice_learns_only_the_classes_that_it_tests(suite_of):
    data = data_of(suite_of(CLASSES | {"where": {"test": {"label": {"in": ["fruit", "colour"]}}}}))
    assert len(data["test"]) == sum(label != "vehicle" for label in TEST["label"])
    wanted = [text for text, label in zip(TRAIN["text"], TRAIN["label"], strict=True) if label != "vehicle"]
    assert data["train"]["text"][:] == wanted
    assert set(data["train"]["label"]) == {0, 1}


def test_slice_is_part_of_the_revision_and_no_slice_leaves_it_as_it_was(suite_of):
    def revision(**change):
        return load_suite(suite_of(SEARCH | change))[0].metadata.revision

    parts = {revision(where={"corpus": {"id": {"part": f"{part}/2"}}}) for part in (1, 2)}
    assert len(parts | {revision()}) == 3
    assert revision(where={}) == revision()


def test_accuracy_by_text_averages_to_the_accuracy_and_becomes_items(suite_of, tmp_path, model):
    result = evaluate(model, suite=suite_of(CLASSES), output_dir=tmp_path, show_progress=False)
    (scores,) = json.loads((result.folder / "TinyClasses.json").read_text())["scores"]["test"]
    shares = scores["accuracy_by_text"]
    assert list(shares) == [str(row) for row in range(len(TEST["text"]))]
    assert {round(10 * share, 6) % 1 for share in shares.values()} == {0}, "ten experiments"
    assert np.mean(list(shares.values())) == pytest.approx(scores["accuracy"], abs=1e-6)
    items = read_results([tmp_path], task_types={"TinyClasses": "Classification"}).items
    assert set(items["metric"]) == {"accuracy"}
    assert dict(zip(items["item"], items["score"], strict=True)) == pytest.approx(shares)


def test_shipped_slices_are_twelve_disjoint_tasks_of_each_type(shared_data):
    specs = read_suite("squad_slices").tasks
    assert Counter(spec.type for spec in specs) == dict.fromkeys(
        ["Retrieval", "STS", "Classification", "Clustering"], 12
    )
    seen: Counter[str] = Counter()
    sizes: dict[str, list[int]] = {}
    for task in load_suite("squad_slices", shared_data):
        task.load_data()
        kind = str(task.metadata.type)
        data = task.dataset["default"]["test"]["queries"] if kind == "Retrieval" else task.dataset["test"]
        sizes.setdefault(kind, []).append(len(data))
        if kind == "STS":
            keys = {f"{a}|{b}" for a, b in zip(data["sentence1"], data["sentence2"], strict=True)}
        else:
            keys = set(data["id" if kind == "Retrieval" else "text"])
        seen.update(f"{kind} {key}" for key in keys)
        task.unload_data()
    assert [key for key, count in seen.items() if count > 1] == []
    assert {kind: min(counts) >= 40 for kind, counts in sizes.items()} == dict.fromkeys(sizes, True)
    labels = [label for spec in specs if spec.type == "Classification" for label in spec.where["test"]["label"]["in"]]
    table = pyarrow.parquet.read_table(shared_data / "banking77/test.parquet")
    assert sorted(labels) == sorted(set(table["label_text"].to_pylist()))


IDS = st.sets(st.integers(0, 99), min_size=1, max_size=30).map(lambda keys: [f"k{key}" for key in keys])


@settings(max_examples=25, deadline=None)
@given(IDS, st.integers(1, 40))
def test_sample_keeps_the_order_and_the_limit(keys, limit):
    rows = sample(keys, limit)
    assert rows == sorted(set(rows))
    assert len(rows) == min(limit, len(keys))


@settings(max_examples=25, deadline=None)
@given(IDS, st.integers(1, 40), st.integers(0, 999))
def test_sample_does_not_depend_on_the_order_of_the_keys(keys, limit, seed):
    shuffled = Random(seed).sample(keys, len(keys))
    assert {keys[row] for row in sample(keys, limit)} == {shuffled[row] for row in sample(shuffled, limit)}


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 30), st.integers(2, 40), st.integers(0, 999))
def test_every_query_that_is_kept_keeps_its_answers(documents, queries, limit, seed):
    random = Random(seed)
    corpus, asked = [f"d{n}" for n in range(documents)], [f"q{n}" for n in range(queries)]
    relevant = {query: dict.fromkeys(random.sample(corpus, random.randint(1, 2)), 1) for query in asked}
    kept_queries, kept_documents = sample_retrieval(asked, corpus, relevant, limit)
    assert 1 <= len(kept_queries) <= limit
    assert len(kept_documents) == min(limit, documents)
    assert all(set(relevant[query]) <= kept_documents for query in kept_queries)


def test_limit_below_the_answers_of_every_query_is_an_error():
    with pytest.raises(DataError, match="limit=2 is too small"):
        sample_retrieval(["q"], ["a", "b", "c"], {"q": {"a": 1, "b": 1, "c": 1}}, 2)
