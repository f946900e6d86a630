"""Cost of a model: parameters, operations, time and memory, measured on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ..attention_proof import implementation_of
from ..modules.errors import ConfigurationError
from ..utils.parameters import count_parameters
from ..utils.random_state import preserve_rng_state
from ..utils.settings import from_mapping

_MEBIBYTE = 2**20
_COUNTED = ("sdpa", "eager")  # a fused kernel from elsewhere hides its operations


@dataclass(frozen=True)
class LengthCost:
    """Cost of one text of a given length.

    Args:
        tokens: Length, including special tokens.
        flops: Floating-point operations of matrix products and attention in one forward; a multiply-add counts as two.
            Constants that the pooling caches are not counted; the masked part of causal attention is.
        latency_ms: Median time from text to vector, one text at a time.
        peak_memory_mb: Peak memory of the forward on top of the weights, in MiB; None if neither CPU nor CUDA.
        reason: Why figures are None; empty otherwise.
    """

    tokens: int
    flops: int | None
    latency_ms: float | None
    peak_memory_mb: float | None
    reason: str = ""


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Args:
        backbone: Number of parameters of the backbone.
        adapter: Number of parameters of its adapter.
        pooling: Number of parameters of all later modules.
        lengths: Cost of one text of each length.
        device: Device that it was measured on.
        dtype: Dtype of the backbone's weights.
        threads: CPU threads of torch.
        training_step_ms: Median time of a forward and backward pass in training, without the optimizer; None if not
            measured.
        training_batch: Number of pairs, and of tokens per text, in that step.
        dimension: Length of an embedding; an index of float32 holds four bytes for each number.
    """

    backbone: int
    adapter: int
    pooling: int
    lengths: list[LengthCost]
    device: str
    dtype: str
    threads: int
    training_step_ms: float | None = None
    training_batch: list[int] | None = None
    dimension: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Cost:
        """Return the cost from the output of `to_dict`."""
        return from_mapping(cls, content)


def measure_cost(
    model: SentenceTransformer,
    *,
    lengths: Sequence[int] = (32, 512, 4096),
    repeats: int = 5,
    training_batch: tuple[int, int] | None = None,
) -> Cost:
    """Measure the cost of a model, and leave it unchanged.

    Args:
        model: The model, on the device and in the dtype of its use.
        lengths: Lengths of the texts in tokens; a length above the model's limit gives None.
        repeats: Timed repetitions, after one warm-up.
        training_batch: Number of pairs, and of tokens per text, to time a step of contrastive training; None for none.

    Raises:
        ConfigurationError: If a number is not positive.

    Example:
        >>> from st_llmpool import build_embedder
        >>> from st_llmpool.data import builtin_backbone
        >>> cost = measure_cost(build_embedder(builtin_backbone(), verify=False), lengths=(8, 4096), repeats=1)
        >>> [length.flops is None for length in cost.lengths]
        [False, True]
    """
    if min(*lengths, *(training_batch or ()), repeats) < 1:
        raise ConfigurationError(f"lengths={lengths}, repeats={repeats} and training_batch must be positive.")
    was_training = model.training
    model.eval()
    try:
        measured = [_measure_length(model, tokens, repeats) for tokens in lengths]
        step = None if training_batch is None else _training_step(model, *training_batch, repeats)
    finally:
        model.train(was_training)
    return Cost(
        **count_parameters(model),
        lengths=measured,
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type,
        dtype=str(next(model[0].parameters()).dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        training_step_ms=step,
        training_batch=None if training_batch is None else list(training_batch),
        dimension=model.get_embedding_dimension(),
    )


def _measure_length(model: SentenceTransformer, tokens: int, repeats: int) -> LengthCost:
    limit = model.max_seq_length
    if limit is not None and tokens > limit:
        return LengthCost(tokens, None, None, None, f"the model reads at most {limit} tokens")
    try:
        with _text_of(model, tokens) as text:
            features = _features(model, [text])
            latency = _median_ms(lambda: model.encode([text], show_progress_bar=False), repeats, model.device)
            flops, reason = _flops(model, features)
            return LengthCost(tokens, flops, latency, _peak_memory(model, features), reason)
    except ValueError as error:  # our ConfigurationError, which may be of the repository's own copy of the code
        return LengthCost(tokens, None, None, None, str(error))


@contextmanager
def _text_of(model: SentenceTransformer, tokens: int) -> Iterator[str]:
    """Yield a text that the model reads as exactly `tokens` tokens inside the context."""
    limit = model.max_seq_length
    try:
        model.max_seq_length = tokens  # cuts the text, and keeps EOS
        text = " ".join(["word"] * tokens)
        found = _features(model, [text])["input_ids"].shape[-1]
        if found != tokens:
            raise ConfigurationError(f"no text of {tokens} tokens could be made: the tokenizer made {found} of it")
        yield text
    finally:
        model.max_seq_length = limit


def _features(model: SentenceTransformer, texts: list[str]) -> dict[str, Any]:
    return batch_to_device(model.preprocess(texts), model.device)


@torch.no_grad()
def _flops(model: SentenceTransformer, features: dict[str, Any]) -> tuple[int | None, str]:
    kernel = implementation_of(model[0].model) if hasattr(model[0], "model") else None
    if kernel is not None and kernel not in _COUNTED:
        return None, f"operations are not counted: those of attention by {kernel!r} cannot be seen"
    own = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # torch counts the others
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        model(dict(features))
    return counter.get_total_flops(), ""


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Return the operations of QKᵀ and its product with V; shapes are (B, H, T, d)."""
    batch, heads, length, size = query
    return 2 * batch * heads * length * key[2] * (size + value[3])


@torch.no_grad()
def _peak_memory(model: SentenceTransformer, features: dict[str, Any]) -> float | None:
    """Return the peak memory of a forward on top of the memory allocated before, in MiB."""
    if model.device.type == "cpu":
        return _peak_of_tensors(lambda: model(dict(features))) / _MEBIBYTE
    if model.device.type != "cuda":
        return None
    torch.cuda.synchronize(model.device)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    model(dict(features))
    torch.cuda.synchronize(model.device)
    return (torch.cuda.max_memory_allocated(model.device) - before) / _MEBIBYTE


def _peak_of_tensors(run: Callable[[], object]) -> int:
    """Return the peak bytes of tensors on the CPU, from the profiler's allocations and frees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _training_step(model: SentenceTransformer, pairs: int, tokens: int, repeats: int) -> float | None:
    """Time a step of in-batch contrastive training; weights, gradients and random state stay the same."""
    if not any(weight.requires_grad for weight in model.parameters()):
        return None
    kept = [(weight, weight.grad) for weight in model.parameters()]
    with _text_of(model, tokens) as text, preserve_rng_state():
        features = _features(model, [text] * pairs)

        def step() -> None:
            model.zero_grad()
            queries, documents = (model(dict(features))["sentence_embedding"].float() for _ in range(2))
            cross_entropy(queries @ documents.T, torch.arange(pairs, device=queries.device)).backward()

        model.train()
        try:
            return _median_ms(step, repeats, model.device)
        finally:
            for weight, gradient in kept:
                weight.grad = gradient


def _median_ms(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    call()
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
