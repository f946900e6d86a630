"""What only a GPU can show: the parts that `scripts/gpu.py` runs, each in a process of its own.

A part is a function of a `Run`, which times each of its cells, writes what it gives, and goes on after one that fails.
With `--quick` the same code runs small on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import folded_head
import padding
import pytest
import shared_start
import torch
import utilisation
from encoding_overhead import run as infer
from harness import (
    Row,
    alternate,
    arguments,
    cells,
    compare,
    machine,
    once,
    our_model,
    peak_memory,
    plain_model,
    random_backbone,
    random_batch,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from transformers import AutoTokenizer

import training
from st_llmpool import DESIGNS, build_embedder, optimize_inference
from st_llmpool.data import builtin_backbone, docstring_pairs
from st_llmpool.training import Recipe, train
from st_llmpool.training.arguments import enable_gradient_checkpointing

TOP = Path(__file__).resolve().parents[1]
TIME, MEMORY, TRAINING = 1.05, 1.10, 1.10
#: Tests that use a GPU wherever there is one, and are not marked for it.
ALSO_ON_A_GPU = (
    "tests/modules/test_llm_transformer.py::test_layers_in_4_bits_compute_alike_before_and_after_an_inference",
    "tests/hub/test_export.py::test_an_adapter_keeps_its_quantised_base_and_merges_into_what_that_stands_for",
    "tests/test_precision.py",
    "tests/training/test_run.py::test_the_saved_model_is_the_trained_one[nf4]",
    "tests/training/test_run.py::test_a_resumed_run_has_the_losses_and_weights_of_one_that_was_never_stopped[nf4]",
)
#: The fixture `device` as the last argument of a test, or the mark.
MARKED = re.compile(r"\bdevice\):|\bmark\.gpu\b")
SMALL, LARGE = "qwen3-0.6b", "mistral-7b"
#: Rows of texts and tokens, the most telling first. At the larger shape more tokens would take minutes.
ENCODED = {
    LARGE: [(32, 512), (1, 16), (256, 128), (1, 512), (32, 16), (256, 16), (1, 2048), (32, 2048)],
    SMALL: [(32, 512), (1, 16), (256, 128), (32, 2048), (1, 512), (32, 16), (256, 16), (1, 2048), (256, 2048)],
}


class Run(Protocol):
    """What a part is given by `scripts/gpu.py`.

    Attributes:
        device: "cpu" or "cuda".
        quick: Everything small.
        scratch: Folder for files that all parts share.
        text_dir: Folder of text to pretrain on, or None.
    """

    device: str
    quick: bool
    scratch: Path
    text_dir: Path | None

    def cell(self, name: str, function: Callable[[], Sequence[Row]]) -> None:
        """Runs a cell unless it was run before, and writes its rows or its error."""

    def started(self, name: str) -> bool:
        """Notes that a cell starts; False if it was run before."""

    def ended(self, name: str, error: str = "") -> None:
        """Notes how a cell ended."""


def as_json(row: Row) -> dict[str, Any]:
    """Returns what is written of a row: its figures, and its texts in a table."""
    return {**vars(row), "cells": cells(row)}


def describe(run: Run) -> dict[str, str]:
    """Describes the machine."""
    return machine(run.device)


# --- correctness ----------------------------------------------------------------------------------------------------


def correctness(run: Run) -> None:
    """Runs the tests that are marked `gpu`, then those that use a GPU wherever there is one; each test is a cell."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={TOP}", "--tb=short"]
    options.append("--continue-on-collection-errors")
    recorder = Recorder(run)
    if run.quick:  # on a CPU they skip: one cheap file shows that they are found
        pytest.main([*options, "-m", "gpu", str(TOP / "tests/modules/test_trainable_pooling.py")], plugins=[recorder])
        return
    # What learning reads takes a minute of one core, the first time.
    reading = "from st_llmpool.data import docstring_pairs; docstring_pairs('train')"
    subprocess.Popen([sys.executable, "-c", reading], start_new_session=True)
    pytest.main([*options, "-m", "gpu", *map(str, marked_files())], plugins=[recorder])
    for node in ALSO_ON_A_GPU:
        pytest.main([*options, "-m", "gpu or not gpu", str(TOP / node)], plugins=[recorder])


