"""Load the poolings of the paper's released code (Tang & Yang 2024, arXiv 2409.02727)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from .modules.cross_attention import CrossAttentionPooling
from .modules.errors import ConfigurationError

_Pooling = TypeVar("_Pooling", bound=CrossAttentionPooling)

#: Layers of the paper's released code, and ours.
PAPER_NAMES = {
    "pos_emb.weight": "layer_table",
    "latents": "cross_attention.latents",
    "cross_attend_blocks.0.norm": "cross_attention.norm_inputs",
    "cross_attend_blocks.0.norm_context": "cross_attention.norm_latents",
    "cross_attend_blocks.0.fn.to_q": "cross_attention.to_query",
    "cross_attend_blocks.0.fn.to_kv": "cross_attention.to_key_value",
    "cross_attend_blocks.0.fn.to_out": "cross_attention.to_output",
    "cross_attend_blocks.1.norm": "cross_attention.norm_feed_forward",
    "cross_attend_blocks.1.fn.net.0": "cross_attention.to_value_gate",
    "cross_attend_blocks.1.fn.net.2": "cross_attention.from_hidden",
}


def pooling_from_paper(pooling_class: type[_Pooling], state_dict: Mapping[str, Tensor], *, num_heads: int) -> _Pooling:
    """Build the pooling of a checkpoint of the paper's code, with ``readout_skip=False``.

    Args:
        pooling_class: ``MultiLayerPooling`` or ``LatentAttentionPooling``.
        state_dict: Its tensors, with or without the prefix ``weights.``; those of the backbone are ignored.
        num_heads: H, the one size that no tensor shows; the paper uses 32.

    Raises:
        ConfigurationError: If tensors are missing, unknown or of the wrong shape, or the heads do not divide.
    """
    tensors = {}
    for name, tensor in state_dict.items():
        layer = (name := name.removeprefix("weights.")).removesuffix(".weight").removesuffix(".bias")
        layer = name if name == "pos_emb.weight" else layer
        if name.startswith(("latents", "pos_emb.", "cross_attend_blocks.")):
            tensors[name.replace(layer, PAPER_NAMES.get(layer, layer), 1)] = tensor
    try:
        num_latents, dimension = tensors["cross_attention.latents"].shape
        inner = len(tensors["cross_attention.to_query.weight"])
        ratio = tensors["cross_attention.from_hidden.weight"].shape[1] / dimension
        sizes: dict[str, Any] = {"num_latents": num_latents, "head_dim": inner // num_heads, "mlp_ratio": ratio}
        if "layer_table" in tensors:
            sizes["num_layers"] = len(tensors["layer_table"])
        pooling = pooling_class(dimension, num_heads=num_heads, readout_skip=False, **sizes)
        pooling.load_state_dict(tensors)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"The state dict does not fit {pooling_class.__name__} with num_heads={num_heads} (pos_emb.weight, the "
            f"layer weights, belongs to MultiLayerPooling alone): {' '.join(str(error).split())}"
        ) from error
    return pooling
