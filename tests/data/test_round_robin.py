"""Blocks and candidate lists of any size give what the whole matrix of similarities gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_llmpool.data.round_robin import round_robin
from st_llmpool.modules.errors import ConfigurationError


def brute_force(pool, target, count):
    """The whole matrix, one turn at a time; the first of equals."""
    similarities = [[float(sum(a * b for a, b in zip(row, other, strict=True))) for row in pool] for other in target]
    takers = list(range(len(target)))
    if count < len(target):
        takers = [place * len(target) // count for place in range(count)]
    left, rows, targets = set(range(len(pool))), [], []
    while len(rows) < count:
        taker = takers[len(rows) % len(takers)]
        row = max(sorted(left), key=lambda row: similarities[taker][row])
        left.remove(row)
        rows.append(row)
        targets.append(taker)
    return rows, targets


# Small integers: many ties, and sums without rounding.
vectors = st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=24)


@settings(deadline=None, max_examples=150)
@given(vectors, vectors, st.data())
def test_any_blocks_and_candidates_give_the_whole_matrix(pool, target, data):
    count = data.draw(st.integers(1, len(pool)))
    options = {"candidates": data.draw(st.integers(1, 4)), "block_scores": data.draw(st.integers(1, 80))}
    shares = round_robin(np.array(pool, dtype=np.float32), np.array(target, dtype=np.float32), count, **options)
    rows, targets = brute_force(pool, target, count)
    assert shares.rows.tolist() == rows
    assert shares.targets.tolist() == targets
    expected = [np.dot(pool[row], target[place]) for row, place in zip(rows, targets, strict=True)]
    np.testing.assert_allclose(shares.scores, expected)


def test_a_target_whose_candidates_were_taken_by_others_reads_the_pool_again():
    pool = np.array([[1.0, 0.1 * row] for row in range(9)])
    target = np.array([[1.0, 0.0]] * 3 + [[1.0, 1.0]])
    shares = round_robin(pool, target, 9, candidates=1)
    assert shares.passes > 1
    assert round_robin(pool, target, 9).passes == 1
    assert shares.rows.tolist() == brute_force(pool, target, 9)[0]


def test_equal_vectors_are_equal_whatever_block_they_are_in():
    generator = np.random.default_rng(0)
    same, other = generator.normal(size=(2, 193)).astype(np.float32)
    pool = np.stack([same if row in (3, 40, 77) else -other for row in range(100)])
    target = generator.normal(size=(2, 193)).astype(np.float32)
    target[0] = same
    for block in (1, 7, 50, 10_000):
        assert round_robin(pool, target[:1], 3, block_scores=block * 193).rows.tolist() == [3, 40, 77]


@pytest.mark.parametrize("targets", [2, 150])
def test_memory_does_not_grow_with_the_pool_whether_targets_are_few_or_many(targets):
    class Watched(np.ndarray):
        read: list[int] = []

        def __getitem__(self, key):
            part = super().__getitem__(key)
            self.read.append(len(part))
            return part

    generator = np.random.default_rng(0)
    pool, target = (generator.normal(size=(size, 50)) for size in (3_000, targets))
    Watched.read.clear()
    shares = round_robin(pool.view(Watched), target, 300, block_scores=30_000)
    assert max(Watched.read) * max(targets, 50) <= 30_000
    assert sum(Watched.read) >= 3_000
    assert shares.rows.tolist() == round_robin(pool, target, 300).rows.tolist()


@pytest.mark.parametrize("count", [0, 3])
def test_more_rows_than_there_are_cannot_be_taken(count):
    with pytest.raises(ConfigurationError, match=f"{count} rows cannot be selected from 2: select 1 to 2"):
        round_robin(np.eye(2), np.eye(2), count)
