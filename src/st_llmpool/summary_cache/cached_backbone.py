"""Run a model on cached layer summaries: its backbone reads each text once, its pooling reads the cache."""

from __future__ import annotations

import functools
import hashlib
import json
import reprlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..fast_inference import FastInference
from ..modules.attention import decoder_layers
from ..modules.errors import ConfigurationError, InputError, check_choice
from ..modules.layer_readout import POOLING_FEATURES, READOUTS, TokenSpans
from ..utils.parameters import config_values, hash_weights, tokenizer_state
from ..utils.random_state import preserve_modes
from .store import DTYPES, SummaryStore

#: Characters (padded) of one forward: a CPU is a quarter faster while its activations fit into its caches.
_BATCH_CHARACTERS, _BATCH_CHARACTERS_ON_CPU, _BATCH_TEXTS = 65_536, 4_096, 128
#: Bytes and seconds of one file.
_SHARD_BYTES, _SHARD_SECONDS = 2**26, 60.0
_FEW = 1024  # texts that one process encodes at once; more are divided among processes by their keys
_CACHED = "layer summaries come from a cache"
_TO_READOUT = {"lasttoken": "eos", "mean": "mean"}
#: Settings of the backbone module that the cache does not depend on: it holds both readouts of all layers.
_FREE = ("layers", "layer_readout", "include_prompt", "model_kwargs")


@contextmanager
def cached_summaries(model: SentenceTransformer, folder: str | Path, *, dtype: str = "float16") -> Iterator[Cache]:
    """Inside the block `model` reads texts from a cache, and its frozen backbone encodes only those that are not there.

    Everything that runs the model works as before: ``encode``, trainers, losses, evaluators, saving. The backbone gets
    no gradient and its dropout is off; on leaving, the model is as it was. The cache's key holds the backbone's
    weights, attention, tokenizer, length and the library's version, then prompt and text of each row.

    Args:
        model: A model on an ``LLMTransformer`` whose pooling reads layers, or the plain last token or mean.
        folder: Where the caches of all models are; processes may share it.
        dtype: ``"float16"`` (relative error of a number at most 2**-11, never an overflow) or ``"float32"`` (exact).

    Yields:
        The cache; ``fill(texts)`` encodes many texts in advance.

    Raises:
        ConfigurationError: If the model's pooling reads tokens, which the cache does not hold.

    Example:
        >>> from st_llmpool import build_embedder
        >>> model = build_embedder("builtin", pooling="multi_layer", verify=False)
        >>> with cached_summaries(model, "cache") as cache:
        ...     embeddings = model.encode(["a text", "another", "a text"])
        >>> len(embeddings), len(cache.store)
        (3, 2)
    """
    check_choice("dtype", dtype, tuple(DTYPES))
    cache = Cache(model, SummaryStore(Path(folder), identity_of(model[0]), dtype=dtype))
    backbone: Any = model[0]
    runner = backbone.batch_runner
    replaced: dict[tuple[Any, str], Any] = {
        (backbone, "preprocess"): cache.preprocess,
        (backbone, "forward"): cache.forward,
        (model, "_inference"): functools.partial(cache.inference, model._inference),
    }
    try:
        for (module, name), function in replaced.items():
            vars(module)[name] = function
        backbone.batch_runner = FastInference(dict.fromkeys(("shared start", "packing", "length groups"), _CACHED))
        yield cache
    finally:
        for module, name in replaced:
            vars(module).pop(name, None)
        backbone.batch_runner = runner


