"""What the benchmarks share: alternating runs, ratios with intervals, peak memory, random backbones and one table."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoTokenizer, LlamaConfig

from st_llmpool import DESIGNS, build_embedder
from st_llmpool.data import builtin_backbone
from st_llmpool.modules.attention import set_attention

#: Layers, width, heads, key-value heads, width of a head, feed-forward. The vocabulary is the built-in one: a look-up
#: costs no time.
SHAPES = {
    "tiny": (2, 64, 4, 2, 16, 128),
    "small": (8, 384, 6, 2, 64, 1024),
    "qwen2-0.5b": (24, 896, 14, 2, 64, 4864),
    "qwen3-0.6b": (28, 1024, 16, 8, 128, 3072),
    "mistral-7b": (32, 4096, 32, 8, 128, 14336),
}


@dataclass(frozen=True)
class Row:
    """One ratio. Times in seconds, memory in MiB.

    Attributes:
        what: The benchmark and the cell.
        ours: Median of ours.
        plain: Median of the plain alternative.
        ratio: Ours over plain, or plain over ours where `at_least`.
        low: Lower end of its 95 % interval.
        high: Upper end.
        limit: The figure to meet, None if there is none.
        at_least: More is better.
        note: A remark.
    """

    what: str
    ours: float
    plain: float
    ratio: float
    low: float
    high: float
    limit: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the interval reaches the figure; two equal runs differ by some per cent on a shared machine."""
        if self.limit is None:
            return ""
        return "met" if (self.high >= self.limit if self.at_least else self.low <= self.limit) else "MISSED"


def arguments(doc: str | None, argv: Sequence[str] | None, *more: tuple[str, dict[str, Any]]) -> argparse.Namespace:
    """Parses the arguments that all benchmarks take, and `more`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repetitions", type=int, default=10, help="of each variant; even, at least 10")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no more repetitions of a row after so long")
    parser.add_argument("--quick", action="store_true", help="shows that the script runs; the figures mean nothing")
    parser.add_argument("--json", type=Path, help="write the rows there")
    for name, options in more:
        parser.add_argument(name, **options)
    args = parser.parse_args(argv)
    if args.quick:
        args.repetitions = 2
    torch.manual_seed(0)
    return args


def finish(title: str, rows: list[Row], args: argparse.Namespace) -> list[Row]:
    """Prints the rows and writes them where the arguments say."""
    Console(width=140).print(table(title, rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    return rows


def table(title: str, rows: list[Row]) -> Table:
    """Returns the rows as a table."""
    found = Table(title=title)
    for name in ("what", "ours", "plain", "ratio (95 %)", "limit", "", "note"):
        found.add_column(name, justify="left" if name in ("what", "note") else "right")
    for row in rows:
        found.add_row(*cells(row))
    return found


def cells(row: Row) -> tuple[str, ...]:
    """Returns a row's texts."""
    sign = "" if row.limit is None else f"{'>=' if row.at_least else '<='} {row.limit:g}"
    interval = f"{row.ratio:.3g}" + (f" ({row.low:.3g} to {row.high:.3g})" if row.low < row.high else "")
    return row.what, f"{row.ours:.4g}", f"{row.plain:.4g}", interval, sign, row.verdict, row.note