def marked_files() -> list[Path]:
    """Returns the files with tests for a GPU; to collect all takes long, and some need what a bare machine lacks."""
    return [file for file in sorted((TOP / "tests").rglob("test_*.py")) if MARKED.search(file.read_text())]


class Recorder:
    """A plugin of pytest that makes each test a cell."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Leaves out a test that was run before: the process is a later one, after a crash or a hang."""
        return None if self.run.started(item.nodeid) else True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notes a file that cannot be imported."""
        if report.failed and self.run.started(report.nodeid):
            self.run.ended(report.nodeid, f"collection: {report.longrepr}"[-600:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes how a test ended; a failed set-up is its end."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.run.ended(report.nodeid, f"{report.when}: {crash.message if crash else report.longrepr}"[:600])
        elif report.skipped:
            self.run.ended(report.nodeid, "skipped: " + str(report.longrepr[-1] if report.longrepr else ""))
        elif report.when == "call":
            self.run.ended(report.nodeid)


# --- encoding -------------------------------------------------------------------------------------------------------


def encoding_small(run: Run) -> None:
    """Encodes at the shape of Qwen3-0.6B: over plain mean pooling, the fast paths, the head alone."""
    encoding(run, SMALL)
    options = ["--device", run.device, "--seconds", "4", *["--quick"] * run.quick]
    run.cell("packing over padding", partial(padding.main, options))
    run.cell("instruction reuse", partial(shared_start.main, options))
    run.cell("overhead of a forward", partial(overhead, run))
    run.cell("head alone", partial(folded_head.main, options))


def encoding_large(run: Run) -> None:
    """Encodes at the shape of Mistral-7B."""
    encoding(run, LARGE)


def encoding(run: Run, shape: str) -> None:
    """Encodes batches of several sizes by design 5 and by plain mean pooling on the same weights."""
    args = options_of(run, seconds=3)
    ours = our_model(backbone(run, shape), "5", run.device)
    plain = plain_model("", "bidirectional", "mean", run.device, like=ours)
    for texts, tokens in [(1, 8), (2, 16)] if run.quick else ENCODED[shape]:
        run.cell(f"encode {shape}, {texts} x {tokens}", partial(encode, ours, plain, shape, texts, tokens, args))
        if (texts, tokens) in ((32, 512), (2, 16)):
            side = 64 if run.quick else 8192
            use = partial(utilisation.measure, ours, shape, texts, tokens, side, args)
            run.cell(f"matrix rate {shape}", lambda use=use: [use()])
            run.cell(f"profile {shape}", partial(profile, ours, shape, texts, tokens, run.device))


def encode(
    ours: SentenceTransformer, plain: SentenceTransformer, shape: str, texts: int, tokens: int, args: Namespace
) -> list[Row]:
    """Returns the ratios of time and of peak memory, weights included."""
    batch = random_batch(ours, texts, tokens)
    times = alternate(partial(infer, ours, batch), partial(infer, plain, batch), args)
    what = f"encode {shape}, {texts} x {tokens}"
    row = compare(what, *times, limit=TIME)
    peaks = [peak_of(partial(infer, model, batch), args.device) for model in (ours, plain)]
    row = dataclasses.replace(row, note=f"{texts * tokens / row.ours:,.0f} tokens a second")
    return [row, once(f"{what}, peak MiB", *peaks, limit=MEMORY)]


def overhead(run: Run) -> list[Row]:
    """Returns the overhead of a forward in tokens: what `optimize_inference` counts, over a line through lengths."""
    model = our_model(backbone(run, SMALL), "mean-bidirectional", run.device)
    fitted = padding.fit(run.device, "tiny" if run.quick else SMALL, repetitions=5)
    counted = optimize_inference(model).forward_cost
    return [once("overhead of a forward in tokens, counted over fitted to texts of 8 to 256", counted, max(fitted, 1))]


def profile(model: SentenceTransformer, shape: str, texts: int, tokens: int, device: str) -> list[Row]:
    """Returns where the time of a forward goes: seconds of each kind of kernel, and of none, over the whole."""
    batch = random_batch(model, texts, tokens)
    on_gpu = device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * on_gpu]
    infer(model, batch)
    with torch.profiler.profile(activities=activities) as seen, torch.profiler.record_function("whole"):
        infer(model, batch)
        if on_gpu:
            torch.cuda.synchronize()
    spent: dict[str, float] = dict.fromkeys(("matrix products", "attention", "everything else"), 0.0)
    events = seen.key_averages()
    whole = next(event.cpu_time_total for event in events if event.key == "whole" and event.cpu_time_total) / 1e6
    for event in events:
        if event.key == "whole" or (on_gpu and event.device_type != torch.autograd.DeviceType.CUDA):
            continue
        spent[kind_of(event.key)] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    spent["no kernel"] = max(0.0, whole - sum(spent.values()))
    what = f"share of a forward, {shape}, {texts} x {tokens}"
    return [once(f"{what}: {kind}", time, whole) for kind, time in spent.items()]


def kind_of(kernel: str) -> str:
    """Returns which part of a forward a kernel belongs to, by what libraries call theirs."""
    name = kernel.lower()
    if any(part in name for part in ("flash", "fmha", "attention", "softmax")):
        return "attention"
    if any(part in name for part in ("gemm", "nvjet", "cutlass", "::mm", "addmm", "bmm", "matmul", "linear")):
        return "matrix products"
    return "everything else"


# --- training -------------------------------------------------------------------------------------------------------


def training_small(run: Run) -> None:
    """Trains at the shape of Qwen3-0.6B."""
    training_steps(run, SMALL, 32, (None, "nf4"))
    args = options_of(run, seconds=5)
    shape, texts, tokens = ("tiny", 2, 8) if run.quick else (SMALL, 8, 128)
    run.cell("the paper's loop", lambda: [training.over_paper(backbone(run, SMALL), shape, args, texts, tokens)])


def training_large(run: Run) -> None:
    """Trains at the shape of Mistral-7B; in 4 bits first, as the paper's recipe does."""
    training_steps(run, LARGE, 8, ("nf4", None))


