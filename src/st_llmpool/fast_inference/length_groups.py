"""Run a padded batch in groups of texts of similar length, to compute less padding.

sentence-transformers sorts texts by characters and pads each batch to its longest text. More forwards on narrower
groups compute less padding, but each has a fixed overhead: the groups minimise the sum of both.
"""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..modules.errors import StLlmpoolError
from ..modules.layer_readout import TokenSpans

#: Runs a batch, features and spans, and returns the features with the outputs below.
Run = Callable[..., dict[str, Any]]
#: (B, T, D), (B, D) and, if layers are read, (B, L, D).
OUTPUTS = {"token_embeddings", "readout", "layer_summaries"}


class NotApplicable(StLlmpoolError):
    """A fast path does not apply to this backbone, for the reason in the message; caught during the comparison."""


#: Fixed overhead of one forward pass on a CPU, in token-equivalents; a constant, so that equal runs group equally.
#: A CPU reads every weight once for each forward: benchmarks/padding.py --fit measures 47 to 61 tokens. Twice that, as
#: smaller models lose more: at 24 and 48 batches of short texts were slower in groups.
CPU_FORWARD_COST = 96


def measure_forward_cost(forward: Callable[[int, int], Callable[[], object]]) -> int:
    """Measure the fixed overhead of one forward pass, in token-equivalents, rounded up to a power of two.

    A short text is timed, then batches twice as large each until one takes four times as long.

    Args:
        forward: Prepares `B` texts of `T` tokens; what it returns runs the backbone on them and waits for the result.

    Example:
        >>> import time
        >>> measure_forward_cost(lambda texts, tokens: lambda: time.sleep(0.01 + 0.0001 * texts * tokens))
        128
    """

    def seconds(texts: int, tokens: int) -> float:
        run = forward(texts, tokens)
        run()  # compiles and loads what it needs
        return min(timeit.repeat(run, number=1, repeat=3))

    short = seconds(1, 8)
    for texts in (4, 8, 16, 32, 64, 128, 256, 512, 1024):
        long = seconds(texts, 64)  # short enough for attention to cost next to nothing
        if long >= 4 * short:
            break
    return 2 ** math.ceil(math.log2(max(1.0, texts * 64 * short / long)))


def length_groups(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Divide texts into groups that minimise padded tokens plus `cost` per group: indices by group, short texts first.

    Groups are runs of the sorted lengths, so dynamic programming finds them, in K² / 2 sums for K different lengths.

    Example:
        >>> length_groups([3, 90, 100, 4], cost=20)
        [[0, 3], [1, 2]]
    """
    order = np.argsort(lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    texts = np.concatenate([[0], counts.cumsum()])
    least, start = np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    for end in range(1, len(texts)):
        sums = least[:end] + cost + distinct[end - 1] * (texts[end] - texts[:end])
        start[end] = sums.argmin()
        least[end] = sums[start[end]]
    groups, end = [], len(distinct)
    while end:
        groups.append(order[texts[start[end]] : texts[end]].tolist())
        end = start[end]
    return groups[::-1]


def run_in_groups(
    features: dict[str, Any], spans: TokenSpans, run: Run, *, cost: int, shared: int = 0
) -> dict[str, Any]:
    """Run each group by `run` and return the outputs in the order of the batch, zero for padding that was not computed.

    A batch with padding on both sides is run as it is. `cost` is the overhead of a forward in tokens, and `shared` the
    number of leading tokens that `run` does not compute for each text.
    """
    mask = features["attention_mask"]
    starts_padded, ends_padded = (bool((mask[:, column] == 0).any()) for column in (0, -1))
    if starts_padded and ends_padded:
        return run(features, spans)
    width = mask.shape[1]
    count = torch.arange(1, width + 1, device=mask.device)
    lengths = (mask.bool() * (count.flip(0) if starts_padded else count)).amax(dim=1).tolist()
    groups = length_groups([length - shared for length in lengths], cost)
    if len(groups) == 1 and max(lengths) == width:
        return run(features, spans)
    found: dict[str, Tensor] = {}
    for rows in groups:
        longest = max(lengths[row] for row in rows)
        columns = slice(width - longest, width) if starts_padded else slice(longest)
        part = {name: value[rows][:, columns] if per_token(value, mask) else value for name, value in features.items()}
        outputs = run(part, TokenSpans(spans.mask[rows][:, columns]))
        for name in OUTPUTS & outputs.keys():
            output, place = outputs[name], (rows, columns) if name == "token_embeddings" else (rows,)
            if name not in found:
                shape = (*mask.shape, *output.shape[2:]) if len(place) == 2 else (len(mask), *output.shape[1:])
                found[name] = output.new_zeros(shape)
            found[name][place] = output
    return features | found


def per_token(value: object, mask: Tensor) -> bool:
    """Return whether a feature has one entry for each token of a padded batch, (B, T, ...)."""
    return isinstance(value, Tensor) and value.shape[:2] == mask.shape
