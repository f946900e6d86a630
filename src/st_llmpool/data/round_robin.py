"""Assign rows of a pool to target rows in turn, each to its nearest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..modules.errors import ConfigurationError

#: Similarities, or numbers of the pool's rows, held in memory at a time: 32 MB in float64.
BLOCK_SCORES = 4_000_000


@dataclass(frozen=True)
class Assignment:
    """The selected rows, in order of selection; each array is (k,).

    Attributes:
        rows: Indices into the pool.
        targets: Indices of the target rows that they were assigned to.
        scores: Cosine similarities.
        passes: Number of passes over the pool.
    """

    rows: np.ndarray
    targets: np.ndarray
    scores: np.ndarray
    passes: int


def round_robin(
    pool: np.ndarray, target: np.ndarray, count: int, *, candidates: int | None = None, block_scores: int = BLOCK_SCORES
) -> Assignment:
    """Assign to each target row in turn its most similar remaining row of the pool (RDS+, arXiv 2503.01807, alg. 1).

    Ties go to the first row. With more target rows than rows to select, the target rows that get one are spread evenly.

    The pool is read in blocks, and each target row keeps only its best candidates. When these run out, the
    pool is read again for candidates among the remaining rows. The result is that of the full similarity matrix,
    whatever the sizes: products are summed in float64 and compared in float32.

    Args:
        pool: (N, D) of length 1; may be a ``numpy.memmap`` that is larger than memory.
        target: (M, D) of length 1.
        count: Number of rows to select, k.
        candidates: Candidates per target row; None keeps twice its number of turns, and 64 more.
        block_scores: Similarities, or values of the pool's rows, held in memory at a time.

    Raises:
        ConfigurationError: If the pool has fewer than k rows, or there is no target row.

    Example:
        >>> pool = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
        >>> round_robin(pool, np.array([[1.0, 0.0], [0.6, 0.8]]), 3).rows
        array([0, 2, 1])
    """
    if not 1 <= count <= len(pool):
        raise ConfigurationError(f"{count} rows cannot be selected from {len(pool)}: select 1 to {len(pool)}.")
    if len(target) == 0:
        raise ConfigurationError("There is no target row: give at least one.")
    active = np.arange(min(count, len(target))) * len(target) // min(count, len(target))
    rounds = -(-count // len(active))
    size = min(candidates or 2 * rounds + 64, len(pool))
    block = max(block_scores // max(len(active), target.shape[1]), 1)
    wanted = target[active].astype(np.float64)
    is_left = np.ones(len(pool), dtype=bool)
    rows, scores, passes = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.float32), 0
    selected = 0
    while selected < count:
        passes += 1
        best_scores, best_rows = _candidates(pool, wanted, is_left, size, block)
        while selected < count:
            turn = selected % len(active)
            free = np.flatnonzero((best_rows[turn] >= 0) & is_left[best_rows[turn]])
            if len(free) == 0:
                break
            rows[selected], scores[selected] = best_rows[turn, free[0]], best_scores[turn, free[0]]
            is_left[rows[selected]] = False
            selected += 1
    return Assignment(rows, active[np.arange(count) % len(active)], scores, passes)


def _candidates(
    pool: np.ndarray, target: np.ndarray, is_left: np.ndarray, size: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and rows (M, size) of each target's best among the rows that are left, best first; -1 if none."""
    scores = np.full((len(target), size), -np.inf, dtype=np.float32)
    rows = np.full((len(target), size), -1, dtype=np.int64)
    for start in range(0, len(pool), block):
        found = start + np.flatnonzero(is_left[start : start + block])
        new = (target @ pool[found].astype(np.float64).T).astype(np.float32)
        # A later row must be better than the last candidate: among equals the first stays.
        changed = np.flatnonzero((new > scores[:, -1:]).any(axis=1))
        merged = np.concatenate([scores[changed], new[changed]], axis=1)
        merged_rows = np.concatenate([rows[changed], np.broadcast_to(found, (len(changed), len(found)))], axis=1)
        order = np.argsort(-merged, axis=1, kind="stable")[:, :size]  # stable: the first of equals stays first
        scores[changed] = np.take_along_axis(merged, order, axis=1)
        rows[changed] = np.take_along_axis(merged_rows, order, axis=1)
    return scores, rows
