"""Designs (attention mode × pooling) by name, and `build_embedder`, which builds a model from one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.module import Module
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling

from . import poolings
from .adapters import add_adapter, continue_adapter, has_adapter
from .attention_proof import verify_attention
from .data.builtin_backbone import builtin_backbone
from .model_card.card import EmbedderCardData
from .modules.cross_attention import CrossAttentionPooling
from .modules.errors import ConfigurationError, check_choice
from .modules.latent_attention_pooling import LatentAttentionPooling
from .modules.llm_transformer import LLMTransformer, check_length, resolve_layers
from .modules.multi_layer_pooling import MultiLayerPooling
from .modules.scalar_mix_pooling import ScalarMixPooling
from .modules.trainable_pooling import TrainablePooling
from .saved_embedder import SavedEmbedder, is_saved_embedder, read_architecture

if TYPE_CHECKING:
    from peft import PeftConfig


logger = logging.getLogger(__name__)


#: Sizes of the poolings on :class:`CrossAttention` by name; those of ``"compact"`` are the class's own defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "compact": {},
    "paper": {"num_latents": 768, "num_heads": 32, "head_dim": 2048, "mlp_ratio": 4, "init_std": 1.0},
}


@dataclass(frozen=True)
class PoolingSpec:
    """A pooling by name.

    Attributes:
        module: The class, called with ``embedding_dimension``, the fixed options and the user's.
        reads: ``"tokens"``, ``"readout"`` or ``"layers"``; a pooling over layers also gets ``num_layers``. A class that
            can read tokens or layers has an option ``reads``, which takes precedence.
        summary: One line for tables.
        options: Fixed options.
    """

    module: Callable[..., Module]
    reads: Literal["tokens", "readout", "layers"]
    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_trainable(self) -> bool:
        """Whether the pooling has weights to train."""
        return isinstance(self.module, type) and issubclass(self.module, TrainablePooling)

    def reads_with(self, pooling_kwargs: Mapping[str, Any]) -> str:
        """Return what the pooling reads when built with these options."""
        return pooling_kwargs.get("reads", self.reads)

    def build(self, backbone: LLMTransformer, pooling_kwargs: Mapping[str, Any]) -> Module:
        """Return the pooling module for `backbone`."""
        sizes = {"embedding_dimension": backbone.get_embedding_dimension()}
        if self.reads_with(pooling_kwargs) == "layers":
            sizes["num_layers"] = len(backbone.layers)
        try:
            return self.module(**sizes, **self.resolved(pooling_kwargs))
        except TypeError as error:
            raise ConfigurationError(f"pooling_kwargs={dict(pooling_kwargs)} do not fit: {error}.") from error

    def resolved(self, pooling_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that ``module`` is called with: the fixed ones, then the preset's, then those given."""
        given, sizes = dict(pooling_kwargs), dict[str, Any]()
        if "preset" in given and isinstance(self.module, type) and issubclass(self.module, CrossAttentionPooling):
            preset = given.pop("preset")
            check_choice("preset", preset, tuple(PRESETS))
            sizes = PRESETS[preset]
        return {**self.options, **sizes, **given}