def alternate(ours: Callable[[], Any], plain: Callable[[], Any], args: argparse.Namespace) -> list[list[float]]:
    """Returns the seconds of each run of ours and of the plain alternative, run in the order ABBA after one of each."""
    runs = {True: ours, False: plain}
    times: dict[bool, list[float]] = {True: [], False: []}
    for run in runs.values():
        seconds(run, args.device)
    start = time.perf_counter()
    for _ in range(args.repetitions // 2):
        for is_ours in (False, True, True, False):
            times[is_ours].append(seconds(runs[is_ours], args.device))
        if time.perf_counter() - start > args.seconds:
            break
    return [times[True], times[False]]


def seconds(run: Callable[[], Any], device: str = "cpu") -> float:
    """Returns how long one run takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(what: str, ours: list[float], plain: list[float], **more: Any) -> Row:
    """Returns the ratio of the medians; `more` are fields of the row."""
    top, bottom = (plain, ours) if more.get("at_least") else (ours, plain)
    middle = [statistics.median(values) for values in (ours, plain, top, bottom)]
    return Row(what, *middle[:2], middle[2] / middle[3], *interval(top, bottom), **more)


def once(what: str, ours: float, plain: float, **more: Any) -> Row:
    """Returns the ratio of two figures that are the same each time, which have no interval."""
    ratio = plain / ours if more.get("at_least") else ours / plain
    return Row(what, ours, plain, ratio, ratio, ratio, **more)


def interval(top: list[float], bottom: list[float], resamples: int = 5000) -> tuple[float, float]:
    """Returns the 95 % interval of median(top) / median(bottom) over resampled pairs."""
    rng = random.Random(0)
    pairs = list(zip(top, bottom, strict=True))
    ratios = []
    for _ in range(resamples):
        first, second = zip(*rng.choices(pairs, k=len(pairs)), strict=True)
        ratios.append(statistics.median(first) / statistics.median(second))
    low, *_, high = statistics.quantiles(ratios, n=40)
    return low, high


def in_fresh_process(function: Callable[..., Any], *args: Any, quick: bool = False) -> Any:
    """Calls a function of a module in a process of its own, so that no other variant's memory is in its peak."""
    if quick:
        return function(*args)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """Yields a list that holds, after the block, the most memory in MiB that the process had within it, weights too."""
    peak: list[float] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.append(torch.cuda.max_memory_allocated() / 2**20)
        return
    is_linux = Path("/proc/self/clear_refs").exists()
    if is_linux:
        Path("/proc/self/clear_refs").write_text("5")  # loading took more than running will
    yield peak
    if is_linux:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak.append(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10)
    else:
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def random_backbone(shape: str, folder: Path, device: str = "cpu", *, layers: int | None = None) -> str:
    """Saves a Llama of that shape with random weights and the built-in tokenizer; returns its folder.

    The weights are in float32 for a CPU and in bfloat16 for a GPU, as users run them there.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    depth, width, heads, key_heads, head_dim, inner = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(builtin_backbone())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        dtype=dtype,
    )
    folder = folder / f"{shape}-{layers or depth}"
    with torch.device(device):
        AutoModel.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    return str(folder)


def our_model(folder: str, design: str, device: str = "cpu", **changes: Any) -> SentenceTransformer:
    """Builds one of our designs; `changes` are arguments of `build_embedder`."""
    return build_embedder(folder, **{**DESIGNS[design].as_kwargs(), **changes}, verify=False, device=device).eval()


def plain_model(
    folder: str, attention: str, mode: str, device: str = "cpu", like: SentenceTransformer | None = None
) -> SentenceTransformer:
    """Builds sentence-transformers' own modules; `like` lends weights and tokenizer, so that both are held once."""
    backbone = Transformer(folder if like is None else builtin_backbone())
    if like is not None:
        backbone.model, backbone.processor = like[0].model, like[0].processor
    set_attention(backbone.model, attention)
    pooling = Pooling(backbone.model.config.hidden_size, pooling_mode=mode)
    return SentenceTransformer(modules=[backbone, pooling, Normalize()], device=device).eval()


def random_batch(model: SentenceTransformer, texts: int, tokens: int) -> dict[str, Any]:
    """Returns features of texts of the same length."""
    ids = torch.randint(10, model[0].model.config.vocab_size, (texts, tokens), device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def words(tokenizer: Any) -> list[str]:
    """Returns words, short and long, that are one token each, with the space before them."""
    found = (tokenizer.decode([index]) for index in range(len(tokenizer)))
    return [word for word in found if word[:1] == " " and word[1:].isalpha() and word.isascii()]


def machine(device: str) -> dict[str, str]:
    """Describes the machine."""
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    described = {"cpu": model, "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
    return described | {"torch": torch.__version__, "load at the end": f"{os.getloadavg()[0]:.1f}"}
