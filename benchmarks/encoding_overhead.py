"""What design 5 (compact) costs over mean pooling with bidirectional attention, plain sentence-transformers.

Same backbone, same weights, same token ids, through the whole model. Time alternates (ABBA) in one process; peak
memory, weights included, is that of a fresh process for each variant. Run it as

    python benchmarks/encoding_overhead.py [--device cuda]

The plain alternative reads one layer once. Ours reads every layer once, and the head's weights: the floor is the share
that these weights are of all, where a text is so short that reading weights is all that takes time.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import (
    Row,
    alternate,
    arguments,
    compare,
    finish,
    in_fresh_process,
    once,
    our_model,
    peak_memory,
    plain_model,
    random_backbone,
    random_batch,
)

from st_llmpool.modules.multi_layer_pooling import MultiLayerPooling

TIME, MEMORY, HEAD = 1.05, 1.10, 0.02
#: The sizes of the pooling whose quality `st-llmpool study sizes` compares.
HEADS: dict[str, dict[str, Any]] = {
    "compact": {},
    "1 latent": {"num_latents": 1},
    "64 latents": {"num_latents": 64},
    "feed-forward x4": {"mlp_ratio": 4},
    "paper": {"preset": "paper"},
}
#: Shape -> (texts, tokens).
CELLS = {
    "cpu": {"qwen2-0.5b": [(1, 16), (8, 16), (1, 128), (4, 64), (1, 512)]},
    "cuda": {
        shape: [(texts, tokens) for texts in (1, 32, 256) for tokens in (16, 128, 512, 2048)]
        for shape in ("qwen3-0.6b", "mistral-7b")
    },
    "quick": {"tiny": [(1, 8), (2, 16)]},
}


def peak(folder: str, variant: str, cells: list[tuple[int, int]], device: str) -> float:
    """Returns the most memory that any cell takes, in MiB."""
    model = (
        our_model(folder, "5", device) if variant == "ours" else plain_model(folder, "bidirectional", "mean", device)
    )
    with peak_memory(device) as found, torch.inference_mode():
        for texts, tokens in cells:
            model(random_batch(model, texts, tokens))
    return found[0]


def measure(shape: str, cells: list[tuple[int, int]], folder: str, args: Namespace) -> list[Row]:
    """Returns the rows of one backbone."""
    peaks = (in_fresh_process(peak, folder, who, cells, args.device, quick=args.quick) for who in ("ours", "plain"))
    ours = our_model(folder, "5", args.device)
    plain = plain_model(folder, "bidirectional", "mean", args.device, like=ours)
    head, backbone = (sum(weight.numel() for weight in ours[index].parameters()) for index in (1, 0))
    floor = f"the head is {head / backbone:.1%} of the weights"
    rows = []
    for texts, tokens in cells:
        batch = random_batch(ours, texts, tokens)
        times = alternate(partial(run, ours, batch), partial(run, plain, batch), args)
        rows.append(compare(f"encode {shape}, {texts} x {tokens}", *times, limit=TIME, note=floor))
    batch = random_batch(ours, 1, 32)
    features = run(ours[0], batch)
    for name, size in HEADS.items() if args.device == "cpu" and not args.quick else [("compact", {})]:
        pooling = MultiLayerPooling(ours.get_embedding_dimension(), ours[0].num_layers, **size).to(args.device).eval()
        times = alternate(partial(run, pooling, features), partial(run, ours[0], batch), args)
        limit = HEAD if name == "compact" else None
        rows.append(compare(f"head alone over backbone {shape}, 1 x 32, {name}", *times, limit=limit))
    return [*rows, once(f"encode {shape}, peak MiB", *peaks, limit=MEMORY)]


@torch.inference_mode()
def run(module: torch.nn.Module, features: dict[str, Any]) -> dict[str, Any]:
    """Runs a module on a copy of the features."""
    return module(dict(features))


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measures and prints the table."""
    args = arguments(__doc__, argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape, cells in CELLS["quick" if args.quick else args.device].items():
            rows += measure(shape, cells, random_backbone(shape, Path(scratch), args.device), args)
    return finish("Design 5 over mean and bidirectional", rows, args)


if __name__ == "__main__":
    main()