#: Pooling name -> spec, including sentence-transformers' own mode names.
POOLINGS: dict[str, PoolingSpec] = {
    "eos": PoolingSpec(Pooling, "tokens", "the last token", {"pooling_mode": "lasttoken"}),
    "lasttoken": PoolingSpec(Pooling, "tokens", "the last token", {"pooling_mode": "lasttoken"}),
    "mean": PoolingSpec(Pooling, "tokens", "mean of the tokens", {"pooling_mode": "mean"}),
    "weightedmean": PoolingSpec(Pooling, "tokens", "later tokens count more", {"pooling_mode": "weightedmean"}),
    "max": PoolingSpec(Pooling, "tokens", "maximum per dimension", {"pooling_mode": "max"}),
    "cls": PoolingSpec(Pooling, "tokens", "the first token", {"pooling_mode": "cls"}),
    "last_layer": PoolingSpec(LatentAttentionPooling, "tokens", "trainable attention over the last layer's tokens"),
    "multi_layer": PoolingSpec(MultiLayerPooling, "layers", "trainable attention over every layer's summary"),
    "linear": PoolingSpec(poolings.LinearPooling, "readout", "trainable linear map of the plain readout"),
    "scalar_mix": PoolingSpec(ScalarMixPooling, "layers", "one trained weight per layer"),
    "hopfield": PoolingSpec(
        poolings.HopfieldPooling, "tokens", "trainable patterns retrieve from the tokens, in several steps"
    ),
    "attsets": PoolingSpec(poolings.AttSetsPooling, "tokens", "a trainable softmax over the tokens for each feature"),
    "gem": PoolingSpec(poolings.GeneralizedMeanPooling, "tokens", "power means of the tokens with trainable powers"),
    "pyramid": PoolingSpec(poolings.PyramidPooling, "tokens", "trainable projection of the means of spans of tokens"),
    "ponet": PoolingSpec(poolings.PoNetPooling, "tokens", "mean of tokens with text, segment and neighbours"),
}


@dataclass(frozen=True)
class Design:
    """An attention mode and a pooling, as keyword arguments of :func:`build_embedder`.

    Example:
        >>> DESIGNS["5"].attention, DESIGNS["5"].pooling
        ('bidirectional', 'multi_layer')
    """

    attention: Literal["causal", "bidirectional"]
    pooling: str
    pooling_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def as_kwargs(self) -> dict[str, Any]:
        """Return the arguments for :func:`build_embedder`."""
        return {"attention": self.attention, "pooling": self.pooling, "pooling_kwargs": dict(self.pooling_kwargs)}


_PAPER = {"preset": "paper", "readout_skip": False}

#: The five designs of Tang and Yang 2024 (arXiv 2409.02727) with our defaults and with theirs, the baseline, and the
#: two that cross attention and readout with it and design 1, which the paper leaves out.
DESIGNS: dict[str, Design] = {
    "1": Design("causal", "eos"),
    "2": Design("causal", "last_layer"),
    "3": Design("causal", "multi_layer"),
    "4": Design("bidirectional", "last_layer"),
    "5": Design("bidirectional", "multi_layer"),
    "paper-1": Design("causal", "eos"),
    "paper-2": Design("causal", "last_layer", _PAPER),
    "paper-3": Design("causal", "multi_layer", _PAPER),
    "paper-4": Design("bidirectional", "last_layer", _PAPER),
    "paper-5": Design("bidirectional", "multi_layer", _PAPER),
    "mean-bidirectional": Design("bidirectional", "mean"),
    "eos-bidirectional": Design("bidirectional", "eos"),
    "mean-causal": Design("causal", "mean"),
}