def training_steps(run: Run, shape: str, texts: int, kinds: Sequence[str | None]) -> None:
    """Steps of design 5 and of plain mean pooling on one backbone, with LoRA and QLoRA, plain and checkpointed."""
    args = options_of(run, seconds=4)
    texts, tokens = (2, 8) if run.quick else (texts, 256)
    for kind in kinds:
        name = "QLoRA" if kind else "LoRA"
        try:
            ours = training.trained_model(backbone(run, shape), "5", False, run.device, quantization_config=kind)
        except Exception as error:
            if run.started(f"{name} {shape}"):
                run.ended(f"{name} {shape}", f"{type(error).__name__}: {error}")
            continue
        plain = plain_model("", "bidirectional", "mean", run.device, like=ours).train()
        for checkpointing in (False, True):
            if checkpointing:
                enable_gradient_checkpointing(ours.transformers_model)
            what = f"{name} step {shape}, 3 x {texts} x {tokens}{', checkpointing' * checkpointing}"
            run.cell(what, partial(step, ours, plain, what, texts, tokens, args))
        del ours, plain
        if run.device == "cuda":
            torch.cuda.empty_cache()


def step(
    ours: SentenceTransformer, plain: SentenceTransformer, what: str, texts: int, tokens: int, args: Namespace
) -> list[Row]:
    """Returns the ratios of time, of peak memory, and of the largest batch in memory by a line through two peaks."""

    def steps(size: int) -> Iterator[Callable[[], None]]:
        columns = [random_batch(ours, size, tokens) for _ in range(3)]
        return (training.step_by_loss(model, columns) for model in (ours, plain))

    times = alternate(*steps(texts), args)
    peaks = [[peak_of(run, args.device) for run in steps(size)] for size in (texts, 2 * texts)]
    largest = [at_most(texts, *both, args.device) for both in zip(*peaks, strict=True)]
    return [
        compare(what, *times, limit=TRAINING),
        once(f"{what}, peak MiB", *peaks[0], limit=TRAINING),
        once(f"{what}, largest batch", *largest, note="from the peaks at this batch and twice as many"),
    ]


