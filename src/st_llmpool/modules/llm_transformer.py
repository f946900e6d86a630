"""The backbone: a decoder LLM with a chosen attention mode, read out at every layer."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer, PreTrainedConfig

from .attention import (
    ATTENTION_MODES,
    check_attention,
    decoder_layers,
    is_encoder,
    needs_position_ids,
    position_ids_from,
    refuse_encoder_decoder,
    set_attention,
    text_config,
)
from .errors import ConfigurationError, DataError, InputError, check_choice, of_package
from .layer_readout import POOLING_FEATURES, READOUTS, TokenSpans, capture_layers, hook_layers
from .portable import LOCATION, PortableModule, complete_model, forget_last_call, naming, save_source_files
from .seal import check_seal

_MOST_LAYERS = 2_000  # ten times those of the deepest model that is published
_ENDINGS = ("a", "", "a " * 64)  # texts that have their last token in common only if it is added to every text
ROOM_FOR_TEXT = 8  # fewest tokens that a prompt must leave to the text
_TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


class LLMTransformer(Transformer, PortableModule):
    """A Hugging Face decoder (or encoder) as the first module of a ``SentenceTransformer``.

    Settings that change the embedding are saved in its config and applied on every load, of adapters too.

    Args:
        model_name_or_path: Hub id or folder, as for ``Transformer``.
        attention: ``"bidirectional"`` or ``"causal"``.
        layers: Layers to read, ``"all"`` or 1-based numbers, negative from the end; poolings over tokens need none.
        layer_readout: ``"eos"`` (last token) or ``"mean"``; None is ``"eos"`` for causal attention, else ``"mean"``.
        add_eos_token: End every text in EOS; None is on for decoders and off for encoders.
        include_prompt: False keeps the prompt's tokens out of readout and pooling.
        causal_layers: Layers (1-based) that are known to stay causal under ``attention="bidirectional"``.
        verify: Check the attention by two short forwards; not saved.
        **kwargs: Everything that ``Transformer`` takes.

    Raises:
        ConfigurationError: If a setting is unknown, out of range or does not fit the base.
        AttentionError: If two short forwards show another attention than `attention`.

    Inputs:
        ``input_ids`` (B, T) and ``attention_mask`` (B, T) with padding on any side, or flat ``input_ids`` and
        ``position_ids`` (1, N) with ``cu_seq_lens_q`` (B + 1,); ``prompt_length``; ``sentence_starts`` for the pooling.

    Outputs:
        ``token_embeddings`` (B, T, D), or (1, N, D) if flat, of the last layer; ``attention_mask`` (B, T) of the tokens
        that the pooling may see; ``readout`` (B, D) of the last layer and ``layer_summaries`` (B, L, D), in float32.

    Example:
        >>> from st_llmpool.data import builtin_backbone
        >>> backbone = LLMTransformer(builtin_backbone(), attention="bidirectional", layers=[1, -1])
        >>> backbone(backbone.preprocess(["a text", "another, longer text"]))["layer_summaries"].shape[:2]
        torch.Size([2, 2])
    """

    config_keys = [
        *Transformer.config_keys,
        *("attention", "layer_readout", "layers", "add_eos_token", "include_prompt", "causal_layers"),
    ]
    #: Runs a batch in inference instead of :meth:`run`; set by ``st_llmpool.optimize_inference``, never saved.
    batch_runner: Callable[[LLMTransformer, dict[str, Any], TokenSpans], dict[str, Any]] | None = None
    #: Where a saved model was loaded from, and how; None for one that was built.
    loaded_from: tuple[str, dict[str, Any]] | None = None
    _model_at_hand: Any = None
    _prepared: tuple[Any] = (None,)

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
        check_choice("attention", attention, ATTENTION_MODES)
        if layer_readout is None:
            layer_readout = "eos" if attention == "causal" else "mean"
        check_choice("layer_readout", layer_readout, READOUTS)
        check_choice("include_prompt", include_prompt, (True, False))
        check_choice("add_eos_token", add_eos_token, (None, True, False))
        for name in ("do_lower_case", "unpad_inputs"):
            check_choice(name, kwargs.get(name), (None, True, False))
        check_choice("backend", kwargs.get("backend", "torch"), ("torch",))
        kwargs.setdefault("modality_config", _TEXT_ONLY)  # a chat template would wrap every text in a conversation
        kwargs.setdefault("module_output_name", "token_embeddings")
        model_kwargs = dict(kwargs.get("model_kwargs") or {})
        if "torch_dtype" in model_kwargs:  # the older name, over which a saved adapter's own dtype would win
            model_kwargs["dtype"] = model_kwargs.pop("torch_dtype")
            kwargs["model_kwargs"] = model_kwargs
        self._load_backbone(model_name_or_path, kwargs)
        processor_kwargs = kwargs.get("processor_kwargs") or {}
        check_length(processor_kwargs.get("model_max_length", kwargs.get("max_seq_length")), self.config)
        self.attention = attention
        self.layer_readout = layer_readout
        self.include_prompt = include_prompt
        self.num_layers = len(decoder_layers(self.model))
        self.layers = resolve_layers(layers, self.num_layers)
        self.causal_layers = resolve_layers(causal_layers, self.num_layers)
        is_decoder = not is_encoder(text_config(self.model))
        self.add_eos_token = is_decoder if add_eos_token is None else add_eos_token
        self._check_tokenizer(eos_is_read=layer_readout == "eos" and is_decoder)
        self._prepare_model()
        if verify:
            check_attention(self.model, attention)

    def _load_backbone(self, model_name_or_path: str, kwargs: dict[str, Any]) -> None:
        fault: Exception | str = "there is none"
        try:
            Transformer.__init__(self, model_name_or_path, **kwargs)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            if isinstance(error, ConfigurationError) or "model" not in self.__dict__.get("_modules", {}):
                raise
            fault, self._model_at_hand, self.processor = error, self.model, None
            with suppress(OSError, ValueError, KeyError, TypeError):  # a multimodal model without an image processor
                _init_with_tokenizer(self, model_name_or_path, **kwargs)
        if self.processor is None or self.tokenizer is None:
            raise ConfigurationError(f"{model_name_or_path!r} has no usable tokenizer ({fault}). Save one into it.")

    def _check_tokenizer(self, *, eos_is_read: bool) -> None:
        """Check that texts end in EOS and can be padded, as a saved one's do; the package changes a base's."""
        last = {tuple(self.tokenizer(text, truncation=True, max_length=32)["input_ids"][-1:]) for text in _ENDINGS}
        forget_last_call(self.tokenizer)
        has_ending = len(last) == 1
        if eos_is_read and not self.add_eos_token and not has_ending and self.tokenizer.eos_token_id is None:
            raise ConfigurationError("layer_readout='eos', but the tokenizer has no EOS token. Set one, or use 'mean'.")
        if self.tokenizer.pad_token_id is None or (self.add_eos_token and not has_ending):
            if (package := of_package("base_tokenizer")) is None:
                raise ConfigurationError("The tokenizer adds no EOS or has no padding token: pip install st-llmpool.")
            package.prepare_tokenizer(self.tokenizer, add_eos_token=self.add_eos_token)

    def _load_config(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        config, is_peft_model = super()._load_config(model_name_or_path, *args, **kwargs)
        refuse_encoder_decoder(config, repr(model_name_or_path))
        if (count := getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)) > _MOST_LAYERS:
            raise ConfigurationError(f"{model_name_or_path!r} asks for {count:,} layers; at most {_MOST_LAYERS:,} fit.")
        return config, is_peft_model

    def _load_model(
        self, model_name_or_path: str, task: Any, config: Any, backend: str, is_peft_model: bool, **kwargs: Any
    ) -> Any:
        """Load the model; weights that transformers would draw at random or drop are an error."""
        if self._model_at_hand is not None:
            return self.__dict__.pop("_model_at_hand")
        wanted = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}  # to name them ourselves
        if isinstance(wanted.get("quantization_config"), dict) and hasattr(config, "quantization_config"):
            del wanted["quantization_config"]  # an adapter's note of how its base was quantised: published so, it knows
        with naming(model_name_or_path, SafetensorError, FileNotFoundError):
            model, report = super()._load_model(model_name_or_path, task, config, backend, is_peft_model, **wanted)
        missing = set(report["missing_keys"])
        bad = [f"{name}: {list(found)}, not {list(due)}" for name, found, due in report["mismatched_keys"]]
        if is_peft_model:  # the report is the adapter's alone; what was read from a file, or is tied to it, is marked
            bad += [f"{name}: no place in it" for name in report["unexpected_keys"] if "lm_head." not in name]
            named = model.named_parameters()
            missing |= {name for name, weight in named if not getattr(weight, "_is_hf_initialized", False)}
        # Neither a language model's head nor a pooler on the first token, which many encoders lack, takes part.
        bad += [f"{name}: none" for name in missing if "pooler" not in name]
        if bad:
            fault = f"does not fit its {type(model).__name__} in {len(bad)} weights: {', '.join(sorted(bad)[:3])}"
            raise DataError(f"{model_name_or_path} {fault}. Save or download the model again.")
        return model

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Self:
        """Read what :meth:`save` wrote; DataError if a file is missing, damaged, too new, or lacks weights."""
        where = {key: kwargs[key] for key in LOCATION if key in kwargs}
        options = dict(kwargs.get("model_kwargs") or {})
        check_seal(model_name_or_path, verify_weights=options.pop("verify_weights", False), **where)
        with naming(f"{model_name_or_path}/{cls.config_file_name}", TypeError):
            module = super().load(model_name_or_path, **{**kwargs, "model_kwargs": options})
        module.loaded_from = (model_name_or_path, where)
        return module

    def _prepare_model(self) -> None:
        """Set attention and hooks, which no file keeps, once on each model."""
        if self._prepared[0] is self.model:
            return
        set_attention(self.model, self.attention)
        hook_layers(list(decoder_layers(self.model)), self.layers)
        for module in self.model.modules():  # bitsandbytes would repack 4-bit layers, and give wrong gradients then
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        text_config(self.model).use_cache = False
        self._prepared = (self.model,)  # in a tuple, or torch would register the model as a second submodule
        self._counts_positions = needs_position_ids(self.model)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the backbone; shapes in the class docstring."""
        self._prepare_model()
        features = dict(features)
        for_pooling = {name: features.pop(name) for name in POOLING_FEATURES if name in features}
        spans = TokenSpans.of(features, include_prompt=self.include_prompt)
        self._check_flat(features, spans)
        if self.batch_runner is None or kwargs or self.training or torch.is_grad_enabled():
            features = self.run(features, spans, **kwargs)
        else:
            features = self.batch_runner(self, features, spans)
        return spans.compact(features | for_pooling)

    def _check_flat(self, features: dict[str, Any], spans: TokenSpans) -> None:
        """Raise InputError for flat texts that the attention would mix: only FlashAttention reads their offsets."""
        implementation, mask = str(self.model.config._attn_implementation), features.get("attention_mask")
        separates = "flash" in implementation or (mask is not None and mask.dim() == 4)
        if spans.last is not None and len(spans.last) > 1 and not (separates and "position_ids" in features):
            raise InputError(
                f"Flat input of {len(spans.last)} texts needs position_ids and FlashAttention or a mask (1, 1, N, N): "
                f"{implementation} would mix the texts. Pad them, or load with attn_implementation='flash_attention_2'."
            )

    def run(self, features: dict[str, Any], spans: TokenSpans, **kwargs: Any) -> dict[str, Any]:
        """Run the backbone on one batch and read it out; adds ``token_embeddings``, readout and summaries."""
        # Asked of the parameters: inside a reentrant checkpoint the tensors do not say that they are trained.
        trained = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.model.parameters())
        if self._counts_positions and spans.text is None and "past_key_values" not in kwargs:
            # set_attention's hook does this too, but the base class calls the backbone's forward, past its hooks.
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
        """Longest text in tokens, EOS included; ConfigurationError beyond the model's positions."""
        return self.tokenizer.model_max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        check_length(value, self.config)
        self.tokenizer.model_max_length = value

    def on_model_ready(self, model: SentenceTransformer) -> None:
        """Complete the finished model; sentence-transformers calls this at the end of its construction."""
        super().on_model_ready(model)
        complete_model(model)

    def preprocess(self, inputs: Sequence[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Tokenize texts; InputError for what is no text or has no token, ConfigurationError for too long a prompt."""
        for text in inputs:
            if not isinstance(text, str):
                raise InputError(f"{reprlib.repr(text)} is of type {type(text).__name__}: pass str.")
        prompt = kwargs.get("prompt") or (args[0] if args else None)
        try:
            self.check_prompt(prompt)
            features = super().preprocess(inputs, *args, **kwargs)
        except (TypeError, UnicodeEncodeError) as error:
            for text in (prompt or "", *inputs):
                if found := re.search("[\ud800-\udfff]", text):
                    fault = f"{reprlib.repr(text)} holds the lone surrogate {found[0]!r} at position {found.start()}"
                    raise InputError(f"{fault}. Clean it by text.encode(errors='replace').decode().") from error
            raise
        is_flat = "cu_seq_lens_q" in features
        lengths = features["cu_seq_lens_q"].diff() if is_flat else features["attention_mask"].sum(dim=1)
        if not lengths.all():
            text = reprlib.repr(inputs[int(lengths.argmin())])
            raise InputError(f"{text} has no token. Leave it out, or build the model with add_eos_token=True.")
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
                f"The prompt {reprlib.repr(prompt)} takes {count} tokens of max_seq_length={limit} and leaves fewer "
                f"than {ROOM_FOR_TEXT} to the text. Shorten it, or use max_seq_length={count + ROOM_FOR_TEXT} or more."
            )

    def _get_prompt_length(self, prompt: str, **kwargs: Any) -> int | None:
        """Count the tokens that are the prompt's whatever text follows: one that ends in a space merges with it."""
        if prompt not in self._prompt_length_mapping:
            limit = {"truncation": True} if self.max_seq_length else {}
            alone = self.tokenizer(prompt, **limit)["input_ids"]
            variants = (prompt.rstrip(), *(prompt + text for text in ("a", "1", "(")))
            others = [self.tokenizer(variant, **limit)["input_ids"] for variant in variants]
            self._prompt_length_mapping[prompt] = sum(
                1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(alone, *others, strict=False))
            )
        return self._prompt_length_mapping[prompt]

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings that are saved; of an adapter also how to load its base."""
        config = super().get_config_dict()
        if getattr(self.model, "peft_config", None):
            base: dict[str, Any] = {"dtype": str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")}
            quantization = getattr(self.model.config, "quantization_config", None)
            if quantization is not None:
                base["quantization_config"] = quantization if isinstance(quantization, dict) else quantization.to_dict()
            config["model_kwargs"] = base
        return config

    def save(self, output_path: str, *args: object, **kwargs: object) -> None:
        """Write the backbone (safetensors), tokenizer, config and the module code."""
        self._prepare_model()
        forget_last_call(self.tokenizer)
        super().save(output_path, *args, **{**kwargs, "safe_serialization": True})
        root = Path(output_path).resolve()
        if (root / "adapter_config.json").is_file() and (package := of_package("adapters")):
            package.tidy_adapter(root)
        save_source_files(type(self), root)


# SentenceTransformer.set_pooling_include_prompt, which mteb calls, looks for a Pooling; the setting is this module's.
Pooling.register(LLMTransformer)


def resolve_layers(layers: Literal["all"] | Sequence[int], num_layers: int) -> list[int]:
    """Return 1-based layer numbers in ascending order, [2, 12] of 12 for [-1, 2], or raise ConfigurationError."""
    if not isinstance(layers, list | tuple | range):
        check_choice("layers", layers, ("all",))
        return list(range(1, num_layers + 1))
    resolved: list[int] = []
    for layer in layers:
        if type(layer) is not int:
            raise ConfigurationError(f"layers holds {reprlib.repr(layer)}, which is no number of a layer.")
        number = layer + num_layers + 1 if layer < 0 else layer
        if not 1 <= number <= num_layers or number in resolved:
            reason = "names a layer twice" if number in resolved else f"is outside 1..{num_layers}"
            shown = f"layers={reprlib.repr(list(layers))}: {layer}"
            raise ConfigurationError(f"{shown} {reason}. Count from 1, or from -1 at the end, or use 'all'.")
        resolved.append(number)
    return sorted(resolved)


def check_length(length: Any, config: PreTrainedConfig) -> None:
    """Raise ConfigurationError unless `length` is None or a number of tokens that the model has positions for."""
    if length is None:
        return
    if type(length) is not int or length < 1:
        raise ConfigurationError(f"max_seq_length={reprlib.repr(length)} must be a positive integer or None.")
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and length > limit > 0:
        raise ConfigurationError(f"max_seq_length={length} is beyond the {limit} positions; use at most {limit}.")


def _init_with_tokenizer(module: Transformer, *args: Any, **kwargs: Any) -> None:
    """Run ``Transformer.__init__`` with AutoTokenizer for AutoProcessor, which it calls by name."""
    init: Any = Transformer.__init__
    code = getattr(init, "__wrapped__", init)
    names = {**code.__globals__, "AutoProcessor": AutoTokenizer}
    run = FunctionType(code.__code__, names, closure=code.__closure__)
    run.__kwdefaults__ = code.__kwdefaults__
    run(module, *args, **kwargs)
