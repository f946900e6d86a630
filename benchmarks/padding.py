"""How much of the padding that sentence-transformers' sort leaves is not computed, and what that is worth.

Texts of lognormal length (median 64 tokens, 95th percentile 512). `encode` sorts them by their characters; the padding
in its batches is the ceiling. Run it as

    python benchmarks/padding.py [--device cuda]
    python benchmarks/padding.py --fit      what a forward costs in tokens, the constant in length_groups.py
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from harness import (
    Row,
    alternate,
    arguments,
    compare,
    finish,
    our_model,
    plain_model,
    random_backbone,
    random_batch,
    seconds,
    words,
)
from sentence_transformers import SentenceTransformer

from st_llmpool import optimize_inference

MEDIAN, PERCENTILE_95, LONGEST, REQUIRED_SHARE, REQUIRED_SPEED = 64, 512, 2048, 0.9, 1.3


def corpus(tokenizer: object, size: int, longest: int) -> list[str]:
    """Returns texts of lognormal length, cut at the longest."""
    rng = random.Random(0)
    known = words(tokenizer)
    sigma = math.log(PERCENTILE_95 / MEDIAN) / statistics.NormalDist().inv_cdf(0.95)
    lengths = (min(longest, max(1, round(rng.lognormvariate(math.log(MEDIAN), sigma)))) for _ in range(size))
    return ["".join(rng.choices(known, k=length)) for length in lengths]


def computed_tokens(model: SentenceTransformer, texts: list[str], batch_size: int) -> int:
    """Returns the tokens, padding included, that the backbone computes for the texts."""
    counts: list[int] = []
    embeddings = model[0].model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, output: counts.append(args[0].numel()))
    model.encode(texts, batch_size=batch_size)
    hook.remove()
    return sum(counts)


def fit(device: str, shape: str, repetitions: int) -> float:
    """Returns the time of a forward of no tokens over the time of one token, from a line through several lengths."""
    with tempfile.TemporaryDirectory() as scratch:
        model = our_model(random_backbone(shape, Path(scratch), device), "mean-bidirectional", device)
    lengths = [8, 16, 32, 64, 128, 256]
    times = []
    with torch.inference_mode():
        for length in lengths:
            batch = random_batch(model, 1, length)
            model(dict(batch))
            times.append(statistics.median(seconds(lambda b=batch: model(dict(b)), device) for _ in range(repetitions)))
    slope, start = np.polyfit(lengths, times, 1)
    return start / slope


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measures and prints the table."""
    options = ("--fit", {"action": "store_true", "help": "only measure what a forward costs"})
    args = arguments(__doc__, argv, options, ("--batch-size", {"type": int, "default": 32}))
    if args.fit:
        for shape in ("tiny",) if args.quick else ("small", "qwen2-0.5b"):
            print(f"{shape}: a forward costs as much as {fit(args.device, shape, args.repetitions):.0f} tokens")
        return []
    shape = "tiny" if args.quick else {"cpu": "small", "cuda": "qwen3-0.6b"}[args.device]
    with tempfile.TemporaryDirectory() as scratch:
        ours = our_model(random_backbone(shape, Path(scratch), args.device), "mean-bidirectional", args.device)
    optimize_inference(ours)
    plain = plain_model("", "bidirectional", "mean", args.device, like=ours)
    many = sorted(corpus(ours.tokenizer, *((64, 40) if args.quick else (3200, LONGEST))), key=len, reverse=True)
    size = args.batch_size
    # Whole batches of the sorted corpus: encode sorts again and leaves them as they are.
    starts = range(0, len(many), size) if args.quick else range(len(many) // 8, len(many), len(many) // 4)
    texts = [text for start in starts for text in many[start : start + size]]
    runs = [lambda model=model: model.encode(texts, batch_size=size) for model in (ours, plain)]
    real = sum(map(len, ours.tokenizer(texts)["input_ids"]))
    left, found = (computed_tokens(model, texts, size) - real for model in (plain, ours))
    what = f"padding not computed, {len(texts)} texts, batch {size}"
    note = f"{left / (real + left):.1%} of all tokens were padding"
    share = 1 - found / left
    rows = [Row(what, left - found, left, share, share, share, REQUIRED_SHARE, at_least=True, note=note)]
    note = f"ceiling {(real + left) / real:.2f}, max difference {abs(runs[0]() - runs[1]()).max():.0e}"
    limit = REQUIRED_SPEED if args.device == "cuda" else None
    what = f"texts per second {shape}, {len(texts)} texts"
    rows.append(compare(what, *alternate(*runs, args), limit=limit, at_least=True, note=note))
    return finish("Padding", rows, args)


if __name__ == "__main__":
    main()
