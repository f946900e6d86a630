"""Sample batches from several datasets by weight; sentence-transformers has only equal and proportional sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler
from torch.utils.data import BatchSampler, ConcatDataset


class WeightedBatchSampler(MultiDatasetDefaultBatchSampler):
    """Draws each batch from one dataset; datasets come in random order, in proportion to their weights.

    An epoch has as many batches as all sets have together. A set whose batches run out starts again in a new order, so
    small sets can be repeated and large ones cut.

    Args:
        dataset: The sets, concatenated.
        batch_samplers: One for each set.
        weights: One for each set; only their ratios matter.
        generator: Source of the order, shared with the sets' samplers.
        seed: Seed of the first epoch.

    Example:
        >>> from torch.utils.data import SequentialSampler
        >>> sets = [range(100), range(100)]
        >>> samplers = [BatchSampler(SequentialSampler(one), 10, True) for one in sets]
        >>> batches = list(WeightedBatchSampler(ConcatDataset(sets), samplers, weights=[3, 1]))
        >>> sum(batch[0] < 100 for batch in batches), len(batches)
        (15, 20)
    """

    def __init__(
        self,
        dataset: ConcatDataset,
        batch_samplers: list[BatchSampler],
        weights: Sequence[float],
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, batch_samplers=batch_samplers, generator=generator, seed=seed)
        self.weights = list(weights)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of row numbers in the concatenated sets."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        counts = _apportion(len(self), self.weights)
        sets = [place for place, count in enumerate(counts) for _ in range(count)]
        order = [sets[place] for place in torch.randperm(len(sets), generator=generator).tolist()]
        if self.generator is not None:
            self.generator.manual_seed(self.seed + self.epoch)
        starts = [0, *self.dataset.cumulative_sizes]
        streams = [self._repeat(sampler) for sampler in self.batch_samplers]
        for place in order:
            yield [row + starts[place] for row in next(streams[place])]

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return sum(len(sampler) for sampler in self.batch_samplers)

    def _repeat(self, sampler: BatchSampler) -> Iterator[list[int]]:
        passes = 0
        while True:
            if hasattr(sampler, "set_epoch"):  # a sampler that seeds itself by the epoch would repeat its order
                sampler.set_epoch(self.epoch + 1_000_003 * passes)
            yield from sampler
            passes += 1


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` into integers in the ratio of `weights`, by largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: counts[place] - exact[place])
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    return counts
