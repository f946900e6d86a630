"""Switches a language model between causal and bidirectional attention, and checks by two forwards that it obeyed.

transformers reads the direction from the config where it builds a mask, and from each attention module where it needs
none; either alone is silently wrong for some families.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import chunked_overlay, create_bidirectional_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .errors import AttentionError, ConfigurationError, check_choice

logger = logging.getLogger(__name__)

ATTENTION_MODES = ("causal", "bidirectional")
# bert-generation is BERT under another name, and missing from transformers' list.
_ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
_SHARDED = ("ds_id", "_fsdp_flattened")  # marks of DeepSpeed and FSDP
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def set_attention(model: nn.Module, mode: str) -> None:
    """Make every attention layer of `model` causal or bidirectional, in place; `verify_attention` proves the result.

    Call it after every load and PEFT wrap. A causal window of W tokens sees W-1 back, a bidirectional one W to each
    side, W-1 with FlashAttention: train and serve with the same implementation.

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
    check_choice("attention", mode, ATTENTION_MODES)
    backbone = find_backbone(model)
    refuse_encoder_decoder(backbone.config, type(backbone).__name__)
    if needs_position_ids(backbone):
        _add_pre_hook(backbone, _fill_position_ids)
    config = text_config(backbone)
    if is_encoder(config):
        if mode == "causal":
            raise ConfigurationError(f"{_name(backbone)} is an encoder. Use attention='bidirectional', or a decoder.")
        return
    if mode == "bidirectional" and _has_alibi(backbone):
        alibi = f"{_name(backbone)} has an ALiBi bias, which is a distance only under a causal mask"
        raise AttentionError(f"{alibi}. Use attention='causal', or another base.")
    layers = decoder_layers(backbone)
    _set_configs(backbone, mode)
    module: Any
    for module in layers.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = mode == "causal"
        buffer = module._buffers.get("bias")  # a triangle (1, 1, N, N) wins over every flag (gpt_neo, ...)
        if buffer is not None and buffer.dim() == 4 and buffer.shape[-1] == buffer.shape[-2] > 1:
            triangle = buffer.tril()
            buffer.copy_(torch.maximum(triangle, triangle.mT) if mode == "bidirectional" else triangle)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):  # llama4
        stack = next(module for module in backbone.modules() if layers in module.children())
        _add_pre_hook(stack, _mask_chunks_in_both_directions)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the layers of the language model, in order, whatever wraps them; ConfigurationError if none are found."""
    backbone = find_backbone(model)
    config = text_config(backbone)
    count = getattr(config, "num_hidden_layers", None)
    counts = {count, getattr(config, "num_layers", count)}  # longcat_flash counts two attentions per layer in the first
    for tower in (_text_tower(backbone), backbone):
        lists = [(n, part) for n, part in tower.named_modules() if isinstance(part, nn.ModuleList)]
        # The shallowest list of modules that have parts is the stack; deeper ones are experts or heads.
        for _, blocks in sorted(lists, key=lambda found: found[0].count(".")):
            if len(blocks) in counts and all(any(True for _ in block.children()) for block in blocks):
                return blocks
    raise ConfigurationError(f"No list of {count} layers was found in {_name(backbone)}. Use Llama, Qwen, Mistral, ...")


def find_backbone(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a SentenceTransformer, one of its modules, or a PEFT wrapper."""
    inner: Any = model[0] if isinstance(model, nn.Sequential) and len(model) else model
    inner = getattr(inner, "auto_model", inner)  # by attributes: a repository brings classes of its own
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if not hasattr(getattr(inner, "config", None), "get_text_config"):
        raise ConfigurationError(f"No transformers model inside {type(model).__name__}, as in static and ONNX models.")
    return inner


def text_config(model: nn.Module) -> PreTrainedConfig:
    """Return the config of the language model, of a multimodal one too."""
    return find_backbone(model).config.get_text_config(decoder=True)


def is_encoder(config: PreTrainedConfig) -> bool:
    """Return, by :func:`text_config`, whether the layers attend in both directions by design, as those of BERT do."""
    if getattr(config, "is_decoder", False):
        return False
    # EmbeddingGemma: gemma3's masks obey this flag; gemma, gemma2 and PaliGemma have it too, but theirs do not.
    is_embedding_gemma = config.model_type == "gemma3_text" and getattr(config, "use_bidirectional_attention", False)
    return bool(is_embedding_gemma) or config.model_type in _ENCODERS


