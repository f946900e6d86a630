"""Compute the tokens that all texts of a batch start with once, such as the instruction before every query.

Under causal attention the first tokens of a text do not depend on what follows. So the start that all texts share runs
as one text, and its keys and values are the cache with which the rest of every text runs.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..attention_proof import attention_of
from ..modules.attention import find_backbone
from ..modules.layer_readout import TokenSpans
from .length_groups import OUTPUTS, NotApplicable, per_token


def shared_start(features: dict[str, Any], mask: Tensor) -> int:
    """Return how many leading tokens all texts share, each keeping at least one of its own; 0 if padded on the left.

    `features` are ``input_ids`` (B, T) and whatever else has an entry for each token; `mask` (B, T) is 0 where padded.

    Example:
        >>> shared_start({"input_ids": torch.tensor([[7, 8, 1, 0], [7, 8, 2, 3]])}, torch.ones(2, 4))
        2
    """
    kept = mask.bool()
    if not bool(kept[:, 0].all()) or bool((kept[:, 1:] & ~kept[:, :-1]).any()):
        return 0
    same = kept.all(dim=0)
    same[int(kept.sum(dim=1).min()) - 1 :] = False
    for value in features.values():
        if per_token(value, mask):
            same &= (value == value[:1]).view(*mask.shape, -1).all(dim=-1).all(dim=0)
    return int(same.long().cumprod(dim=0).sum())


def why_not_shared(model: nn.Module) -> str | None:
    """Return why the start of texts cannot be computed once for a backbone; None if it can."""
    if attention_of(model) != "causal":
        return "attention is bidirectional, so the first tokens depend on what follows"
    if "past_key_values" not in inspect.signature(find_backbone(model).forward).parameters:
        return "its forward takes no keys and values of earlier tokens"
    return other_state(model)


def other_state(model: nn.Module) -> str | None:
    """Return which layers keep other state than keys and values (recurrent ones); None if none do."""
    try:
        layers = DynamicCache(config=find_backbone(model).config.get_text_config(decoder=True)).layers
    except KeyError as error:
        return f"it has layers of type {error}"
    other = {type(layer).__name__ for layer in layers if type(layer) not in _FROZEN}
    return f"some layers keep more than keys and values ({', '.join(sorted(other))})" if other else None


def run_shared(
    module: Any, features: dict[str, Any], spans: TokenSpans, length: int, *, cost: int, run_rest: Any
) -> dict[str, Any]:
    """Run the first `length` tokens, which all texts share, as one text, then the rest by `run_rest`.

    Batches are padded on the right; `cost` and `run_rest` are as in :func:`run_in_groups`. NotApplicable if the
    backbone does not keep keys and values in the cache that it is given.
    """
    mask = features["attention_mask"]
    first = {name: value[:1, :length] if per_token(value, mask) else value for name, value in features.items()}
    cache = DynamicCache(config=find_backbone(module.model).config)
    first_spans = TokenSpans(spans.mask[:1, :length])
    first = module.run(first, first_spans, past_key_values=cache, use_cache=True)
    if any(cache.get_seq_length(layer) != length for layer in range(len(cache.layers))):
        raise NotApplicable("keys and values are not in the cache that was passed")
    frozen = _frozen(cache)

    def run(features: dict[str, Any], spans: TokenSpans) -> dict[str, Any]:
        mask = features["attention_mask"]
        rest = {name: value[:, length:] if per_token(value, mask) else value for name, value in features.items()}
        rest["attention_mask"] = mask  # of the keys, old and new
        rest = module.run(rest, TokenSpans(spans.mask[:, length:]), past_key_values=frozen, use_cache=True)
        outputs = {name: rest[name] for name in OUTPUTS & rest.keys()}
        tokens = first["token_embeddings"].expand(len(mask), -1, -1)
        outputs["token_embeddings"] = torch.cat([tokens, outputs["token_embeddings"]], dim=1)
        if module.layer_readout == "mean" and bool(first_spans.mask.any()):  # else the mean of no tokens, NaN
            fraction = first_spans.mask.sum() / spans.mask.sum(dim=1)
            for name in outputs.keys() - {"token_embeddings"}:
                weight = fraction.view(-1, *(1,) * (outputs[name].dim() - 1))
                outputs[name] = outputs[name].lerp(first[name], weight)
        return features | outputs

    return run_rest(features, spans, run, cost=cost, shared=length)


class _FirstTokens(DynamicLayer):
    """Keys and values of one text, (1, H, P, d), that precede those of every batch and never change."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, H, P + T, d); nothing is stored."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = (part.expand(len(key_states), -1, -1, -1) for part in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


class _FirstTokensInWindow(DynamicSlidingWindowLayer):
    update = _FirstTokens.update


_FROZEN: dict[type, Any] = {DynamicLayer: _FirstTokens, DynamicSlidingWindowLayer: _FirstTokensInWindow}


def _frozen(cache: Cache) -> Cache:
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        layer.__class__ = _FROZEN[type(layer)]
    frozen = copy.copy(cache)
    frozen.layers = layers
    return frozen