def build_embedder(
    model_name_or_path: str,
    *,
    attention: Literal["causal", "bidirectional"] | None = None,
    pooling: str | None = None,
    pooling_kwargs: Mapping[str, Any] | None = None,
    pooling_init: Literal["new"] | None = None,
    layers: Literal["all"] | Sequence[int] | None = None,
    layer_readout: Literal["eos", "mean"] | None = None,
    include_prompt: bool | None = None,
    max_seq_length: int | None = None,
    add_eos_token: bool | None = None,
    peft_config: PeftConfig | Mapping[str, Any] | str | None = None,
    quantization_config: Any = None,
    prompts: dict[str, str] | None = None,
    allow_partial: bool = False,
    verify: bool = True,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    processor_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: bool | str | None = None,
) -> SentenceTransformer:
    """Build a sentence-transformers model from a base LLM and prove its attention on the loaded weights.

    If the base is a saved embedder, of ours or any sentence-transformers model on a Transformer, all of it is kept:
    modules, weights, prompts, EOS, attention, and the adapter, which stays trainable.

    Args:
        model_name_or_path: Hub id or folder of the base or saved embedder, or ``"builtin"`` for the small base in the
            package.
        attention: ``"bidirectional"`` or ``"causal"``; None is bidirectional for a base LLM, and a saved embedder's
            own.
        pooling: A name in :data:`POOLINGS`; None is ``"multi_layer"`` for a base LLM, and a saved embedder's own.
        pooling_kwargs: Options of the pooling's class, such as ``{"preset": "paper"}``.
        pooling_init: ``"new"`` replaces a saved embedder's modules after the backbone with a new pooling; without it,
            settings that differ from the saved embedder's are refused.
        layers: Layers that a pooling over layers reads: ``"all"`` (the default) or 1-based numbers, negative from the
            end.
        layer_readout: How each layer is reduced to one vector: ``"eos"`` or ``"mean"``; None is ``"eos"`` for causal
            and ``"mean"`` for bidirectional attention.
        include_prompt: False excludes the prompt's tokens from the pooling; None is True.
        max_seq_length: Maximum length in tokens, including EOS; None is the base's own limit.
        add_eos_token: End every text in EOS; None is on for decoders and off for encoders.
        peft_config: A ``peft`` config, its fields as a dict (LoRA), or ``"paper"`` (r 16, alpha 32, dropout
            0.1, all linear layers). None keeps a saved embedder's adapter; another config than its own is refused.
        quantization_config: ``"nf4"``, ``"int8"`` or a ``BitsAndBytesConfig``.
        prompts: Name -> prompt, saved with the model; mteb uses task names and ``query``/``document``. Other prompts of
            a saved embedder are kept.
        allow_partial: Accept, and record, layers that cannot be made bidirectional.
        verify: Prove attention, padding invariance and finite weights before returning.
        dtype: Dtype of the backbone; None is that of its config.
        device: Device of the model; None is the best available.
        attn_implementation: As in transformers, such as ``"sdpa"`` or ``"flash_attention_2"``.
        model_kwargs: More arguments for the model's ``from_pretrained``.
        processor_kwargs: More arguments for the tokenizer's ``from_pretrained``.
        trust_remote_code: Run code of the base's repository.
        revision: Branch, tag or commit of the base.
        token: Hub token.

    Returns:
        A plain ``SentenceTransformer`` of ``LLMTransformer``, the pooling and ``Normalize``.

    Raises:
        ConfigurationError: If a setting is unknown, out of range or does not fit the base.
        AttentionError: If the proof fails.

    Example:
        >>> from st_llmpool.data import builtin_backbone
        >>> model = build_embedder(builtin_backbone(), attention="bidirectional", pooling="multi_layer")
        >>> model.encode(["a text", "another text"]).shape[0]
        2
    """
    check_choice("pooling", "multi_layer" if pooling is None else pooling, tuple(POOLINGS))
    spec = POOLINGS["multi_layer" if pooling is None else pooling]
    base = resolve_base(model_name_or_path)
    hub = {"trust_remote_code": trust_remote_code, "revision": revision, "token": token}
    given = {"dtype": dtype, "attn_implementation": attn_implementation}
    given["quantization_config"] = _quantization(quantization_config, dtype)
    settings = {
        "attention": attention,
        "layers": layers,
        "layer_readout": layer_readout,
        "add_eos_token": add_eos_token,
        "include_prompt": include_prompt,
        "max_seq_length": max_seq_length,
    }
    loading = {
        "model_kwargs": {key: value for key, value in given.items() if value is not None} | (model_kwargs or {}),
        "processor_kwargs": processor_kwargs or {},
    }
    saved = SavedEmbedder.read(base, **hub) if is_saved_embedder(base, revision=revision, token=token) else None
    if saved is not None and pooling_init is None:
        if pooling is not None or pooling_kwargs:
            saved.check_pooling(pooling, spec.module, spec.resolved(pooling_kwargs or {}), bool(pooling_kwargs))
        model = saved.load(settings, keep=True, prompts=prompts, device=device, **loading)
    else:
        reads_layers = spec.reads_with(pooling_kwargs or {}) == "layers"
        settings["layers"] = ("all" if layers is None else layers) if reads_layers else []
        started: dict[str, Any] = {"prompts": prompts}
        if saved is None:
            backbone = _backbone(base, settings, hub, loading)
        else:
            old = saved.load(settings, keep=False, prompts=prompts, **loading)
            backbone = old[0]
            started = {"prompts": old.prompts, "default_prompt_name": old.default_prompt_name}
        modules = [backbone, spec.build(backbone, pooling_kwargs or {}), Normalize()]
        model = SentenceTransformer(modules=modules, device=device, **started)
    model.model_card_data = EmbedderCardData()
    model.model_card_data.register_model(model)
    model._model_card_text = None  # of the saved embedder
    for name, prompt in model.prompts.items():
        try:
            model[0].check_prompt(prompt)
        except ConfigurationError as error:  # an error only where it is used
            logger.warning("The prompt %r will be refused in use: %s", name, error)
    if verify:
        prove_embedder(model, allow_partial=allow_partial)
    if has_adapter(model):
        continue_adapter(model, peft_config)
    elif peft_config is not None:
        add_adapter(model, peft_config)
    return model


