"""A training step: design 5 against mean pooling, and against a loop as the code of the paper runs it.

Contrastive steps over three columns (query, positive, hard negative), LoRA as in the paper, plain SGD, the same token
ids. Run it as

    python benchmarks/training.py [--device cuda]

The first rows are time and peak memory over `mean` and bidirectional, both by sentence-transformers' own loss. The last
is against three separate forwards that keep all hidden states, with the head in the paper's size computed unfolded and
repeated over the batch (arXiv 2409.02727, written anew here).
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from folded_head import paper_arithmetic
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
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn import functional as F

from st_llmpool.adapters import add_adapter
from st_llmpool.training.arguments import enable_gradient_checkpointing

OVERHEAD, OVER_PAPER = 1.10, 2.0


def trained_model(folder: str, variant: str, checkpointing: bool, device: str, **changes: Any) -> SentenceTransformer:
    """Returns a model with LoRA in training mode; `changes` are arguments of `build_embedder`."""
    model = (
        our_model(folder, variant, device, **changes)
        if variant != "plain"
        else plain_model(folder, "bidirectional", "mean", device)
    )
    add_adapter_to(model)
    if checkpointing:
        enable_gradient_checkpointing(model.transformers_model)
    return model.train()


def add_adapter_to(model: SentenceTransformer) -> None:
    """Adds LoRA; a plain backbone has no attention mode of ours to restore."""
    if not hasattr(model[0], "attention"):
        model[0].attention = "bidirectional"
    add_adapter(model, "paper")


def step_by_loss(model: SentenceTransformer, columns: list[dict[str, Any]]) -> Callable[[], None]:
    """Returns a step of sentence-transformers' loss, which runs positives and negatives as one forward."""
    loss = MultipleNegativesRankingLoss(model)
    return partial(update, model, lambda: loss([dict(column) for column in columns], torch.empty(0)))


def step_of_the_paper(model: SentenceTransformer, columns: list[dict[str, Any]]) -> Callable[[], None]:
    """Returns a step as the paper's code runs it, on the weights of `model`."""
    pooling = model[1]

    def embed(column: dict[str, Any]) -> torch.Tensor:
        states = model[0].model(**column, output_hidden_states=True).hidden_states[1:]
        summaries = torch.stack([state.mean(dim=1) for state in states], dim=1)
        return F.normalize(paper_arithmetic(pooling.cross_attention, summaries + pooling.layer_table), dim=1)

    def loss() -> torch.Tensor:
        query, *candidates = (embed(column) for column in columns)
        scores = 20 * query @ torch.cat(candidates).T
        return F.cross_entropy(scores, torch.arange(len(query), device=scores.device))

    return partial(update, model, loss)


def update(model: SentenceTransformer, loss: Callable[[], torch.Tensor]) -> None:
    """Runs forward, backward and an update."""
    model.zero_grad()
    loss().backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight.sub_(weight.grad, alpha=1e-6)


def peak(folder: str, variant: str, checkpointing: bool, device: str, texts: int, tokens: int) -> float:
    """Returns the most memory that three steps take, in MiB; the first alone finds none that was freed before."""
    model = trained_model(folder, variant, checkpointing, device)
    columns = [random_batch(model, texts, tokens) for _ in range(3)]
    step = step_by_loss(model, columns)
    with peak_memory(device) as found:
        for _ in range(3):
            step()
    return found[0]


def over_mean(folder: str, shape: str, args: Namespace, texts: int, tokens: int) -> list[Row]:
    """Returns time and memory over the plain alternative, without and with gradient checkpointing."""
    rows = []
    for checkpointing in (False, True):
        cell = (checkpointing, args.device, texts, tokens)
        peaks = [in_fresh_process(peak, folder, who, *cell, quick=args.quick) for who in ("5", "plain")]
        models = [trained_model(folder, who, checkpointing, args.device) for who in ("5", "plain")]
        columns = [random_batch(models[0], texts, tokens) for _ in range(3)]
        times = alternate(*(step_by_loss(model, columns) for model in models), args)
        what = f"train {shape}, 3 x {texts} x {tokens}{', checkpointing' * checkpointing}"
        rows.append(compare(what, *times, limit=OVERHEAD))
        rows.append(once(f"{what}, peak MiB", *peaks, limit=OVERHEAD))
    return rows


def in_one_forward(folder: str, shape: str, args: Namespace, texts: int) -> Row:
    """Returns the time of one forward and backward for queries and longer documents together, over one for each.

    sentence-transformers runs columns of different prompts one by one; together, the short ones are padded.
    """
    model = trained_model(folder, "5", checkpointing=False, device=args.device)
    short, long = (random_batch(model, rows, tokens) for rows, tokens in ((texts, 16), (2 * texts, 64)))
    padded = {name: F.pad(value, (0, 64 - 16)) for name, value in short.items()}
    together = {name: torch.cat([padded[name], long[name]]) for name in long}

    def step(batches: list[dict[str, Any]]) -> None:
        update(model, lambda: sum(model(dict(batch))["sentence_embedding"].sum() for batch in batches))

    times = alternate(partial(step, [together]), partial(step, [short, long]), args)
    return compare(f"train {shape}, queries and documents in one forward", *times, note="not built")


def over_paper(folder: str, shape: str, args: Namespace, texts: int, tokens: int) -> Row:
    """Returns samples per second over the paper's loop, on one model and the same columns."""
    model = trained_model(folder, "5" if args.quick else "paper-5", checkpointing=False, device=args.device)
    columns = [random_batch(model, texts, tokens) for _ in range(3)]
    times = alternate(step_by_loss(model, columns), step_of_the_paper(model, columns), args)
    what = f"train {shape} with the paper's head, 3 x {texts} x {tokens}"
    return compare(what, *times, limit=OVER_PAPER, at_least=True)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measures and prints the table."""
    args = arguments(__doc__, argv)
    shape, texts, tokens = ("tiny", 2, 8) if args.quick else ("small", 8, 32)
    if args.device == "cuda":
        shape, texts, tokens = "qwen3-0.6b", 32, 256
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_backbone(shape, Path(scratch), args.device)
        rows = over_mean(folder, shape, args, texts, tokens)
        rows.append(in_one_forward(folder, shape, args, texts))
        shape = "tiny" if args.quick else "qwen2-0.5b"
        texts, tokens = (16, 128) if args.device == "cuda" else (1, 16)
        rows.append(over_paper(random_backbone(shape, Path(scratch), args.device), shape, args, texts, tokens))
    return finish("Training steps", rows, args)


if __name__ == "__main__":
    main()
