"""Training a pooling on a frozen backbone, from cached layer summaries over from texts: pairs a second.

A step is tokenization or look-up, forward, InfoNCE, backward and AdamW. The note says what the cache takes on the disk.
Run it as

    python benchmarks/cached_training.py [--device cuda] [--shape small]
"""

from __future__ import annotations

import itertools
import random
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from harness import Row, arguments, compare, finish, our_model, random_backbone, seconds, words
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import batch_to_device

from st_llmpool.summary_cache import cached_summaries

PAIRS, TOKENS, BATCH = 256, 64, 32
FIGURE = 10.0  # times as many pairs a second


def texts_of(model: SentenceTransformer, count: int) -> list[str]:
    """Returns texts of about so many tokens."""
    rng, known = random.Random(0), words(model.tokenizer)
    return ["".join(rng.choices(known, k=TOKENS)) for _ in range(count)]


def steps_of(model: SentenceTransformer) -> Callable[[list[str]], None]:
    """Returns a function that trains the pooling on pairs, one step."""
    loss = MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

    def step(texts: list[str]) -> None:
        halves = texts[: len(texts) // 2], texts[len(texts) // 2 :]
        loss([batch_to_device(model.preprocess(half), model.device) for half in halves], None).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(pooling: str, folder: Path, base: str, args: Namespace) -> Row:
    """Returns the time of a step without the cache over that with it, in the order ABBA."""
    model = our_model(base, "5", args.device, pooling=pooling, pooling_kwargs={})
    model[0].requires_grad_(False)
    model.train()
    texts, step = texts_of(model, 2 * (2 * BATCH if args.quick else PAIRS)), steps_of(model)
    batches = itertools.cycle(texts[start : start + 2 * BATCH] for start in range(0, len(texts), 2 * BATCH))
    times: dict[bool, list[float]] = {True: [], False: []}
    with cached_summaries(model, folder) as cache:
        cache.fill(texts)
        per_text = sum(file.stat().st_size for file in cache.store.folder.iterdir()) / len(cache.store)
    for place in range(args.repetitions + 2):
        for is_ours in (True, False) if place % 2 else (False, True):
            with ExitStack() as stack:
                if is_ours:
                    stack.enter_context(cached_summaries(model, folder))
                model.train()
                step(next(batches))  # the first look at a row checks it
                batch = next(batches)
                times[is_ours].append(seconds(lambda batch=batch: step(batch), args.device))
    rates = [BATCH / sorted(found)[len(found) // 2] for found in (times[True], times[False])]
    note = f"{rates[0]:,.0f} and {rates[1]:,.0f} pairs a second; {per_text / 1024:.1f} KiB a text"
    what = f"training {pooling} on {args.shape}, {TOKENS} tokens: texts over cache"
    return compare(what, times[True], times[False], limit=FIGURE, at_least=True, note=note)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measures and prints the table."""
    args = arguments(__doc__, argv, ("--shape", {"default": "small"}))
    args.shape = "tiny" if args.quick else args.shape
    with tempfile.TemporaryDirectory() as scratch:
        base = random_backbone(args.shape, Path(scratch), args.device)
        rows = [measure(pooling, Path(scratch) / "cache", base, args) for pooling in ("multi_layer", "scalar_mix")]
    return finish("Training on cached summaries", rows, args)


if __name__ == "__main__":
    main()
