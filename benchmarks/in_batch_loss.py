"""What sentence-transformers' in-batch loss leaves to gain at a batch of 8,192, forward and backward.

Its cached loss works through the score matrix in chunks of rows. The floor here normalises once and multiplies once.
The note says what share of a training step the whole loss is. Run it as

    python benchmarks/in_batch_loss.py [--device cuda] [--batch 8192]
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial

import torch
from harness import SHAPES, Row, alternate, arguments, compare, finish
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import Tensor
from torch.nn import functional as F

SCALE = 20.0


def floor(queries: Tensor, documents: Tensor) -> Tensor:
    """Returns the loss from one product of the whole batch, with gradients."""
    scores = SCALE * F.normalize(queries) @ F.normalize(documents).T
    loss = F.cross_entropy(scores, torch.arange(len(queries), device=queries.device))
    loss.backward()
    return loss.detach()


def in_chunks(rows: int, queries: Tensor, documents: Tensor) -> Tensor:
    """Returns sentence-transformers' loss in chunks of so many rows, with gradients."""
    loss = CachedMultipleNegativesRankingLoss(
        SentenceTransformer(modules=[Normalize()]), scale=SCALE, mini_batch_size=rows
    )
    return loss.calculate_loss([[queries], [documents]], with_backward=True).detach()


def share_of_a_step(batch: int, width: int, tokens: int = 64) -> float:
    """Returns the FLOPs of the loss over those of embedding its texts, three times the forward, at Qwen2-0.5B shape."""
    depth, hidden, heads, key_heads, head_dim, inner = SHAPES["qwen2-0.5b"]
    attention = hidden * head_dim * (2 * heads + 2 * key_heads)
    forward = 2 * depth * (attention + 3 * hidden * inner) * tokens * 2 * batch
    return 2 * batch**2 * width / forward


def measure(rows: int, args: Namespace) -> Row:
    """Returns the time in chunks over the floor's."""
    texts = [torch.randn(args.batch, args.width, device=args.device, requires_grad=True) for _ in range(2)]
    runs = [partial(in_chunks, rows, *texts), partial(floor, *texts)]
    difference = abs(runs[0]() - runs[1]()).item()
    note = f"{share_of_a_step(args.batch, args.width):.0e} of a step's FLOPs, difference {difference:.0e}"
    what = f"in-batch loss of {args.batch:,} x {args.width}, chunks of {rows}, over one product"
    return compare(what, *alternate(*runs, args), note=note)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measures and prints the table."""
    sizes = {"--batch": 8192, "--width": 256}
    args = arguments(__doc__, argv, *((name, {"type": int, "default": value}) for name, value in sizes.items()))
    if args.quick:
        args.batch, args.width = 64, 8
    return finish("In-batch loss", [measure(16 if args.quick else 32, args)], args)


if __name__ == "__main__":
    main()
