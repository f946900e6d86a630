"""How much of the device's matrix rate encoding reaches: model FLOPs over time, against one large matrix product.

The rate is measured here, in the weights' dtype; FLOPs are torch's own count of a forward of design 5. Run it as

    python benchmarks/utilisation.py [--device cuda]
"""

from __future__ import annotations

import dataclasses
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from harness import Row, alternate, arguments, compare, finish, our_model, random_backbone, random_batch
from sentence_transformers import SentenceTransformer
from torch.utils.flop_counter import FlopCounterMode

REQUIRED_SHARE = 0.6
#: Device -> shape, texts, tokens, side of the matrices.
CELLS = {"cpu": ("small", 4, 512, 1024), "cuda": ("mistral-7b", 32, 512, 8192), "quick": ("tiny", 2, 16, 64)}


def measure(model: SentenceTransformer, shape: str, texts: int, tokens: int, side: int, args: Namespace) -> Row:
    """Returns the ratio for one model and one size of batch."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    batch = random_batch(model, texts, tokens)
    left, right = (torch.randn(side, side, device=args.device, dtype=dtype) for _ in range(2))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(dict(batch))
    with torch.inference_mode():
        encode_times, matrix_times = alternate(lambda: model(dict(batch)), partial(torch.mm, left, right), args)
    # FLOPs a second of each: ours as a share of the matrix product's is a ratio of times for equal work.
    for_as_many = [time * counter.get_total_flops() / (2 * side**3) for time in matrix_times]
    row = compare(f"share of the matrix rate, {shape}, {texts} x {tokens}", encode_times, for_as_many, at_least=True)
    rate, top = (counter.get_total_flops() / value / 1e12 for value in (row.ours, row.plain))
    limit = REQUIRED_SHARE if args.device == "cuda" else None
    return dataclasses.replace(row, limit=limit, note=f"{rate:.3g} of {top:.3g} TFLOP/s")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measures and prints the table."""
    args = arguments(__doc__, argv)
    shape, texts, tokens, side = CELLS["quick" if args.quick else args.device]
    with tempfile.TemporaryDirectory() as scratch:
        model = our_model(random_backbone(shape, Path(scratch), args.device), "5", args.device)
    return finish("Utilisation", [measure(model, shape, texts, tokens, side, args)], args)


if __name__ == "__main__":
    main()