def at_most(texts: int, peak: float, peak_of_twice: float, device: str) -> float:
    """Returns the largest batch in memory, whose use in MiB grows with the batch along a line."""
    memory = torch.cuda.mem_get_info()[1] / 2**20 if device == "cuda" else peak_of_twice
    return texts * max(1.0, 1 + (memory - peak) / max(peak_of_twice - peak, 1e-3))


# --- learning -------------------------------------------------------------------------------------------------------


def learning(run: Run) -> None:
    """Trains the built-in backbone, and one that is pretrained longer if there is text for it."""
    run.cell("training of the built-in backbone", partial(learned, run, builtin_backbone(), "built-in backbone"))
    if run.text_dir is not None:
        longer = run.scratch / "pretrained"
        run.cell("pretraining", partial(pretrain, run, longer))
        if (longer / "final").is_dir():
            base = str(longer / "final")
            run.cell("training of the pretrained backbone", partial(learned, run, base, "backbone pretrained longer"))


def pretrain(run: Run, out: Path) -> list[Row]:
    """Pretrains a backbone like the built-in one from nothing, with its tokenizer: training one takes longer."""
    AutoTokenizer.from_pretrained(builtin_backbone()).save_pretrained(out / "tokenizer")
    sizes = ["--steps", "2", "--batch-size", "1"] if run.quick else ["--steps", "2000", "--batch-size", "64"]
    script = [sys.executable, str(TOP / "scripts/pretrain_backbone.py"), "train"]
    subprocess.run([*script, "--text-dir", str(run.text_dir), "--out", str(out), *sizes], check=True)
    return []


def learned(run: Run, base: str, name: str) -> list[Row]:
    """Returns nDCG@10 of design 5 after training over before, on docstrings of packages that it does not train on."""
    held_out = examples() if run.quick else [(pair.query, pair.positive) for pair in docstring_pairs("test")[:500]]
    source = "docstrings"
    if run.quick:
        source = str(run.scratch / "pairs.jsonl")
        Path(source).write_text("\n".join(json.dumps({"query": one, "positive": other}) for one, other in held_out))
    recipe = Recipe.from_dict(
        {
            "output_dir": str(run.scratch / f"learning-{name.replace(' ', '-')}-{os.getpid()}"),
            "model": {"base": base, "design": "5", "tune": "full", "max_seq_length": 64},
            "data": [{"source": source}],
            "loss": {"num_negatives": 0},
            "training": {
                "max_steps": 2 if run.quick else 300,
                "batch_size": 4 if run.quick else 256,
                "learning_rate": 5e-4,
                "warmup_steps": 0.1,
            },
        }
    )
    before = build_embedder(base, **DESIGNS["5"].as_kwargs(), max_seq_length=64, verify=False)
    scores = [ndcg(model, held_out) for model in (train(recipe).model, before)]
    return [once(f"nDCG@10 after training over before, {name}", *(max(score, 1e-9) for score in scores))]


def examples() -> list[tuple[str, str]]:
    """Returns pairs for a quick run."""
    return [(f"number {number}", f"the text of number {number}") for number in range(12)]


def ndcg(model: SentenceTransformer, pairs: list[tuple[str, str]]) -> float:
    """Returns how well queries find their texts among all."""
    queries, corpus = ({str(number): pair[side] for number, pair in enumerate(pairs)} for side in (0, 1))
    evaluator = InformationRetrievalEvaluator(queries, corpus, {key: {key} for key in queries})
    return evaluator(model)["cosine_ndcg@10"]


# --- what the parts share -------------------------------------------------------------------------------------------


def options_of(run: Run, seconds: float) -> Namespace:
    """Returns the arguments of a benchmark that stops its repetitions after so long."""
    return arguments("", ["--device", run.device, "--seconds", str(seconds), *["--quick"] * run.quick])


def backbone(run: Run, shape: str) -> str:
    """Returns the folder of a random backbone, written once for all parts; the tiny one in a quick run."""
    shape = "tiny" if run.quick else shape
    written = [folder for folder in run.scratch.glob(f"{shape}-*") if (folder / "tokenizer_config.json").exists()]
    return str(written[0]) if written else random_backbone(shape, run.scratch, run.device)


def peak_of(run: Callable[[], object], device: str) -> float:
    """Returns the most memory in MiB that a run takes, weights included."""
    with peak_memory(device) as peak:
        run()
    return peak[0]
