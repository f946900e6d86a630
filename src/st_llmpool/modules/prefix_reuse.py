"""Computes what all texts of a batch start with once: the instruction in front of every query, for instance.

Under causal attention the first tokens of a text do not depend on what follows. So the longest start that all texts of
a batch share, in tokens, is run as one text; its keys and values stand before those of every other text, and only the
rest is run. Positions go on counting and windows go on sliding, so the vectors are the same up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .attention import attention_of, batch_sets_positions, find_backbone
from .layer_readout import TokenSpans
from .length_split import OUTPUTS, Read, per_token
from .shortcut import Shortcut

Run = Callable[..., dict[str, Any]]
_TOO_FEW = "a batch shares too few of them"


@dataclass
class PrefixReuse(Shortcut):
    """Runs the batches of one causal backbone with their shared start computed once, where it pays and is right.

    Example:
        >>> shared_start({"input_ids": torch.tensor([[7, 8, 1, 0], [7, 8, 2, 3]])}, torch.ones(2, 4))
        2
    """

    message = "The tokens that all texts of a batch start with are computed for each of them: %s."

    def read(
        self,
        model: nn.Module,
        features: dict[str, Any],
        spans: TokenSpans,
        readout: str,
        read: Read,
        run: Run,
        *,
        cost: int,
        packs: bool,
    ) -> dict[str, Any]:
        """Runs a batch.

        Args:
            model: The backbone.
            features: Without gradients, in eval mode.
            spans: Of the batch.
            readout: ``"eos"`` or ``"mean"``.
            read: Runs a batch, or the rest of one after ``past_key_values``.
            run: Runs a batch by a `read`, whole or in groups, as ``read_in_groups`` does.
            cost: What a forward costs, in tokens.
            packs: Whether the whole batch would be run without its padding, as the rest of it is not.

        Returns:
            The features with the outputs of `read`.
        """
        reason, length = self.off or _why_not(model, spans, cost), 0
        if not reason:
            mask = features["attention_mask"]
            length = shared_start(features, mask)
            spared_otherwise = int((mask == 0).sum()) if packs else 0
            if (len(mask) - 1) * length <= cost + spared_otherwise:
                reason = _TOO_FEW
        if reason:
            self.decline(reason)
            return run(features, spans, read)
        return self.take(
            model,
            spans,
            plain=lambda: run(features, spans, read),
            short=lambda: _read_shared(model, features, spans, length, readout, read, run),
        )


def shared_start(features: dict[str, Any], mask: Tensor) -> int:
    """Returns how many first tokens all texts share, each keeping at least one of its own; 0 if padded on the left.

    Args:
        features: ``input_ids`` (B, T) and whatever else has an entry for each token.
        mask: (B, T), 0 where padded.
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


def _why_not(model: nn.Module, spans: TokenSpans, cost: int) -> str | None:
    if spans.is_flat:
        return "texts are concatenated without padding"
    if len(spans.mask) == 1:
        return "the batch has one text"
    if spans.mask.numel() <= cost:
        return _TOO_FEW
    if attention_of(model) != "causal":
        return "its tokens attend in both directions, so they depend on what follows"
    if batch_sets_positions(model):
        return "its rotary positions depend on the length of the batch"
    return other_state(model)


def other_state(model: nn.Module) -> str | None:
    """Says which layers hand on more than keys and values from token to token, such as recurrent ones; None if none."""
    try:
        layers = DynamicCache(config=find_backbone(model).config.get_text_config(decoder=True)).layers
    except KeyError as error:
        return f"it has layers of type {error}"
    other = {type(layer).__name__ for layer in layers if type(layer) not in _FROZEN}
    return f"some layers keep more than keys and values ({', '.join(sorted(other))})" if other else None


def _read_shared(
    model: nn.Module, features: dict[str, Any], spans: TokenSpans, length: int, readout: str, read: Read, run: Run
) -> dict[str, Any]:
    """Runs the first `length` tokens as one text, then the rest of all texts."""
    mask = features["attention_mask"]
    first = {name: value[:1, :length] if per_token(value, mask) else value for name, value in features.items()}
    cache = DynamicCache(config=find_backbone(model).config)
    first_spans = TokenSpans(spans.mask[:1, :length])
    first = read(first, first_spans, past_key_values=cache, use_cache=True)
    if any(cache.get_seq_length(layer) != length for layer in range(len(cache.layers))):
        raise ValueError("keys and values are not in the cache that was passed")
    frozen = _frozen(cache)

    def read_rest(features: dict[str, Any], spans: TokenSpans) -> dict[str, Any]:
        mask = features["attention_mask"]
        rest = {name: value[:, length:] if per_token(value, mask) else value for name, value in features.items()}
        rest["attention_mask"] = mask  # of the keys, old and new
        rest = read(rest, TokenSpans(spans.mask[:, length:]), past_key_values=frozen, use_cache=True)
        outputs = {name: rest[name] for name in OUTPUTS & rest.keys()}
        tokens = first["token_embeddings"].expand(len(mask), -1, -1)
        outputs["token_embeddings"] = torch.cat([tokens, outputs["token_embeddings"]], dim=1)
        if readout == "mean" and bool(first_spans.mask.any()):  # else the mean of no tokens, NaN
            share = first_spans.mask.sum() / spans.mask.sum(dim=1)
            for name in outputs.keys() - {"token_embeddings"}:
                weight = share.view(-1, *(1,) * (outputs[name].dim() - 1))
                outputs[name] = outputs[name].lerp(first[name], weight)
        return features | outputs

    return run(features, spans, read_rest, shared=length)


class _FirstTokens(DynamicLayer):
    """Keys and values of one text, (1, H, P, d), that stand before those of every batch and never change."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns keys and values (B, H, P + T, d); kept, they would be those of all layers at once."""
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
