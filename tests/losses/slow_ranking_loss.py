"""The ranking losses as their papers write them: one query, one document, one blend at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from st_llmpool.losses.hard_negative_mixing import HardNegativeMixing


def slow_loss(
    columns: list[Tensor],
    *,
    scale: float,
    gamma: float = 0.0,
    detach_focal: bool = True,
    mixing: HardNegativeMixing | None = None,
) -> Tensor:
    """Returns mean_i (1 - P_i)^gamma (-log P_i); `columns` are queries, positives and negatives, each (B, D)."""
    queries, documents = columns[0], [row for column in columns[1:] for row in column]
    total = queries.new_zeros(())
    for place, query in enumerate(queries):
        scores = [scale * cosine(query, document) for document in documents]
        others = [number for number in range(len(documents)) if number != place]
        negatives = [scores[number] for number in others]
        if mixing is not None and mixing.is_on:
            hardest = sorted(others, key=lambda number: -scores[number].item())[: mixing.settings.hardest]
            hard = [(documents[number], scores[number]) for number in hardest]
            negatives += [scale * cosine(query, blend) for blend in blends(hard, mixing, place, len(queries))]
        found = scores[place].exp() / sum([negative.exp() for negative in negatives], scores[place].exp())
        weight = (1 - found) ** gamma
        total = total - (weight.detach() if detach_focal else weight) * found.log()
    return total / len(queries)


def blends(hard: list[tuple[Tensor, Tensor]], mixing: HardNegativeMixing, place: int, batch_size: int) -> list[Tensor]:
    if mixing.settings.detach:
        hard = [(document.detach(), score.detach()) for document, score in hard]
    units = [document / document.norm() for document, _ in hard]
    first, second, share = (part[place] for part in mixing.draw(batch_size, len(hard)))
    mixed = [
        share[pair] * units[first[pair]] + (1 - share[pair]) * units[second[pair]]
        for pair in range(mixing.settings.pairwise)
    ]
    if mixing.settings.listwise:
        powers = [score.exp() for _, score in hard]
        mixed.append(sum(power / sum(powers) * unit for power, unit in zip(powers, units, strict=True)))
    return mixed


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum() / (first.norm() * second.norm())


def random_columns(rows: int, negatives: int, dimension: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, positives that lie near them, and columns of negatives; all with gradient."""
    torch.manual_seed(0)
    queries = torch.randn(rows, dimension, dtype=torch.float64)
    columns = [queries, queries + 0.7 * torch.randn(rows, dimension, dtype=torch.float64)]
    columns += [torch.randn(rows, dimension, dtype=torch.float64) for _ in range(negatives)]
    return [column.to(dtype).requires_grad_() for column in columns]