class Cache:
    """What :func:`cached_summaries` puts in the place of a backbone's ``preprocess`` and ``forward``.

    A text's key takes the place of its tokens, so that losses merge and split batches as ever.

    Attributes:
        store: The rows on disk.
        encoded: How many texts the backbone has read so far.
    """

    def __init__(self, model: SentenceTransformer, store: SummaryStore) -> None:
        self.plain_readout = check_poolings(model)
        self.backbone: Any = model[0]
        self.store = store
        self.encoded = 0

    def key(self, text: str, prompt: str | None, options: dict[str, Any]) -> bytes:
        """Return what identifies a text among those of one backbone."""
        task = options.get("task") if self._depends_on_task else None
        others = {name: value for name, value in options.items() if name != "task" and value is not None}
        include = self.backbone.include_prompt or not prompt
        content = json.dumps([prompt or "", include, task, others, text], sort_keys=True, default=repr)
        return hashlib.blake2b(content.encode(), digest_size=16).digest()

    @functools.cached_property
    def _depends_on_task(self) -> bool:
        names = ("query_length", "document_length", "query_expansion")
        return any(getattr(self.backbone, name, None) is not None for name in names)

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **options: Any) -> dict[str, Tensor]:
        """Return the keys of texts, (B, 2), where the backbone would return their tokens."""
        self.fill(inputs, prompt, **options)
        keys = b"".join(self.key(text, prompt, options) for text in inputs)
        numbers = torch.frombuffer(bytearray(keys), dtype=torch.int64).view(-1, 2)
        return {"input_ids": numbers, "attention_mask": torch.ones_like(numbers), "cached_text": numbers}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return what the backbone would, with the plain readout as the only token; other features go to it."""
        if "cached_text" not in features:
            return type(self.backbone).forward(self.backbone, features, **kwargs)
        backbone, numbers = self.backbone, features["cached_text"]
        keys = [row.tobytes() for row in numbers.cpu().numpy()]
        last = [backbone.num_layers]
        summaries = self.store.read(keys, backbone.layer_readout, [*backbone.layers, *last]).to(numbers.device)
        readout = token = summaries[:, -1]
        if self.plain_readout != backbone.layer_readout:
            token = self.store.read(keys, self.plain_readout, last)[:, 0].to(numbers.device)
        features = {"attention_mask": features["attention_mask"][:, :1], "readout": readout}
        if backbone.layers:
            features["layer_summaries"] = summaries[:, :-1]
        return features | {"token_embeddings": token.unsqueeze(1).to(backbone.model.dtype)}

    def inference(self, run: Any, inputs: list[str], *, prompt: str | None = None, **options: Any) -> Any:
        """Encode what is missing of all `inputs`, sorted by length, before they are read in batches."""
        known = {"batch_size", "show_progress_bar", "output_value", "save_to_cpu", "normalize_embeddings"}
        known |= {"truncate_dim", "device"}
        self.fill(inputs, prompt, **{name: value for name, value in options.items() if name not in known})
        return run(inputs, prompt=prompt, **options)

    def fill(self, texts: Sequence[str], prompt: str | None = None, **options: Any) -> None:
        """Encode the texts that are not in the cache; an interrupted call goes on where it was.

        Processes that fill one cache at once divide the texts among themselves.

        Raises:
            InputError: If a text is none, has no token, or its summaries are not finite.
            WriteError: If the disk is full; what was encoded before is kept.
        """
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"{reprlib.repr(text)} is of type {type(text).__name__}: pass str.")
        wanted = {self.key(text, prompt, options): text for text in texts}
        if not any(key not in self.store for key in wanted):
            return
        self.store.refresh()
        missing = {key: text for key, text in wanted.items() if key not in self.store}
        parts: dict[str, list[bytes]] = {}
        for key in missing:
            parts.setdefault("few" if len(wanted) <= _FEW else f"{key[0] // 16:x}", []).append(key)
        with tqdm(total=len(missing), desc="encoding texts for the cache", unit="text", delay=5) as bar:
            wait = False
            while parts:
                left = dict(parts)
                for name, keys in left.items():
                    with self.store.lock(name, wait=wait) as held:
                        if held:
                            self.store.refresh()
                            todo = {key: missing[key] for key in keys if key not in self.store}
                            bar.update(len(keys) - len(todo))
                            self._encode(todo, prompt, options, bar)
                            del parts[name]
                            wait = False
                wait = len(parts) == len(left)  # other processes have all that is left

    def _encode(self, texts: dict[bytes, str], prompt: str | None, options: dict[str, Any], bar: Any) -> None:
        """Encode texts, long ones first, and write them file by file."""
        found: dict[bytes, Tensor] = {}
        size, started = 0, time.monotonic()
        limit = 8 * (self.backbone.max_seq_length or 2**30)  # characters, of which no more tokens are read
        budget = _BATCH_CHARACTERS_ON_CPU if self.backbone.model.device.type == "cpu" else _BATCH_CHARACTERS
        order = sorted(texts, key=lambda key: len(texts[key]), reverse=True)
        with preserve_modes(self.backbone):
            while order:
                longest = min(len(texts[order[0]]) + len(prompt or ""), limit) + 8
                count = max(1, min(_BATCH_TEXTS, budget // longest))
                batch, order = order[:count], order[count:]
                rows = self._run([texts[key] for key in batch], prompt, options)
                found |= dict(zip(batch, rows, strict=True))
                size += rows.numel() * self.store.dtype.itemsize
                self.encoded += len(batch)
                bar.update(len(batch))
                if size >= _SHARD_BYTES or time.monotonic() - started >= _SHARD_SECONDS or not order:
                    self.store.add(found)
                    found, size, started = {}, 0, time.monotonic()

    def _run(self, texts: list[str], prompt: str | None, options: dict[str, Any]) -> Tensor:
        """Return both readouts of all layers of texts, (B, 2, L, D), in float32 on the CPU."""
        backbone = self.backbone
        features = type(backbone).preprocess(backbone, texts, prompt=prompt, **options)
        features = batch_to_device(features, backbone.model.device)
        features = {name: value for name, value in features.items() if name not in POOLING_FEATURES}
        spans = TokenSpans.of(features, include_prompt=backbone.include_prompt)
        with layers_below_the_last(backbone, spans, READOUTS) as rows:
            tokens = backbone.run(features, spans)["token_embeddings"]  # after the final norm
        last = torch.stack([spans.reduce(tokens, readout) for readout in READOUTS], dim=1).cpu()
        summaries = torch.stack([*rows, last], dim=2)
        if not (finite := summaries.isfinite().flatten(1).all(dim=1)).all():
            text, kind = texts[int(finite.int().argmin())][:80], backbone.model.dtype
            raise InputError(f"The layers of {text!r} are not finite in {kind}. Use training.precision=bf16 or fp32.")
        return summaries


@contextmanager
def layers_below_the_last(backbone: Any, spans: TokenSpans, readouts: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect the summaries (B, len(readouts), D) of every layer but the last, on the CPU, in a forward of the block.

    Raises:
        ConfigurationError: From that forward, if a layer has no single state per token.
    """
    rows: list[Tensor] = []

    def record(layer: nn.Module, args: Any, output: Any) -> None:
        hidden_states = output if isinstance(output, Tensor) else output[0]
        if hidden_states.dim() != 3:  # gemma3n
            raise ConfigurationError(
                f"{type(layer).__name__} has no single state per token, so its layers cannot be read."
            )
        own = spans.to(hidden_states.device)
        rows.append(torch.stack([own.reduce(hidden_states, readout) for readout in readouts], dim=1).cpu())

    hooks = [layer.register_forward_hook(record) for layer in list(decoder_layers(backbone.model))[:-1]]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def check_poolings(model: SentenceTransformer) -> str:
    """Return the plain readout that the model's pooling reads as its token, or that of its layers.

    Raises:
        ConfigurationError: If it is no model on an ``LLMTransformer``, or a pooling reads tokens.
    """
    if not hasattr(type(model[0]), "batch_runner"):
        raise ConfigurationError(f"The cache holds layers of an LLMTransformer, and this is {type(model[0]).__name__}.")
    readout = str(model[0].layer_readout)
    for module in list(model)[1:]:
        if isinstance(module, Pooling):
            if module.pooling_mode not in _TO_READOUT:
                raise reads_tokens(f"pooling mode {module.pooling_mode!r}")
            readout = _TO_READOUT[module.pooling_mode]
        elif hasattr(module, "default_learning_rate") and not _runs_without_tokens(module, model[0]):
            raise reads_tokens(type(module).__name__)
    return readout


