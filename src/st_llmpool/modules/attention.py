"""Switches a language model between causal and bidirectional attention, and checks by two forwards that it obeyed.

transformers (5.2 and later) reads the direction from two places, the config while it builds the mask and each
attention module where it needs none; either alone is silently wrong for some families. Both are set here, with the few
corrections that make more families right. The package's `verify_attention` proves the result layer by layer.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import chunked_overlay, create_bidirectional_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .errors import AttentionError, ConfigurationError, nearest

logger = logging.getLogger(__name__)

ATTENTION_MODES = ("causal", "bidirectional")
# bert-generation is BERT under another name, and missing from transformers' list.
_ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}


def set_attention(model: nn.Module, mode: str) -> None:
    """Make every attention layer of `model` causal or bidirectional, in place; `verify_attention` proves the result.

    Call it after every load and PEFT wrap: neither the flags on the modules nor the corrections are saved with the
    weights. Going back to `"causal"` gives the outputs from before, bit for bit. Causal buffers (gpt_neo, openai-gpt,
    imagegpt) become symmetric, chunked layers (llama4) get a mask without direction, and absolute positions count from
    the first real token, so that left padding does not change a vector.

    A causal window of W tokens sees W-1 tokens back; bidirectional eager, sdpa and flex_attention see W tokens to each
    side, FlashAttention W-1: train and serve with the same implementation.

    Args:
        model: A transformers model, also wrapped by PEFT, or a SentenceTransformer on one.
        mode: `"causal"` or `"bidirectional"`. An encoder such as BERT accepts the second only, and is left as it is.

    Raises:
        ConfigurationError: If the mode is unknown or the model is no decoder or encoder whose layers can be found.
        AttentionError: If the model adds an ALiBi bias, which is a distance only under a causal mask.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=9)
        >>> model = LlamaModel(LlamaConfig(**sizes))
        >>> set_attention(model, "bidirectional")
        >>> measured_attention(model.eval()), len(decoder_layers(model))
        ('bidirectional', 2)
    """
    if mode not in ATTENTION_MODES:
        raise ConfigurationError(
            f"Unknown attention {mode!r}; choose 'causal' or 'bidirectional'.{nearest(mode, ATTENTION_MODES)}"
        )
    backbone = find_backbone(model)
    refuse_encoder_decoder(backbone.config, type(backbone).__name__)
    if needs_position_ids(backbone):
        _add_pre_hook(backbone, _fill_position_ids)
    if is_encoder(backbone):
        if mode == "causal":
            raise ConfigurationError(
                f"{_name(backbone)} is an encoder: its layers attend in both directions by design. "
                f"Use attention='bidirectional', or a decoder as the base."
            )
        return
    if mode == "bidirectional" and _has_alibi(backbone):
        raise AttentionError(
            f"{_name(backbone)} adds an ALiBi bias of slope times key position, a distance only under a causal mask: "
            f"bidirectionally every token would favour the last one. Use attention='causal', or another base."
        )
    layers = decoder_layers(backbone)
    _set_configs(backbone, mode)
    module: Any
    for module in layers.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = mode == "causal"
    _set_buffers(layers, mode)
    _set_chunks(backbone, layers)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the `num_hidden_layers` layers of the language model, in order, whatever wraps them.

    Raises:
        ConfigurationError: If no list of `num_hidden_layers` layers exists.
    """
    backbone = find_backbone(model)
    config = backbone.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    # longcat_flash counts two attentions per layer in num_hidden_layers, and its layers in num_layers.
    counts = {count, getattr(config, "num_layers", count)}
    for tower in _text_towers(backbone):
        # The shallowest list is the stack of layers; deeper ones of the same length are experts or heads.
        stacks = sorted(_lists_of_blocks(tower, counts), key=lambda found: found[0].count("."))
        if stacks:
            return stacks[0][1]
    raise ConfigurationError(
        f"{_name(backbone)} has no list of {count} layers (config.num_hidden_layers) that could be read or switched. "
        f"Use a decoder such as Llama, Qwen or Mistral as the base."
    )


