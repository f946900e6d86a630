"""The layer readout: a vector per text and layer, (B, D), reduced from (B, T, D) by a hook when the layer returns.

Reading all layers then costs about as much memory as reading the last one; ``output_hidden_states`` keeps all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import ConfigurationError

READOUTS = ("eos", "mean")
#: What poolings may know of each token, (B, T) or (1, N) if flat, and the backbone is not: where sentences start.
POOLING_FEATURES = ("sentence_starts",)


@dataclass(frozen=True)
class TokenSpans:
    """Where each text's tokens lie in a batch, padded or flat, and how to reduce them.

    Attributes:
        mask: True for the tokens that readout and pooling may see: (B, T) if padded, (N,) if flat.
        text: Which text each token of flat input belongs to, (N,); None for padded input.
        last: Last token of each text in flat input, (B,); None for padded input.
    """

    mask: Tensor
    text: Tensor | None = None
    last: Tensor | None = None

    @classmethod
    def of(cls, features: dict[str, Any], *, include_prompt: bool = True) -> TokenSpans:
        """Read the spans of padded or flat features; without `include_prompt` a text's last token still stays."""
        length: Any = 0 if include_prompt else features.get("prompt_length", 0)
        # The trainer's collator makes it a tensor, one value for the batch.
        skipped = int(length.reshape(-1)[0]) if isinstance(length, Tensor) else int(length)
        if "cu_seq_lens_q" in features:
            offsets = features["cu_seq_lens_q"].long()
            total = features["input_ids"].shape[-1] if "input_ids" in features else int(offsets[-1])
            texts = torch.arange(len(offsets) - 1, device=offsets.device)
            text = torch.repeat_interleave(texts, offsets.diff(), output_size=total)  # a size spares a GPU sync
            last = offsets[1:] - 1
            position = torch.arange(total, device=offsets.device)
            return cls((position - offsets[text] >= skipped) | (position == last[text]), text, last)
        mask = features["attention_mask"].bool()
        if skipped:
            position = mask.long().cumsum(dim=1) - 1
            mask = mask & ((position >= skipped) | (position == position[:, -1:]))
        return cls(mask)

    def to(self, device: torch.device) -> TokenSpans:
        """Return the spans on `device`; a model spread over devices has layers away from its inputs."""
        moved: Any = (part if part is None else part.to(device) for part in (self.mask, self.text, self.last))
        return TokenSpans(*moved)

    def reduce(self, hidden_states: Tensor, readout: str) -> Tensor:
        """Reduce tokens (B, T, D), or (1, N, D) if flat, to (B, D) in float32: ``"eos"`` (last token) or ``"mean"``."""
        if readout == "eos":
            if self.last is not None:
                return hidden_states[0, self.last].float()
            last = (self.mask * torch.arange(self.mask.shape[1], device=self.mask.device)).argmax(dim=1)
            return hidden_states[torch.arange(len(last), device=last.device), last].float()
        tokens = hidden_states.masked_fill(~self.mask.unsqueeze(-1), 0)
        if self.text is None:
            return tokens.sum(dim=1, dtype=torch.float32) / self.mask.sum(dim=1, keepdim=True)
        count = self._counts()
        total = tokens.new_zeros(len(count), tokens.shape[-1], dtype=torch.float32)
        return total.index_add_(0, self.text, tokens[0].float()) / count.unsqueeze(-1)

    def compact(self, features: dict[str, Any]) -> dict[str, Any]:
        """Return features of the tokens that the pooling may see: padded ones by their mask, flat ones alone."""
        features = {key: value for key, value in features.items() if key != "prompt_length"}
        if self.text is None:
            return features | {"attention_mask": self.mask.long()}
        offsets = nn.functional.pad(self._counts().cumsum(dim=0), (1, 0))
        names = ("token_embeddings", "seq_idx", *POOLING_FEATURES)
        changes = {name: features[name][:, self.mask] for name in names if name in features}
        return features | changes | {"cu_seq_lens_q": offsets.int()}

    def _counts(self) -> Tensor:
        """Return how many tokens of each text of flat input may be seen, (B,)."""
        last, text = cast("tuple[Tensor, Tensor]", (self.last, self.text))
        return torch.zeros_like(last).index_add_(0, text, self.mask.long())


def unflatten(tokens: Tensor, cu_seq_lens_q: Tensor) -> tuple[Tensor, Tensor]:
    """Pad flat tokens (1, N, ...) of texts with offsets (B + 1,) on the right: (B, T, ...), mask (B, T) of bool."""
    lengths = cu_seq_lens_q.diff().tolist()
    padded = nn.utils.rnn.pad_sequence(tokens[0].split(lengths), batch_first=True)
    position = torch.arange(padded.shape[1], device=tokens.device)
    return padded, position < cu_seq_lens_q.diff().unsqueeze(-1)


@dataclass
class LayerCapture:
    """What the hooks of one forward have read; one instance lives in one call only.

    `keep_raw` is for training: before transformers 5.23 what a hook computes in a checkpointed region has no gradient.
    """

    spans: TokenSpans
    readout: str
    keep_raw: bool
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def summaries(self, last_hidden_state: Tensor, layers: Sequence[int], num_layers: int) -> Tensor:
        """Return (B, len(layers), D) in float32; layer `num_layers` is `last_hidden_state`, after the final norm."""
        rows = [last_hidden_state if layer == num_layers else self.outputs[layer] for layer in layers]
        rows = [self.reduce(row) if row.dim() == 3 else row for row in rows]
        return torch.stack([row.to(last_hidden_state.device) for row in rows], dim=1)

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """Return (B, D) in float32 on the device of `hidden_states`."""
        return self.spans.to(hidden_states.device).reduce(hidden_states, self.readout)


# State of one forward lives in its context, so that two threads may encode on one model.
_ACTIVE: ContextVar[LayerCapture | None] = ContextVar("st_llmpool_layer_capture", default=None)


@contextmanager
def capture_layers(spans: TokenSpans, readout: str, *, keep_raw: bool = False) -> Iterator[LayerCapture]:
    """Let the hooks of :func:`hook_layers` record during one forward; ask the capture for ``summaries`` after it."""
    capture = LayerCapture(spans, readout, keep_raw)
    token = _ACTIVE.set(capture)
    try:
        yield capture
    finally:
        _ACTIVE.reset(token)


def hook_layers(decoder_layers: Sequence[nn.Module], layers: Sequence[int]) -> None:
    """Hook each of the `layers` (1-based) once, to record inside :func:`capture_layers`; the last one needs no hook."""
    for number in layers:
        layer = decoder_layers[number - 1]
        hooks = layer._forward_hooks.values()
        if number < len(decoder_layers) and not any(getattr(hook, "func", None) is _record for hook in hooks):
            layer.register_forward_hook(functools.partial(_record, number))


def _record(number: int, layer: nn.Module, args: Any, output: Any) -> None:
    capture = _ACTIVE.get()
    if capture is None:  # a forward of the bare backbone, or gradient checkpointing's second run of this layer
        return
    hidden_states = output if isinstance(output, Tensor) else output[0]
    if hidden_states.dim() != 3:  # gemma3n
        shape = f"{type(layer).__name__} returns shape {tuple(hidden_states.shape)}, which cannot be read out"
        raise ConfigurationError(f"{shape}. Use layers=[] with a pooling over tokens, or another base.")
    capture.outputs[number] = hidden_states if capture.keep_raw else capture.reduce(hidden_states)
