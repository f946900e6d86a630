"""The backbone: a decoder LLM with a chosen attention mode, read out at every layer."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .attention import (
    ATTENTION_MODES,
    check_attention,
    decoder_layers,
    is_encoder,
    needs_position_ids,
    position_ids_from,
    refuse_encoder_decoder,
    set_attention,
)
from .eos import append_eos, ends_every_text, ensure_pad_token, without_truncation
from .errors import ConfigurationError, DataError, InputError, nearest
from .layer_readout import POOLING_FEATURES, READOUTS, TokenSpans, capture_layers, hook_layers
from .portable import (
    PortableModule,
    copy_assets,
    identify_by_weights,
    naming,
    save_requirements,
    save_source_files,
)
from .seal import begin_save, check_seal, seal_saves

_MOST_LAYERS = 2_000  # ten times those of the deepest model that is published
_MAGNITUDE = "lora_magnitude_vector"
#: Fewest tokens that a prompt must leave to the text.
ROOM_FOR_TEXT = 8
_TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


class LLMTransformer(Transformer, PortableModule):
    """A Hugging Face decoder (or encoder) as the first module of a ``SentenceTransformer``.

    What the embedding depends on and a base's files do not say (attention mode, layer readout, EOS token, prompt
    exclusion) is in the saved config and applied on every load: adapter-only saves, checkpoints and merging keep it.

    Args:
        model_name_or_path: Hub id or folder, as for ``Transformer``.
        attention: ``"bidirectional"`` or ``"causal"``.
        layers: Layers to read, ``"all"`` or 1-based numbers, negative from the end; stored resolved. Poolings that use
            tokens only need none.
        layer_readout: ``"eos"`` (last token) or ``"mean"``; None is ``"eos"`` for causal attention, else ``"mean"``.
        add_eos_token: End every text in EOS; None is on for decoders and off for encoders.
        include_prompt: False keeps the prompt's tokens out of readout and pooling.
        causal_layers: Layers (1-based) that are known to stay causal under ``attention="bidirectional"``.
        verify: Check the attention by two short forwards, at every load too; not saved.
        **kwargs: Everything that ``Transformer`` takes.

    Raises:
        ConfigurationError: If a setting is unknown, out of range or does not fit the base.
        AttentionError: If two short forwards show another attention than `attention`.

    Attributes:
        batch_runner: Runs a batch in inference instead of :meth:`run`: ``(module, features, spans) -> features``; set
            by ``st_llmpool.optimize_inference``, never saved.

    Inputs:
        ``input_ids`` (B, T) and ``attention_mask`` (B, T) with padding on any side, or flat ``input_ids``
        (1, N) with ``cu_seq_lens_q`` (B + 1,); ``prompt_length``; ``sentence_starts``, handed on to the pooling.

    Outputs:
        ``token_embeddings`` (B, T, D), or (1, N, D) if flat, of the last layer; ``attention_mask`` (B, T)
        of the tokens that the pooling may see, prompt excluded if asked; ``readout`` (B, D) of the last layer
        and ``layer_summaries`` (B, L, D) of the chosen layers, in float32.

    Example:
        >>> from st_llmpool.data import builtin_backbone
        >>> backbone = LLMTransformer(builtin_backbone(), attention="bidirectional", layers=[1, -1])
        >>> features = backbone(backbone.preprocess(["a text", "another, longer text"]))
        >>> features["layer_summaries"].shape[:2]
        torch.Size([2, 2])
    """

    config_keys = [
        *Transformer.config_keys,
        *("attention", "layer_readout", "layers", "add_eos_token", "include_prompt", "causal_layers"),
    ]
    batch_runner: Callable[[LLMTransformer, dict[str, Any], TokenSpans], dict[str, Any]] | None = None

    #: Where a saved model was loaded from, and how; None for one that was built.
    _loaded_from: tuple[str, dict[str, Any]] | None = None

    def __init__(
        self,
        model_name_or_path: str,
        *,
        attention: Literal["causal", "bidirectional"] = "bidirectional",
        layers: Literal["all"] | Sequence[int] = "all",
        layer_readout: Literal["eos", "mean"] | None = None,
        add_eos_token: bool | None = None,
        include_prompt: bool = True,
        causal_layers: Sequence[int] = (),
        verify: bool = True,
        **kwargs: Any,
    ) -> None:
        _check_choice("attention", attention, ATTENTION_MODES)
        if layer_readout is None:
            layer_readout = "eos" if attention == "causal" else "mean"
        _check_choice("layer_readout", layer_readout, READOUTS)
        _check_backend(kwargs.get("backend", "torch"))
        # Chat templates would wrap every text in a conversation; an embedding model reads plain text.
        kwargs.setdefault("modality_config", _TEXT_ONLY)
        kwargs.setdefault("module_output_name", "token_embeddings")
        self._requested_layers = layers
        processor_kwargs = kwargs.get("processor_kwargs") or {}
        self._requested_length = processor_kwargs.get("model_max_length", kwargs.get("max_seq_length"))
        if "torch_dtype" in (model_kwargs := kwargs.get("model_kwargs") or {}):
            # Its older name is the caller's; a saved adapter's own dtype would win over it in transformers.
            kwargs["model_kwargs"] = {**model_kwargs, "dtype": model_kwargs["torch_dtype"]}
            del kwargs["model_kwargs"]["torch_dtype"]
        self._load_backbone(model_name_or_path, kwargs)

        self.attention = attention
        self.layer_readout = layer_readout
        self.include_prompt = include_prompt
        self.causal_layers = list(causal_layers)
        self.num_layers = len(decoder_layers(self.model))
        self.layers = resolve_layers(layers, self.num_layers)
        is_decoder = not is_encoder(self.model)
        self.add_eos_token = is_decoder if add_eos_token is None else add_eos_token
        if self.add_eos_token:
            append_eos(self.tokenizer)
        elif (
            layer_readout == "eos"
            and is_decoder
            and self.tokenizer.eos_token_id is None
            and not ends_every_text(self.tokenizer)
        ):
            raise ConfigurationError(
                f"layer_readout='eos' reads the EOS token, but the tokenizer of {model_name_or_path!r} has none. "
                f"Use layer_readout='mean', or set an EOS token on the tokenizer."
            )
        ensure_pad_token(self.tokenizer)
        self._prepare_model()
        if verify:
            check_attention(self.model, attention)

    def _load_backbone(self, model_name_or_path: str, kwargs: dict[str, Any]) -> None:
        try:
            Transformer.__init__(self, model_name_or_path, **kwargs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigurationError) or "model" not in self.__dict__.get("_modules", {}):
                raise
            raise ConfigurationError(
                f"{model_name_or_path!r} has a model but no usable tokenizer ({error}). Save one into the "
                f"folder, or pass processor_kwargs of a base that has one."
            ) from error
        if self.tokenizer is None:
            raise ConfigurationError(
                f"{model_name_or_path!r} has no tokenizer, so it cannot embed text. Save one into it."
            )

    def _load_config(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        """Checks what the config alone can tell, before weights are read."""
        config, is_peft_model = super()._load_config(model_name_or_path, *args, **kwargs)
        refuse_encoder_decoder(config, repr(model_name_or_path))
        if hasattr(config, "get_text_config"):  # sentence-transformers 6.0 returns an adapter's own config
            num_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
            if num_layers is not None:
                if num_layers > _MOST_LAYERS:
                    raise ConfigurationError(
                        f"{model_name_or_path!r} asks for {num_layers:,} layers in its config.json; the limit is "
                        f"{_MOST_LAYERS:,}. Save or download the model again."
                    )
                resolve_layers(self._requested_layers, num_layers)
            _check_length(self._requested_length, config)
        return config, is_peft_model

    def _load_model(
        self, model_name_or_path: str, task: Any, config: Any, backend: str, is_peft_model: bool, **kwargs: Any
    ) -> Any:
        """Loads the model; weights that the files lack, or an adapter's that fit nothing, are an error.

        transformers would draw the first at random and drop the second, with a logged table.
        """
        wanted = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}  # to name them ourselves
        if isinstance(wanted.get("quantization_config"), dict) and hasattr(config, "quantization_config"):
            del wanted["quantization_config"]  # an adapter's note of how its base was quantised: published so, it knows
        with naming(model_name_or_path, SafetensorError, FileNotFoundError):
            model, report = super()._load_model(model_name_or_path, task, config, backend, is_peft_model, **wanted)
        bad = [f"{name}: {list(found)}, not {list(due)}" for name, found, due in report["mismatched_keys"]]
        # A pooler on the first token, which many encoders are published without, takes no part here.
        bad += [f"{name}: none" for name in report["missing_keys"] if "pooler" not in name]
        if is_peft_model:
            # The head of a language model takes no part either.
            bad += [f"{name}: no place in it" for name in report["unexpected_keys"] if "lm_head." not in name]
        if bad:
            raise DataError(
                f"{model_name_or_path} does not fit its {type(model).__name__} in {len(bad)} weights "
                f"({min(bad)}{', ...' if bad[1:] else ''}): the embeddings would be wrong. Save or download the "
                f"model again."
            )
        return model

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """Read what :meth:`save` wrote; arguments as for ``Transformer.load``.

        Raises:
            DataError: If a file is missing, damaged, from a newer version, or lacks weights.
        """
        location = ("token", "cache_folder", "revision", "local_files_only")
        where = {key: kwargs[key] for key in location if key in kwargs}
        options = dict(kwargs.get("model_kwargs") or {})
        check_seal(model_name_or_path, verify_weights=options.pop("verify_weights", False), **where)
        with naming(f"{model_name_or_path}/{cls.config_file_name}", TypeError):
            module = super().load(model_name_or_path, **{**kwargs, "model_kwargs": options})
        module._loaded_from = (model_name_or_path, where)
        return module

    def _prepare_model(self) -> None:
        """Set attention mode and hooks, which no file keeps, on the model that is there now."""
        set_attention(self.model, self.attention)
        hook_layers(list(decoder_layers(self.model)), self.layers)
        for module in self.model.modules():
            # On a CPU with bf16 instructions bitsandbytes repacks 4-bit layers in their first inference: from then on
            # they compute in bf16, whatever they are asked for, and give no right gradients (seen in 0.50).
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        # Keys and values of every layer would be held for nothing; sentence-transformers sees to it from 6.2, at load.
        self.config.get_text_config(decoder=True).use_cache = False
        # In a tuple, or torch would register the model as a second submodule.
        self._prepared = (self.model,)
        self._counts_positions = needs_position_ids(self.model)

    def _prepare_if_replaced(self) -> None:
        if self._prepared[0] is not self.model:
            self._prepare_model()

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Runs the backbone; shapes in the class docstring."""
        self._prepare_if_replaced()
        features = dict(features)
        for_pooling = {name: features.pop(name) for name in POOLING_FEATURES if name in features}
        spans = TokenSpans.of(features, include_prompt=self.include_prompt)
        if self.batch_runner is None or kwargs or self.training or torch.is_grad_enabled():
            features = self.run(features, spans, **kwargs)
        else:
            features = self.batch_runner(self, features, spans)
        return spans.compact(features | for_pooling)

    def run(self, features: dict[str, Any], spans: TokenSpans, **kwargs: Any) -> dict[str, Any]:
        """Runs the backbone on one batch and reads it out; adds ``token_embeddings``, readout and summaries."""
        # Asked of the parameters: inside a reentrant checkpoint the tensors do not say that they are trained.
        trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.model.parameters())
        if self._counts_positions and not spans.is_flat and "past_key_values" not in kwargs:
            # The backbone's own hook does this where it is called; the base class calls its forward, past the hooks.
            kwargs = {"position_ids": position_ids_from(features["attention_mask"]), **kwargs}
        with capture_layers(spans, self.layer_readout, keep_raw=trained) as capture:
            features = super().forward(features, **kwargs)
        tokens = features["token_embeddings"]
        features["readout"] = capture.reduce(tokens)
        if self.layers:
            features["layer_summaries"] = capture.summaries(tokens, self.layers, self.num_layers)
        return features

    @property
    def max_seq_length(self) -> int | None:
        """Longest text in tokens, EOS included; setting it beyond the model's positions raises ConfigurationError."""
        return self.tokenizer.model_max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        _check_length(value, self.config)
        self.tokenizer.model_max_length = value

    def on_model_ready(self, model: SentenceTransformer) -> None:
        """Names the finished model by its weights and mends what `encode` returns, see :func:`_infer`.

        sentence-transformers calls this at the end of its construction.
        """
        super().on_model_ready(model)
        identify_by_weights(model)
        seal_saves(model)
        model._inference = partial(_infer, model)

    def preprocess(self, inputs: Sequence[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Tokenize texts; arguments as for ``Transformer.preprocess``.

        Raises:
            InputError: If an input is not a string, cannot be encoded, or has no token.
            ConfigurationError: If the prompt leaves no room for a text.
        """
        for text in inputs:
            if not isinstance(text, str):
                raise InputError(
                    f"{reprlib.repr(text)} is of type {type(text).__name__}; this model embeds text: pass str."
                )
        prompt = kwargs.get("prompt") or (args[0] if args else None)
        try:
            self.check_prompt(prompt)
            features = super().preprocess(inputs, *args, **kwargs)
        except (TypeError, UnicodeEncodeError):
            for text in (prompt or "", *inputs):
                _check_surrogates(text)
            raise
        for index, length in enumerate(_token_counts(features)):
            if length == 0:
                raise InputError(
                    f"{reprlib.repr(inputs[index])} has no token, so it has no embedding. Build the model with "
                    f"add_eos_token=True, or leave such texts out."
                )
        return features

    def check_prompt(self, prompt: str | None) -> None:
        """Raise ConfigurationError for a prompt after which most texts would be cut to the same vector."""
        limit = self.max_seq_length
        if not prompt or limit is None:
            return
        # With the settings of any other call: a fast tokenizer keeps them, and other threads may be using it.
        count = len(self.tokenizer([prompt], padding=True, truncation="longest_first")["input_ids"][0])
        if limit - count < ROOM_FOR_TEXT:
            count = len(self.tokenizer(prompt, verbose=False)["input_ids"])
            raise ConfigurationError(
                f"The prompt {reprlib.repr(prompt)} takes {count} tokens, special tokens included, of "
                f"max_seq_length={limit} and leaves fewer than {ROOM_FOR_TEXT} to the text. Shorten it, or use "
                f"max_seq_length={count + ROOM_FOR_TEXT} or more."
            )

    def _get_prompt_length(self, prompt: str, **kwargs: Any) -> int | None:
        """Count the tokens that are the prompt's whatever text follows.

        The last token of a prompt that ends in a space merges with the text, so counting the prompt alone, as the base
        class does, would drop the text's first word. Several continuations are tried instead.
        """
        if prompt not in self._prompt_length_mapping:
            limit = {"truncation": True} if self.max_seq_length else {}
            alone = self.tokenizer(prompt, **limit)["input_ids"]
            variants = (prompt.rstrip(), *(prompt + text for text in ("a", "1", "(")))
            shared = [_shared_start(alone, self.tokenizer(variant, **limit)["input_ids"]) for variant in variants]
            self._prompt_length_mapping[prompt] = min(shared)
        return self._prompt_length_mapping[prompt]

    def get_config_dict(self) -> dict[str, Any]:
        """Returns what is saved of the settings; for an adapter also how its base is to be loaded beside it."""
        config = super().get_config_dict()
        if getattr(self.model, "peft_config", None):
            # A whole model's config.json says this; an adapter's base comes from elsewhere, as it is there.
            base: dict[str, Any] = {"dtype": str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")}
            quantization = getattr(self.model.config, "quantization_config", None)
            if quantization is not None:
                base["quantization_config"] = quantization if isinstance(quantization, dict) else quantization.to_dict()
            config["model_kwargs"] = base
        return config

    def save(self, output_path: str, *args: object, **kwargs: object) -> None:
        """Writes the backbone (safetensors), tokenizer, config, version requirements and the module code."""
        self._prepare_if_replaced()
        root = Path(output_path).resolve()
        begin_save(root)
        with without_truncation(self.tokenizer):
            super().save(output_path, *args, **{**kwargs, "safe_serialization": True})
        _tidy_adapter(root)
        save_source_files(type(self), root)
        save_requirements(root)
        if self._loaded_from is not None:
            name, where = self._loaded_from
            copy_assets(name, root, **where)


# SentenceTransformer.set_pooling_include_prompt, which mteb calls, looks for a Pooling; prompt exclusion is
# this module's setting, so it must find this one.
Pooling.register(LLMTransformer)


def resolve_layers(layers: Literal["all"] | Sequence[int], num_layers: int) -> list[int]:
    """Return 1-based layer numbers in ascending order; a wrong or repeated one is a ConfigurationError.

    Example:
        >>> resolve_layers([-1, 2], num_layers=12)
        [2, 12]
    """
    if isinstance(layers, str):
        _check_choice("layers", layers, ("all",))
        return list(range(1, num_layers + 1))
    resolved: list[int] = []
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool):
            raise ConfigurationError(f"layers holds {reprlib.repr(layer)}, which is no number of a layer.")
        number = layer + num_layers + 1 if layer < 0 else layer
        if not 1 <= number <= num_layers or number in resolved:
            reason = "names a layer twice" if number in resolved else f"is outside 1..{num_layers}"
            raise ConfigurationError(
                f"layers={reprlib.repr(list(layers))}: {layer} {reason}. Layers count from 1, or from -1 at the end; "
                f"'all' takes all."
            )
        resolved.append(number)
    return sorted(resolved)


def _tidy_adapter(folder: Path) -> None:
    """Sorts the names in an adapter's config, and writes the full names of DoRA's magnitudes.

    peft keeps names in sets, whose order differs from process to process. It leaves `.weight` off the magnitudes' names
    and adds it at load; transformers, which loads adapters here, does not, and would start them from scratch.
    """
    file = folder / "adapter_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        for key in ("target_modules", "exclude_modules"):
            if isinstance(config.get(key), list):
                config[key] = sorted(config[key])
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file) if file.is_file() else {}
    if any(name.endswith(_MAGNITUDE) for name in weights):
        whole = {f"{name}.weight" if name.endswith(_MAGNITUDE) else name: weight for name, weight in weights.items()}
        renamed = file.with_suffix(".partial")  # beside it: what was loaded is still read from the file
        save_file(whole, renamed, metadata={"format": "pt"})
        renamed.replace(file)


def _check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigurationError(
            f"{name}={value!r} is unknown; it is one of {list(known)}.{nearest(str(value), known)}"
        )


def _check_length(length: int | None, config: PreTrainedConfig) -> None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if length is not None and limit and length > limit > 0:
        raise ConfigurationError(
            f"max_seq_length={length} is beyond the {limit} positions of this {config.model_type}. Use at most {limit}."
        )


def _check_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 20, 0) : error.start + 20]
        raise InputError(
            f"{around!r} holds the lone surrogate {text[error.start]!r} at position {error.start} of the text: half a "
            f"character, which has no encoding. Clean it, for instance by text.encode(errors='replace').decode()."
        ) from error


def _infer(model: SentenceTransformer, inputs: list, *, truncate_dim: int | None = None, **kwargs: Any) -> Any:
    """Runs sentence-transformers' inference; cut vectors get unit length again, and token embeddings no padding.

    It cuts vectors after the model has normalised them, and of token embeddings removes padding on the right only.
    """
    if truncate_dim is not None and (type(truncate_dim) is not int or truncate_dim < 1):
        raise ConfigurationError(f"truncate_dim={truncate_dim!r} must be a positive integer.")
    if cut := truncate_dim is not None and isinstance(model[-1], Normalize):
        kwargs["normalize_embeddings"] = True
    of_tokens = kwargs.get("output_value") == "token_embeddings"
    if of_tokens:
        kwargs["output_value"] = None
    found = type(model)._inference(model, inputs, truncate_dim=truncate_dim, **kwargs)
    if of_tokens:
        return [item["token_embeddings"][item["attention_mask"].bool()] for item in found]
    if cut and kwargs.get("output_value", "") is None:
        for item in found:
            item["sentence_embedding"] = nn.functional.normalize(item["sentence_embedding"], dim=-1)
    return found


def _check_backend(backend: str) -> None:
    if backend != "torch":
        raise ConfigurationError(
            f"backend={backend!r} cannot run an LLMTransformer: attention mode and layer readout need the torch model. "
            f"Use backend='torch'."
        )


def _shared_start(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _token_counts(features: dict[str, Any]) -> list[int]:
    if "cu_seq_lens_q" in features:
        return features["cu_seq_lens_q"].diff().tolist()
    mask: Tensor | None = features.get("attention_mask")
    return [] if mask is None else mask.sum(dim=1).tolist()