def prove_embedder(model: SentenceTransformer, *, allow_partial: bool = False) -> None:
    """Check that the weights of a model are finite, and prove its attention.

    Raises:
        ConfigurationError: If a weight is NaN or infinite.
        AttentionError: If the proof fails.
    """
    _require_finite_weights(model)
    _prove_attention(model, allow_partial=allow_partial)


def resolve_base(base: str) -> str:
    """Return the Hub id or folder of a base; ``builtin`` becomes the folder in the package.

    Example:
        >>> resolve_base("Qwen/Qwen3-0.6B")
        'Qwen/Qwen3-0.6B'
    """
    return builtin_backbone() if base == "builtin" else str(base)


def _backbone(
    base: str, settings: Mapping[str, Any], hub: dict[str, Any], loading: Mapping[str, dict[str, Any]]
) -> LLMTransformer:
    _check_settings(base, settings, hub, loading)
    try:
        return LLMTransformer(
            base,
            **{key: value for key, value in settings.items() if value is not None},
            verify=False,  # the full proof follows
            model_kwargs=hub | loading["model_kwargs"],
            processor_kwargs=hub | loading["processor_kwargs"],
            config_kwargs=dict(hub),
        )
    except (RuntimeError, ArithmeticError, MemoryError) as error:  # of torch, over sizes in the config
        raise ConfigurationError(f"The base {base!r} cannot be loaded: {error}") from error


def _check_settings(
    base: str, settings: Mapping[str, Any], hub: dict[str, Any], loading: Mapping[str, dict[str, Any]]
) -> None:
    """Check against the config what LLMTransformer checks again once it has read the weights."""
    config = read_architecture(base, **hub)
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if count is not None:
        resolve_layers(settings["layers"], count)
    check_length(loading["processor_kwargs"].get("model_max_length", settings["max_seq_length"]), config)


def _quantization(config: Any, dtype: torch.dtype | str | None) -> Any:
    if not isinstance(config, str):
        return config
    from transformers import BitsAndBytesConfig

    if config == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if config == "nf4":
        compute = dtype if isinstance(dtype, torch.dtype) else None
        if compute is None:
            compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    raise ConfigurationError(f"quantization_config={config!r} is unknown; use 'nf4', 'int8' or a BitsAndBytesConfig.")


def _require_finite_weights(model: SentenceTransformer) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not torch.isfinite(parameter).all():
            raise ConfigurationError(
                f"The weight {name!r} holds NaN or infinity, and so would embeddings. The base's files are damaged, "
                f"or overflow in {parameter.dtype}: load another revision, or dtype=torch.float32."
            )


def _prove_attention(model: SentenceTransformer, *, allow_partial: bool) -> None:
    report = verify_attention(model)
    if report.verdict == "partial" and (allow_partial or model[0].causal_layers):
        model[0].causal_layers = list(report.causal_layers)
        return
    report.raise_for_failure()
