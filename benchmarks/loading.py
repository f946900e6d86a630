"""Loading and saving a shared model against its backbone alone.

A portable model is loaded by plain sentence-transformers, then the same backbone by transformers, alternately (ABBA),
and what a save writes is compared with the bytes of the parameters. Run it as

    python benchmarks/loading.py [--repetitions 10]

The required figures: at most one second over the backbone, the light attention proof apart; and no weight saved twice.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from st_llmpool import build_embedder
from st_llmpool.data import builtin_backbone

REQUIRED_SECONDS = 1.0
REQUIRED_SIZE = 1.02


def seconds(run: Callable[[], object]) -> float:
    """Returns how long one run takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def load_backbone(folder: Path) -> object:
    """Loads what transformers alone needs for the same texts."""
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)


def load_portable(folder: Path) -> SentenceTransformer:
    """Loads the whole model by plain sentence-transformers."""
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10, help="even, at least 10")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model = build_embedder(builtin_backbone(), verify=False)
        model.save_pretrained(str(folder))
        parameters = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        written = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        load_backbone(folder)  # warms up, as the next line does
        backbone_class = type(load_portable(folder)[0])  # of the folder's own code
        times: dict[str, list[float]] = {"backbone": [], "portable": [], "portable, proof apart": []}
        for which in chain.from_iterable(("b", "p", "p", "b") for _ in range(args.repetitions // 2)):
            if which == "b":
                times["backbone"].append(seconds(lambda: load_backbone(folder)))
            else:
                times["portable"].append(seconds(lambda: load_portable(folder)))
                with mock.patch.object(sys.modules[backbone_class.__init__.__module__], "check_attention"):
                    times["portable, proof apart"].append(seconds(lambda: load_portable(folder)))
    table = Table("", "median", "slowest", title=f"Loading the built-in backbone, {args.repetitions} times each")
    for name, values in times.items():
        table.add_row(name, f"{statistics.median(values):.2f} s", f"{max(values):.2f} s")
    console.print(table)
    more = statistics.median(times["portable, proof apart"]) - statistics.median(times["backbone"])
    met = "met" if more <= REQUIRED_SECONDS else "MISSED"
    console.print(f"Portable takes {more:.2f} s more than its backbone, limit {REQUIRED_SECONDS:.0f} s: {met}")
    met = "met" if written <= REQUIRED_SIZE * parameters else "MISSED"
    console.print(f"Saved {written / 2**20:.1f} MiB of weights for {parameters / 2**20:.1f} MiB of parameters: {met}")


if __name__ == "__main__":
    main()
