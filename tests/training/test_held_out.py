"""Evaluation on held-out pairs, against ranks that are counted by hand."""

import math

import pytest
import torch
from datasets import Dataset

from st_llmpool.training.held_out import held_out_evaluator

VECTORS = {
    "q1": [1.0, 0.0, 0.0],
    "q2": [0.0, 1.0, 0.0],
    "Find: q1": [0.0, 0.0, 1.0],
    "Find: q2": [0.0, 0.0, 1.0],
    "p1": [0.6, 0.8, 0.0],
    "p2": [0.0, 0.9, 0.4],
    "n1": [0.9, 0.1, 0.4],
    "n2": [0.1, 0.1, 0.9],
}
PAIRS = {"query": ["q1", "q2", "q1"], "positive": ["p1", "p2", "p1"], "negative": ["n1", "n2", "p2"]}


class Lookup:
    """Embeds by a table; what the evaluator asks of a model."""

    similarity_fn_name = "cosine"
    model_card_data = type("Card", (), {"set_evaluation_metrics": lambda *args, **kwargs: None})()

    def __init__(self):
        self.seen = []

    def encode_query(self, texts, prompt=None, **options):
        return self.encode([f"{prompt or ''}{text}" for text in texts], **options)

    def encode_document(self, texts, **options):
        return self.encode(texts, **options)

    def encode(self, texts, truncate_dim=None, **options):
        self.seen += texts
        return torch.tensor([VECTORS[text][:truncate_dim] for text in texts])

    def similarity(self, queries, documents):
        normal = torch.nn.functional.normalize
        return normal(queries, dim=1) @ normal(documents, dim=1).T


def ndcg(*ranks: int) -> float:
    return sum(1 / math.log2(rank + 1) for rank in ranks) / len(ranks)


def evaluate(**options) -> dict[str, float]:
    evaluator = held_out_evaluator("held", Dataset.from_dict(PAIRS), batch_size=2, **{"query_prompt": None, **options})
    return evaluator(Lookup())


def test_each_query_ranks_all_positives_and_negatives_and_equal_texts_count_once():
    """q1 finds n1 first and p1 second; q2 finds p2 first."""
    model = Lookup()
    held_out_evaluator("held", Dataset.from_dict(PAIRS), query_prompt=None, batch_size=2)(model)
    assert sorted(model.seen) == ["n1", "n2", "p1", "p2", "q1", "q2"]
    found = evaluate()
    assert found["held_cosine_ndcg@10"] == pytest.approx(ndcg(2, 1))
    assert found["held_cosine_accuracy@1"] == pytest.approx(0.5)
    assert found["held_cosine_mrr@10"] == pytest.approx((1 / 2 + 1) / 2)


def test_a_prompt_is_put_before_queries_alone():
    """Both queries become (0, 0, 1), which is nearest to n2, then p2 and n1; p1 is last."""
    assert evaluate(query_prompt="Find: ")["held_cosine_ndcg@10"] == pytest.approx(ndcg(4, 2))


def test_truncated_vectors_are_ranked_by_their_first_dimensions():
    """Without its third dimension n2 passes p1 for q1."""
    assert evaluate(truncate_dim=2)["held_cosine_ndcg@10"] == pytest.approx(ndcg(3, 1))
