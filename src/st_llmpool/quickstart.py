"""Train a search model on this machine's docstrings, offline, and show what training gained."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from .data import builtin_backbone, docstring_pairs
from .designs import DESIGNS, build_embedder
from .evaluation import bm25_baseline, evaluate, load_suite
from .hub.fresh_process import PROBES, embed_in_fresh_process
from .modules.errors import InputError
from .training import Recipe, train

SEARCHES = ("shortest path between two nodes", "show a progress bar in the terminal", "remove rows with missing values")

TOLERANCE = 1e-5
MAX_SEQ_LENGTH = 64  # tokens; enough for a summary and the start of its text, and twice as fast as 128


def quickstart(
    output_dir: str | Path, *, steps: int = 70, documents: int = 500, console: Console | None = None
) -> dict[str, float]:
    """Train design 5 on docstrings, show the gain on unseen packages, and answer three searches.

    Args:
        output_dir: Folder for the model, the checkpoints and mteb's result files.
        steps: Optimizer steps.
        documents: Number of documents in the evaluation.
        console: Where to print.

    Returns:
        nDCG@10 of ``bm25``, ``mean_untrained``, ``design_5_untrained`` and ``design_5_trained``.

    Raises:
        InputError: If the saved model gives other vectors when loaded in a fresh process.

    Example:
        >>> quickstart("runs/quickstart")["design_5_trained"]  # doctest: +SKIP
        0.71
    """
    out, console, start = Path(output_dir), console or Console(), time.monotonic()
    console.rule("1. A language model becomes an embedding model")
    untrained = build_embedder(builtin_backbone(), **DESIGNS["5"].as_kwargs(), max_seq_length=MAX_SEQ_LENGTH)
    mean = build_embedder(
        builtin_backbone(), **DESIGNS["mean-bidirectional"].as_kwargs(), max_seq_length=MAX_SEQ_LENGTH
    )
    console.print("Reading the docstrings of the installed packages (about a minute the first time).")
    pairs = docstring_pairs("train")
    console.print(f"{len(pairs):,} training pairs from {len({pair.distribution for pair in pairs})} packages.")

    console.rule("2. Before training, on packages that training never sees")
    scores = {"bm25": bm25_baseline(load_suite("builtin", limit=documents)[0])}
    scores["mean_untrained"] = _ndcg(mean, out, documents)
    scores["design_5_untrained"] = _ndcg(untrained, out, documents)

    console.rule("3. Training design 5: bidirectional attention, pooling over all layers")
    # A finished run is reused, an interrupted one continues.
    trained = train(_recipe(out, steps), resume=True).model

    console.rule("4. After training")
    scores["design_5_trained"] = _ndcg(trained, out, documents)
    console.print(_table(scores, documents))
    console.print(_verdict(scores))

    console.rule("5. Saved, and loaded in a fresh process by plain sentence-transformers")
    difference = _reload(trained, out / "model")
    console.print(
        f'SentenceTransformer("{out / "model"}", trust_remote_code=True): vectors differ by at most {difference:.0e}.'
    )

    console.rule("6. Search")
    for table in _search(trained, documents):
        console.print(table)
    (out / "quickstart.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")
    console.print(f"Done in {time.monotonic() - start:.0f} s. The model is in {out / 'model'}.")
    return scores


def _recipe(out: Path, steps: int) -> Recipe:
    return Recipe.from_dict(
        {
            "output_dir": str(out),
            "model": {"base": "builtin", "design": "5", "tune": "full", "max_seq_length": MAX_SEQ_LENGTH},
            "data": [{"source": "docstrings"}],
            "loss": {"num_negatives": 0},
            "training": {
                "max_steps": steps,
                "batch_size": 48,
                "learning_rate": 5e-4,
                "warmup_steps": 0.1,
                "save_steps": steps,
                "save_total_limit": 1,
            },
        }
    )


def _ndcg(model: SentenceTransformer, out: Path, documents: int) -> float:
    result = evaluate(model, output_dir=out / "results", suite="builtin", limit=documents, show_progress=False)
    return result.rows[0].score


def _table(scores: dict[str, float], documents: int) -> Table:
    table = Table("", title=f"Finding a docstring by its first sentence, {documents} documents of unseen packages")
    table.add_column("nDCG@10", justify="right")
    names = {
        "bm25": "BM25 (word overlap)",
        "mean_untrained": "mean of the tokens, untrained",
        "design_5_untrained": "design 5, untrained",
        "design_5_trained": "design 5, trained",
    }
    for key, name in names.items():
        table.add_row(name, f"{scores[key]:.3f}")
    return table


def _verdict(scores: dict[str, float]) -> str:
    gain, gap = (scores["design_5_trained"] - scores[key] for key in ("mean_untrained", "bm25"))
    relation = "above" if gap > 0 else "below"
    return f"Training gained {gain:+.3f}; the model is {abs(gap):.3f} {relation} BM25."


def _reload(model: SentenceTransformer, folder: Path) -> float:
    """Return the largest difference from the vectors of a fresh process, padded on either side and one by one."""
    fresh = embed_in_fresh_process(folder.resolve(), trust_remote_code=True)
    difference = float(np.abs(fresh - model.encode(list(PROBES))).max())
    if difference > TOLERANCE:
        raise InputError(
            f"{folder} gives other vectors when loaded: difference {difference:.1e}, limit {TOLERANCE:.0e}."
        )
    return difference


def _search(model: SentenceTransformer, documents: int) -> Iterator[Table]:
    pairs = docstring_pairs("test")[:documents]
    texts = [f"{pair.query} {pair.positive}" for pair in pairs]
    embeddings = model.encode_document(texts)
    for query in SEARCHES:
        table = Table("score", "package", "docstring", title=f"“{query}”", title_justify="left", expand=True)
        similarity = model.similarity(model.encode_query(query), embeddings)[0]
        for score, index in zip(*(part.tolist() for part in torch.topk(similarity, 3)), strict=True):
            table.add_row(f"{score:.2f}", pairs[index].distribution, texts[index][:120])
        yield table
