"""Every task type is scored against a computation that shares no code with mteb."""

from __future__ import annotations

import math

import mteb
import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import v_measure_score

from st_llmpool.evaluation import evaluate, load_suite
from st_llmpool.evaluation.encoder import FiniteEncoder
from st_llmpool.evaluation.run import run_tasks
from tests.evaluation.tiny_suite import (
    CANDIDATES,
    CORPUS,
    PAIRS,
    QRELS,
    QUERIES,
    STS,
    TEST,
    TOPICS,
    TRAIN,
    static_model,
    write_suite,
    write_table,
)


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Main scores of the tiny model on all types, from Parquet."""
    folder = tmp_path_factory.mktemp("scores")
    result = evaluate(static_model(), suite=write_suite(folder / "data"), output_dir=folder, show_progress=False)
    return result.scores


def unit(model, texts):
    embeddings = model.encode(texts).astype(np.float64)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def slow_ndcg_at_10(ranking: list[str], grades: dict[str, int]) -> float:
    """By the definition (linear gains, as trec_eval), one rank at a time."""
    gain = sum(grades.get(document, 0) / math.log2(rank + 1) for rank, document in enumerate(ranking[:10], start=1))
    ideal = sorted(grades.values(), reverse=True)[:10]
    return gain / sum(grade / math.log2(rank + 1) for rank, grade in enumerate(ideal, start=1))


def slow_average_precision(relevant: list[bool]) -> float:
    hits = [sum(relevant[: rank + 1]) / (rank + 1) for rank, hit in enumerate(relevant) if hit]
    return sum(hits) / len(hits)


def test_retrieval_is_ndcg_at_10_over_title_and_text(scores, model):
    documents = [f"{title} {text}" for title, text in zip(CORPUS["title"], CORPUS["text"], strict=True)]
    similarity = unit(model, QUERIES["text"]) @ unit(model, documents).T
    values = []
    for query, row in zip(QUERIES["id"], similarity, strict=True):
        ranking = [CORPUS["id"][position] for position in np.argsort(-row)]
        judged = zip(QRELS["query-id"], QRELS["corpus-id"], QRELS["score"], strict=True)
        values.append(slow_ndcg_at_10(ranking, {document: grade for name, document, grade in judged if name == query}))
    assert scores["TinySearch"] == pytest.approx(np.mean(values), abs=1e-4)


def test_sts_is_spearman_of_cosines(scores, model):
    cosines = (unit(model, STS["sentence1"]) * unit(model, STS["sentence2"])).sum(axis=1)
    assert scores["TinySts"] == pytest.approx(spearmanr(cosines, STS["score"]).statistic, abs=1e-6)


def test_pair_classification_is_the_best_average_precision(scores, model):
    first, second = model.encode(PAIRS["sentence1"]), model.encode(PAIRS["sentence2"])
    measures = [
        (unit(model, PAIRS["sentence1"]) * unit(model, PAIRS["sentence2"])).sum(axis=1),
        (first * second).sum(axis=1),
        -np.abs(first - second).sum(axis=1),
        -np.linalg.norm(first - second, axis=1),
    ]
    labels = np.array(PAIRS["label"], dtype=bool)
    expected = max(slow_average_precision(labels[np.argsort(-measure)].tolist()) for measure in measures)
    assert scores["TinyPairs"] == pytest.approx(expected, abs=1e-6)


def test_classification_is_the_mean_accuracy_of_ten_eight_shot_fits(scores, model):
    train, test = model.encode(TRAIN["text"]), model.encode(TEST["text"])
    labels, order, accuracies = np.array(TRAIN["label"]), list(range(len(TRAIN["label"]))), []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)
        rows = [row for label in set(TRAIN["label"]) for row in [r for r in order if labels[r] == label][:8]]
        fitted = LogisticRegression(max_iter=100).fit(train[rows], labels[rows])
        accuracies.append(np.mean(fitted.predict(test) == np.array(TEST["label"])))
    assert scores["TinyClasses"] == pytest.approx(np.mean(accuracies), abs=0.011)  # rows in another order: one of 210


def test_clustering_is_perfect_where_topics_share_no_word_and_poor_where_they_are_random(tmp_path, scores, model):
    assert scores["TinyTopics"] < 0.5
    suite = write_suite(tmp_path, [{"name": "TinyTopics", "type": "Clustering", "folder": "topics"}])
    words = ["apple", "tram", "blue", "slow"]
    write_table(tmp_path / "topics/test.parquet", {"text": [words[n % 4] for n in range(50)], "label": TOPICS["label"]})
    result = evaluate(model, suite=suite, output_dir=tmp_path / "out", show_progress=False)
    assert result.scores["TinyTopics"] == pytest.approx(v_measure_score([0, 1, 2, 3], [2, 1, 0, 3]), abs=0.2)


def test_reranking_is_mean_average_precision_over_own_candidates(scores, model):
    values = []
    for query, positives, negatives in zip(*CANDIDATES.values(), strict=True):
        order = np.argsort(-(unit(model, [query]) @ unit(model, positives + negatives).T)[0])
        values.append(slow_average_precision([bool(position < len(positives)) for position in order]))
    assert scores["TinyCandidates"] == pytest.approx(np.mean(values), abs=1e-4)


def test_json_lines_score_as_parquet_does(tmp_path, scores, model):
    tasks = load_suite(write_suite(tmp_path, suffix=".jsonl"))
    rows = run_tasks(FiniteEncoder(model, tasks), tasks, None, 32, show_progress=False)
    assert {row.task: row.score for row in rows} == pytest.approx(scores, abs=1e-5)


def test_score_does_not_depend_on_the_batch_size(suite, scores, model):
    tasks = load_suite(suite, tasks=["TinySearch", "TinySts"])
    rows = run_tasks(FiniteEncoder(model, tasks), tasks, None, 3, show_progress=False)
    assert {row.task: row.score for row in rows} == pytest.approx(
        {name: scores[name] for name in ("TinySearch", "TinySts")}, abs=1e-5
    )


def test_tasks_are_tasks_of_mteb_itself(suite):
    for task in load_suite(suite):
        assert isinstance(task, mteb.AbsTask)
        assert not task.data_loaded


def test_pairs_make_a_retrieval_task_whose_documents_are_the_positives(tmp_path, suite_of, model):
    suite = suite_of({"name": "TinyPairs2", "type": "Retrieval", "folder": "p", "files": {"pairs": "pairs.jsonl"}})
    pairs = {"query": ["apple", "car", "car"], "positive": ["apple pear", "car", "bus"]}
    write_table(suite.parent / "p/pairs.jsonl", pairs)
    (task,) = load_suite(suite)
    task.load_data()
    data = task.dataset["default"]["test"]
    assert sorted(data["corpus"]["text"]) == ["apple pear", "bus", "car"]
    assert sorted(len(answers) for answers in data["relevant_docs"].values()) == [1, 2]


def slow_bm25(query: str, candidates: list[str]) -> list[float]:
    """Lucene's BM25 (k1 1.5, b 0.75) with the statistics of all candidates of all queries."""
    everything = list(
        dict.fromkeys(text for column in ("positive", "negative") for row in CANDIDATES[column] for text in row)
    )
    lengths = [len(words(text)) for text in everything]
    mean = sum(lengths) / len(lengths)
    scores = []
    for text in candidates:
        score = 0.0
        for word in words(query):
            holders = sum(word in words(other) for other in everything)
            inverse = math.log(1 + (len(everything) - holders + 0.5) / (holders + 0.5))
            count = words(text).count(word)
            score += inverse * count / (count + 1.5 * (0.25 + 0.75 * len(words(text)) / mean))
        scores.append(score)
    return scores


def words(text: str) -> list[str]:
    return [word for word in text.split() if len(word) > 1]