def position_ids_from(attention_mask: Tensor) -> Tensor:
    """Count positions from the first real token of each text, (B, T) from (B, T)."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def needs_position_ids(model: nn.Module) -> bool:
    """Return whether left padding changes vectors unless positions are given: where they are absolute (gpt2, ...)."""
    backbone = find_backbone(model)
    if not {"position_ids", "attention_mask"} <= set(inspect.signature(backbone.forward).parameters):
        return False
    for module in backbone.modules():
        # The RoBERTa family numbers positions from padding_idx + 1, by comparing ids with the padding token.
        from_ids = isinstance(getattr(module, "padding_idx", None), int)
        from_ids = from_ids and isinstance(getattr(module, "position_embeddings", None), nn.Embedding)
        if from_ids or "rotary" in type(module).__name__.lower():
            return False
    return True


def refuse_encoder_decoder(config: PreTrainedConfig, name: str) -> None:
    """Raise ConfigurationError, naming the model, if its text is split over two stacks."""
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigurationError(f"{name} is an encoder-decoder ({config.model_type}). Use a decoder or an encoder.")


def check_attention(model: nn.Module, expected: str) -> None:
    """Raise AttentionError if two short forwards, where they are possible, fail or show another attention mode."""
    if reason := why_no_forward(model):
        logger.info("Attention was not checked at load because the model is %s; verify_attention does.", reason)
    elif (found := measured_attention(model)) != expected:
        wrong = f"{_name(find_backbone(model))} should be {expected} but is {found}"
        raise AttentionError(f"{wrong}. Call set_attention(model, {expected!r}), or use another attn_implementation.")


def why_no_forward(model: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> str | None:
    """Return why a forward now would be costly or impossible, by all or some parameters; None if it is neither."""
    if getattr(model, "is_quantized", False):
        return "quantised"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "spread over devices or offloaded"
    for parameter in model.parameters() if parameters is None else parameters:
        if parameter.is_meta:
            return "on the meta device"
        # DTensor by name: importing it costs every load half a second.
        if type(parameter).__name__ == "DTensor" or any(hasattr(parameter, mark) for mark in _SHARDED):
            return "sharded"
    return None


@torch.no_grad()
def measured_attention(model: nn.Module) -> str:
    """Return `"causal"`, `"bidirectional"`, or `"batch_dependent"` if padding changes it, of a model in eval mode."""
    backbone = find_backbone(model)
    length, changed = 9, 4
    text, others = random_ids(backbone, 2, length + 3, generator=torch.Generator().manual_seed(20240917))
    seen = []
    for width in (length, length + 3):
        ids = text[:width].repeat(2, 1)
        ids[1, changed] = others[changed]
        mask = (torch.arange(width) < length).long().repeat(2, 1)
        states = run_on_ids(backbone, ids, mask).last_hidden_state[:, :length].float()
        if not states.isfinite().all():
            broken = f"{_name(backbone)} gives NaN or infinity in {backbone.dtype}"
            raise AttentionError(f"{broken}. Check the checkpoint, or load it in float32.")
        moved = (states[0] - states[1]).norm(dim=-1)
        seen.append("bidirectional" if moved[:changed].norm() > 1e-3 * moved[changed + 1 :].norm() else "causal")
    return seen[0] if seen[0] == seen[1] else "batch_dependent"


def random_ids(backbone: PreTrainedModel, *shape: int, generator: torch.Generator) -> Tensor:
    """Draw ids that no config field names as special, so that no token means padding or an image."""
    special, embeddings = set(_special_ids(backbone.config.to_dict())), cast(Any, backbone.get_input_embeddings())
    ordinary = torch.tensor([token for token in range(len(embeddings.weight)) if token not in special] or [0])
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
        why = f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Use a text model"
        raise AttentionError(f"{_name(backbone)} cannot run on token ids and a mask alone {why}.") from error


def _has_alibi(backbone: PreTrainedModel) -> bool:
    config = text_config(backbone)
    asked = (getattr(part, "alibi", None) for part in (config, getattr(config, "attn_config", None)))
    if answers := [answer for answer in asked if answer is not None]:
        return any(answers)
    return any("alibi" in name for module in backbone.modules() for name in dir(type(module)))


def _set_configs(backbone: PreTrainedModel, mode: str) -> None:
    """Set the top config, the text config and those that parts of the text tower were built with."""
    found = [backbone.config, text_config(backbone)]
    found += [module.config for module in _text_tower(backbone).modules() if isinstance(module, PreTrainedModel)]
    for config in found:
        if mode == "bidirectional":
            config.is_causal = False
        elif getattr(config, "is_causal", True) is False:
            if hasattr(type(config), "is_causal"):
                config.is_causal = True
            else:  # absent means causal; True would also reach a vision tower
                del config.is_causal


def _mask_chunks_in_both_directions(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """Build both masks of a chunked stack without direction while its config asks for that."""
    config, mask = stack.config, kwargs.get("attention_mask")
    if getattr(config, "is_causal", True) or isinstance(mask, dict):
        return args, kwargs
    embeddings = kwargs.get("inputs_embeds")
    tokens: Any = kwargs.get("input_ids", args[0] if args else None) if embeddings is None else embeddings
    batch, length = tokens.shape[:2]
    shape_only = torch.empty(batch, length, 0, dtype=stack.dtype, device=tokens.device)  # masks read no more of it
    common = {"config": config, "inputs_embeds": shape_only, "attention_mask": mask}
    full = chunked = create_bidirectional_mask(**common)
    if length > config.attention_chunk_size:
        padding = (mask.cumsum(dim=-1) == 0).sum(dim=-1) if mask is not None else tokens.new_zeros(batch).long()
        overlay = chunked_overlay(config.attention_chunk_size, padding)
        chunked = create_bidirectional_mask(**common, and_mask_function=overlay)
    return args, {**kwargs, "attention_mask": {"full_attention": full, "chunked_attention": chunked}}


def _fill_position_ids(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    mask = kwargs.get("attention_mask")
    given = kwargs.get("position_ids") is not None or kwargs.get("past_key_values") is not None
    if given or mask is None or mask.dim() != 2:
        return args, kwargs
    return args, {**kwargs, "position_ids": position_ids_from(mask)}


def _add_pre_hook(module: nn.Module, hook: Any) -> None:
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _text_tower(backbone: PreTrainedModel) -> nn.Module:
    decoder = backbone.get_decoder() if hasattr(backbone, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else backbone


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_ids", "token_index")):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


def _name(backbone: PreTrainedModel) -> str:
    return f"{type(backbone).__name__} (model_type {backbone.config.model_type!r})"
