"""Run a padded batch as one row of its real tokens, so that no layer computes padding.

Only attention depends on where texts begin and end: on a GPU in half precision it is torch's variable-length kernel, on
a CPU ``sdpa`` text by text, registered in transformers' attention interface in place of ``sdpa``. With the
flash-attn package sentence-transformers does the same by itself.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..attention_proof import PACKED_SDPA, implementation_of
from ..modules.attention import find_backbone, position_ids_from
from ..modules.layer_readout import TokenSpans
from .length_groups import OUTPUTS, NotApplicable, per_token
from .shared_start import other_state


@dataclass(frozen=True)
class Texts:
    """Where the texts of a packed forward lie."""

    offsets: Tensor  # (B + 1,) int32: the first token of each text, and the number of all
    longest: int  # tokens of the longest text


Kernel = Callable[[Tensor, Tensor, Tensor, Texts, tuple[int, int], float | None], Tensor]

# State of one forward lives in its context, so that two threads may encode on one model.
_ACTIVE: ContextVar[Texts | None] = ContextVar(f"{PACKED_SDPA}_texts", default=None)


def why_not_packed(model: nn.Module, device: str) -> str | None:
    """Return why a backbone cannot run packed input on a type of device; None if it can."""
    backbone = find_backbone(model)
    if device not in KERNELS:
        return f"there is no kernel for texts of different lengths on {device}"
    dtypes, kernel = KERNELS[device]
    if backbone.dtype not in dtypes:
        return f"there is no kernel for texts of different lengths in {backbone.dtype}"
    if kernel is _by_varlen_kernel and "window_size" not in _varlen_arguments():
        return f"torch {torch.__version__} has no variable-length attention with windows (2.11 has)"
    if not backbone.is_backend_compatible():
        return "its attention cannot be replaced"
    used = implementation_of(model)
    if used != "sdpa":
        return f"its attention is {used}, and only sdpa is replaced"
    if getattr(backbone.config.get_text_config(decoder=True), "use_bidirectional_attention", False):
        return "its windows are its own"
    return other_state(backbone)


def run_packed(module: Any, features: dict[str, Any], spans: TokenSpans) -> dict[str, Any]:
    """Run a batch, padded anywhere, as one row of its real tokens; outputs are padded as it was, with zeros.

    The attention of `module`, an ``LLMTransformer``, is ``PACKED_SDPA``; NotApplicable if the kernel cannot stand in.
    """
    mask = features["attention_mask"]
    kept = mask.bool()
    lengths = kept.sum(dim=1)
    offsets = nn.functional.pad(lengths.cumsum(dim=0), (1, 0)).int()
    flat = {name: value[kept].unsqueeze(0) if per_token(value, mask) else value for name, value in features.items()}
    del flat["attention_mask"]
    first_position = module._infer_flatten_position_offset()  # RoBERTa counts from two
    flat |= {"cu_seq_lens_q": offsets, "position_ids": position_ids_from(mask)[kept].unsqueeze(0) + first_position}
    with _within(Texts(offsets, int(lengths.max()))):
        outputs = module.run(flat, TokenSpans(spans.mask[kept], kept.nonzero()[:, 0], offsets[1:].long() - 1))
    found = {name: outputs[name] for name in OUTPUTS & outputs.keys()}
    tokens = found["token_embeddings"]
    found["token_embeddings"] = tokens.new_zeros(*mask.shape, tokens.shape[-1])
    found["token_embeddings"][kept] = tokens[0]
    return features | found


@contextmanager
def _within(texts: Texts) -> Iterator[None]:
    token = _ACTIVE.set(texts)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend within each text of a packed forward, (1, H, N, d) to (1, N, H, d); otherwise as sdpa."""
    texts = _ACTIVE.get()
    if texts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotApplicable(f"the kernel knows no {name}")
    if attention_mask is not None:
        raise NotApplicable("its layers make a mask of their own")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = kwargs.get("sliding_window")
    # As sdpa: W tokens, itself included, under causal attention, else W to each side.
    left = -1 if window is None else window - 1 if causal else window
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    _, kernel = KERNELS[query.device.type]
    return kernel(query, key, value, texts, (left, 0 if causal else left), kwargs.get("scaling")).unsqueeze(0), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _ACTIVE.get() is None else None


def _by_varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, window: tuple[int, int], scale: float | None
) -> Tensor:
    """Return (N, H, d) from (N, H, d) and keys and values (N, H', d)."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scale, "window_size": window}
    if "enable_gqa" in _varlen_arguments():
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:  # torch 2.11
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
    starts, longest = texts.offsets, texts.longest
    inputs = (query.contiguous(), key.contiguous(), value.contiguous())
    out = varlen_attn(*inputs, starts, starts, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out


def _varlen_arguments() -> frozenset[str]:
    """Return the arguments of torch's variable-length attention; none where torch has none."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _text_by_text(
    query: Tensor, key: Tensor, value: Tensor, texts: Texts, window: tuple[int, int], scale: float | None
) -> Tensor:
    """Return (N, H, d) from (N, H, d) and keys and values (N, H', d)."""
    groups = query.shape[1] // key.shape[1]
    queries, keys, values = (part.transpose(0, 1)[None] for part in (query, key, value))
    if groups > 1:
        keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start, end in pairwise(texts.offsets.tolist()):
        seen = _window_mask(end - start, *window, query.device)
        q, k, v = (part[:, :, start:end] for part in (queries, keys, values))
        is_causal = seen is None and window[1] == 0
        found = scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=is_causal, scale=scale)
        out[start:end] = found[0].transpose(0, 1)
    return out


def _window_mask(length: int, left: int, right: int, device: torch.device) -> Tensor | None:
    """Return which keys each of `length` queries sees, (T, T); None if the window is longer than the text."""
    if left < 0 or left >= length - 1:
        return None
    distance = torch.arange(length, device=device) - torch.arange(length, device=device).unsqueeze(1)
    return (distance >= -left) & (distance <= right)


#: Device -> the dtypes and the attention of packed texts.
KERNELS: dict[str, tuple[tuple[torch.dtype, ...], Kernel]] = {
    "cuda": ((torch.float16, torch.bfloat16), _by_varlen_kernel),
    "cpu": ((torch.float32, torch.float16, torch.bfloat16), _text_by_text),
}

AttentionInterface.register(PACKED_SDPA, _attention)
AttentionMaskInterface.register(PACKED_SDPA, _mask)