def _runs_without_tokens(pooling: nn.Module, backbone: Any) -> bool:
    """Return whether a trainable pooling takes the cached features of a text; also one of a repository's own code."""
    device, width = next(pooling.parameters()).device, backbone.get_embedding_dimension()
    readout, summaries = torch.zeros(1, width), torch.zeros(1, len(backbone.layers), width)
    with preserve_modes(pooling), suppress(KeyError, ConfigurationError):
        pooling({"readout": readout.to(device), "layer_summaries": summaries.to(device)})
        return True
    return False


def reads_tokens(pooling: str) -> ConfigurationError:
    """Return the refusal of a pooling over tokens, by its name."""
    return ConfigurationError(
        f"{pooling} reads every token, and the cache holds one vector per layer. Use a pooling over layers "
        f"(multi_layer, scalar_mix, or reads=layers), linear, eos or mean; or train without the cache."
    )


def identity_of(backbone: Any) -> dict[str, Any]:
    """Return everything besides prompt and text that decides a backbone's summaries."""
    digest, tokenizer = hashlib.sha256(), json.dumps(tokenizer_state(backbone.tokenizer), sort_keys=True)
    hash_weights(backbone.model, digest)
    return {
        "weights": digest.hexdigest(),
        "config": config_values(backbone.model.config),
        "attention_implementation": str(backbone.model.config._attn_implementation),
        "module": {key: value for key, value in backbone.get_config_dict().items() if key not in _FREE},
        "max_seq_length": backbone.max_seq_length,
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(),
        "truncation_side": getattr(backbone.tokenizer, "truncation_side", None),
        "transformers": transformers.__version__,
    }