def find_backbone(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a SentenceTransformer, one of its modules, or a PEFT wrapper.

    Recognised by attributes, because a model loaded from a repository brings classes of its own.

    Raises:
        ConfigurationError: If there is none.
    """
    inner: Any = model[0] if isinstance(model, nn.Sequential) and len(model) else model
    inner = getattr(inner, "auto_model", inner)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(getattr(inner, "config", None), "get_text_config"):
        raise ConfigurationError(
            f"No transformers model inside {type(model).__name__}. Pass a transformers model or a SentenceTransformer "
            f"whose first module holds one (a static or ONNX model has no attention to switch)."
        )
    return inner


def is_encoder(model: nn.Module) -> bool:
    """Returns whether the layers attend in both directions by design, as those of BERT and EmbeddingGemma do."""
    return is_encoder_config(find_backbone(model).config.get_text_config(decoder=True))


def is_encoder_config(config: PreTrainedConfig) -> bool:
    """Returns what :func:`is_encoder` does, from the config of the text model."""
    if getattr(config, "is_decoder", False):
        return False
    if config.model_type in _ENCODERS:
        return True
    # EmbeddingGemma: gemma3's masks obey this flag; gemma, gemma2 and PaliGemma have it too, but theirs do not.
    return config.model_type == "gemma3_text" and bool(getattr(config, "use_bidirectional_attention", False))


def position_ids_from(attention_mask: Tensor) -> Tensor:
    """Counts positions from the first real token of each text, (B, T) from (B, T).

    Example:
        >>> position_ids_from(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
        tensor([[0, 0, 0, 1],
                [0, 1, 2, 2]])
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def needs_position_ids(model: nn.Module) -> bool:
    """Return whether left padding changes a text's vector unless positions count from its first real token.

    True for absolute positions that the model numbers from the left edge (gpt2, BERT, ...), which `set_attention`
    mends; False for rotary and relative positions, and where they follow from mask or ids (opt, RoBERTa).
    """
    backbone = find_backbone(model)
    if not {"position_ids", "attention_mask"} <= set(inspect.signature(backbone.forward).parameters):
        return False
    for module in backbone.modules():
        if "rotary" in type(module).__name__.lower():
            return False
        # The RoBERTa family numbers positions from padding_idx + 1, by comparing ids with the padding token.
        if isinstance(getattr(module, "position_embeddings", None), nn.Embedding) and isinstance(
            getattr(module, "padding_idx", None), int
        ):
            return False
    return True


def check_attention(model: nn.Module, expected: str) -> None:
    """Check by two short forwards that a model just loaded has the `expected` attention mode.

    Skipped, with one logged line, where `why_no_forward` gives a reason.

    Raises:
        AttentionError: If the forwards show another attention, fail, or give NaN or infinity.
    """
    reason = why_no_forward(model)
    if reason:
        logger.info("Attention was not checked at load because the model is %s; verify_attention does.", reason)
        return
    found = measured_attention(model)
    if found != expected:
        raise AttentionError(
            f"{_name(find_backbone(model))} should be {expected} but is {found}. Call set_attention(model, "
            f"{expected!r}) after every load and PEFT wrap, or use another attn_implementation or base."
        )


def why_no_forward(model: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> str | None:
    """Return why a forward now would be costly or impossible, by all or some parameters; None if it is neither."""
    if getattr(model, "is_quantized", False):
        return "quantised"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "spread over devices or offloaded"
    for parameter in model.parameters() if parameters is None else parameters:
        if parameter.is_meta:
            return "on the meta device"
        # By name: importing DTensor costs every load half a second. DeepSpeed and the older FSDP mark what they shard.
        marked = any(hasattr(parameter, mark) for mark in ("ds_id", "_fsdp_flattened"))
        if marked or type(parameter).__name__ == "DTensor":
            return "sharded"
    return None


@torch.no_grad()
def measured_attention(model: nn.Module) -> str:
    """Measure the attention of a whole model in eval mode by two short forwards, one of them padded.

    Returns:
        `"causal"`, `"bidirectional"`, or `"batch_dependent"` if the padded forward shows another direction.

    Raises:
        AttentionError: If the forwards fail, or give NaN or infinity.
    """
    backbone = find_backbone(model)
    length, padding, changed = 9, 3, 4
    generator = torch.Generator().manual_seed(20240917)
    text, others = random_ids(backbone, 2, length + padding, generator=generator)
    seen = []
    for width in (length, length + padding):
        ids = text[:width].repeat(2, 1)
        ids[1, changed] = others[changed]
        mask = torch.ones_like(ids)
        mask[:, length:] = 0
        states = run_on_ids(backbone, ids, mask).last_hidden_state[:, :length].float()
        if not states.isfinite().all():
            raise AttentionError(
                f"{_name(backbone)} gives NaN or infinity on an ordinary text: its weights are broken or "
                f"{backbone.dtype} cannot hold its activations. Check the checkpoint, or load it in float32."
            )
        moved = (states[0] - states[1]).norm(dim=-1)
        seen.append(bool(moved[:changed].norm() > 1e-3 * moved[changed + 1 :].norm()))
    if seen[0] != seen[1]:
        return "batch_dependent"
    return "bidirectional" if seen[0] else "causal"


def random_ids(backbone: PreTrainedModel, *shape: int, generator: torch.Generator) -> Tensor:
    """Draw ids that no config field names as special, so that no token means padding or an image."""
    special = set(_special_ids(backbone.config.to_dict()))
    weight: Any = backbone.get_input_embeddings().weight  # of peft's wrappers too, which lack num_embeddings
    ordinary = torch.tensor([token for token in range(weight.shape[0]) if token not in special] or [0])
    return ordinary[torch.randint(len(ordinary), shape, generator=generator)]


def run_on_ids(backbone: PreTrainedModel, ids: Tensor, mask: Tensor) -> Any:
    """Return the output of the backbone for ids and mask (B, T); whatever fails is an AttentionError that names it."""
    weight: Any = backbone.get_input_embeddings().weight
    accepted = inspect.signature(backbone.forward).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    inputs = {"input_ids": ids.to(weight.device), "attention_mask": mask.to(weight.device), "use_cache": False}
    try:
        return backbone(**{name: value for name, value in inputs.items() if anything or name in accepted})
    except Exception as error:
        raise AttentionError(
            f"{_name(backbone)} cannot run on token ids and a mask alone ({type(error).__name__}: {error}). "
            f"Use a text model as the base, or another attn_implementation."
        ) from error


def refuse_encoder_decoder(config: PreTrainedConfig, name: str) -> None:
    """Raise ConfigurationError, naming the model, if its text is split over two stacks."""
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(
            f"{name} is an encoder-decoder ({config.model_type}): its text is split over two stacks. Use a decoder "
            f"(Llama, Qwen, Mistral, ...) or an encoder (BERT, ...) as the base."
        )


def _has_alibi(backbone: PreTrainedModel) -> bool:
    config = backbone.config.get_text_config(decoder=True)
    asked = (getattr(part, "alibi", None) for part in (config, getattr(config, "attn_config", None)))
    answers = [answer for answer in asked if answer is not None]
    if answers:
        return any(answers)
    return any("alibi" in name for module in backbone.modules() for name in dir(type(module)))


def _set_configs(backbone: PreTrainedModel, mode: str) -> None:
    """Set the top config, the text config and those that parts of the text tower were built with."""
    found = [backbone.config, backbone.config.get_text_config(decoder=True)]
    found += [module.config for module in _text_towers(backbone)[0].modules() if isinstance(module, PreTrainedModel)]
    for config in {id(config): config for config in found}.values():
        if mode == "bidirectional":
            config.is_causal = False
        elif getattr(config, "is_causal", True) is False:
            # The absent key is the causal default; True would also reach a vision tower's attention calls.
            if hasattr(type(config), "is_causal"):
                config.is_causal = True
            else:
                del config.is_causal


def _set_buffers(layers: nn.ModuleList, mode: str) -> None:
    """Mirror triangular buffers (1, 1, N, N), which win over every flag, or cut them back; bands become two-sided."""
    for module in layers.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "bias" and buffer.dim() == 4 and buffer.shape[-1] == buffer.shape[-2] > 1:
                triangle = buffer.tril()
                both = torch.maximum(triangle, triangle.transpose(-1, -2))
                buffer.copy_(both if mode == "bidirectional" else triangle)


def _set_chunks(backbone: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Lets the stack that chunks its attention build both masks without direction while its config asks for that."""
    config = backbone.config.get_text_config(decoder=True)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        stack = next(module for module in backbone.modules() if layers in module.children())
        _add_pre_hook(stack, _mask_chunks_in_both_directions)


def _mask_chunks_in_both_directions(
    stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    config, mask = stack.config, kwargs.get("attention_mask")
    if getattr(config, "is_causal", True) or isinstance(mask, dict):
        return args, kwargs
    embeddings = kwargs.get("inputs_embeds")
    tokens: Any = kwargs.get("input_ids", args[0] if args else None) if embeddings is None else embeddings
    batch, length = tokens.shape[:2]
    # The mask functions read no more of the embeddings than batch, length, dtype and device.
    shape_only = torch.empty(batch, length, 0, dtype=stack.dtype, device=tokens.device)
    common = {"config": config, "inputs_embeds": shape_only, "attention_mask": mask}
    full = create_bidirectional_mask(**common)
    chunked = full
    if length > config.attention_chunk_size:
        padding = (mask.cumsum(dim=-1) == 0).sum(dim=-1) if mask is not None else tokens.new_zeros(batch).long()
        overlay = chunked_overlay(config.attention_chunk_size, padding)
        chunked = create_bidirectional_mask(**common, and_mask_function=overlay)
    return args, {**kwargs, "attention_mask": {"full_attention": full, "chunked_attention": chunked}}


def _fill_position_ids(
    backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    given = kwargs.get("position_ids") is not None or kwargs.get("past_key_values") is not None
    if given or mask is None or mask.dim() != 2:
        return args, kwargs
    return args, {**kwargs, "position_ids": position_ids_from(mask)}


def _add_pre_hook(module: nn.Module, hook: Any) -> None:
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _text_towers(backbone: PreTrainedModel) -> list[nn.Module]:
    """Returns where to look for the language model: its own tower of a multimodal model, then the whole."""
    decoder = backbone.get_decoder() if hasattr(backbone, "get_decoder") else None
    return [decoder, backbone] if isinstance(decoder, nn.Module) else [backbone]


def _lists_of_blocks(tower: nn.Module, counts: set[int | None]) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, module in tower.named_modules():
        blocks = isinstance(module, nn.ModuleList) and len(module) in counts
        if blocks and all(any(True for _ in block.children()) for block in module):
            yield name, module


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


def _name(backbone: PreTrainedModel) -> str:
    return f"{type(backbone).__name__} (model_type {backbone.config.model_type!r})"
