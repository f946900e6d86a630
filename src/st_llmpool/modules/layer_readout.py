"""The layer readout: a vector per text and layer, (B, D), reduced from (B, T, D) by a hook when the layer returns.

Reading all layers then costs about as much memory as reading the last one; ``output_hidden_states`` keeps all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigurationError

READOUTS = ("eos", "mean")
#: What poolings may be told of each token, (B, T) or (1, N) if flat, and the backbone is not: where sentences start.
POOLING_FEATURES = ("sentence_starts",)


@dataclass(frozen=True)
class TokenSpans:
    """Where each text's tokens lie in a batch, padded or flat, and how to reduce them.

    Attributes:
        mask: True for the tokens that readout and pooling may see: (B, T) if padded, (N,) if flat.
        starts: First token of each text in flat input, (B,); None for padded input.
        lengths: Tokens of each text in flat input, (B,); None for padded input.

    Example:
        >>> spans = TokenSpans.of({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
        >>> spans.reduce(torch.arange(6.0).view(2, 3, 1), "mean")
        tensor([[0.5000],
                [4.0000]])
    """

    mask: Tensor
    starts: Tensor | None = None
    lengths: Tensor | None = None

    @classmethod
    def of(cls, features: dict[str, Any], *, include_prompt: bool = True) -> TokenSpans:
        """Read the spans from a feature dict.

        Args:
            features: ``attention_mask`` (B, T), padded anywhere, or ``cu_seq_lens_q`` (B + 1,) for flat input;
                ``prompt_length`` if texts start with a prompt.
            include_prompt: False leaves the prompt's tokens out; the last token of a text always stays.
        """
        skipped = 0 if include_prompt else _prompt_length(features)
        if "cu_seq_lens_q" in features:
            offsets = features["cu_seq_lens_q"].long()
            starts, lengths = offsets[:-1], offsets.diff()
            total = features["input_ids"].shape[-1] if "input_ids" in features else int(offsets[-1])
            # output_size spares a synchronisation with the GPU.
            length_of_token = torch.repeat_interleave(lengths, lengths, output_size=total)
            first_of_token = torch.repeat_interleave(starts, lengths, output_size=total)
            position = torch.arange(total, device=offsets.device) - first_of_token
            return cls((position >= skipped) | (position == length_of_token - 1), starts, lengths)
        mask = features["attention_mask"].bool()
        if skipped:
            position = mask.long().cumsum(dim=1) - 1
            last = position == position[:, -1:]
            mask = mask & ((position >= skipped) | last)
        return cls(mask)

    @property
    def is_flat(self) -> bool:
        """True if the texts are concatenated without padding."""
        return self.starts is not None

    def to(self, device: torch.device) -> TokenSpans:
        """Returns the spans on `device`; a model spread over devices has layers away from its inputs."""
        if self.mask.device == device:
            return self
        starts, lengths = (None if part is None else part.to(device) for part in (self.starts, self.lengths))
        return TokenSpans(self.mask.to(device), starts, lengths)

    def reduce(self, hidden_states: Tensor, readout: str) -> Tensor:
        """Reduce tokens to one vector per text.

        Args:
            hidden_states: (B, T, D), or (1, N, D) if flat, in any float dtype.
            readout: ``"eos"``, the last token of each text, or ``"mean"``, the mean of its tokens.

        Returns:
            (B, D) in float32. What stands at masked positions, NaN included, has no effect.
        """
        if readout == "eos":
            return self._last(hidden_states).float()
        if self.starts is None:
            total = hidden_states.masked_fill(~self.mask.unsqueeze(-1), 0).sum(dim=1, dtype=torch.float32)
            return total / self.mask.sum(dim=1, keepdim=True)
        tokens = hidden_states[0].masked_fill(~self.mask.unsqueeze(-1), 0).float()
        total = tokens.new_zeros(len(self.starts), tokens.shape[-1]).index_add_(0, self._text_of_token, tokens)
        count = torch.zeros_like(self.starts).index_add_(0, self._text_of_token, self.mask.long())
        return total / count.unsqueeze(-1)

    def compact(self, features: dict[str, Any]) -> dict[str, Any]:
        """Return features of the tokens that the pooling may see: padded ones by their mask, flat ones alone."""
        features = {key: value for key, value in features.items() if key != "prompt_length"}
        if self.starts is None:
            return features | {"attention_mask": self.mask.long()}
        kept = torch.zeros_like(self.starts).index_add_(0, self._text_of_token, self.mask.long())
        offsets = torch.cat([kept.new_zeros(1), kept.cumsum(dim=0)])
        changes = {"token_embeddings": features["token_embeddings"][:, self.mask], "cu_seq_lens_q": offsets.int()}
        changes |= {name: features[name][:, self.mask] for name in ("seq_idx", *POOLING_FEATURES) if name in features}
        return features | changes

    @property
    def _text_of_token(self) -> Tensor:
        assert self.starts is not None
        assert self.lengths is not None
        texts = torch.arange(len(self.starts), device=self.starts.device)
        return torch.repeat_interleave(texts, self.lengths, output_size=self.mask.shape[0])

    def _last(self, hidden_states: Tensor) -> Tensor:
        if self.starts is not None and self.lengths is not None:
            return hidden_states[0, self.starts + self.lengths - 1]
        position = torch.arange(self.mask.shape[1], device=self.mask.device)
        last = (self.mask * position).argmax(dim=1)
        return hidden_states[torch.arange(len(last), device=last.device), last]


def unflatten(tokens: Tensor, cu_seq_lens_q: Tensor) -> tuple[Tensor, Tensor]:
    """Pad flat tokens (1, N, ...) of texts with offsets (B + 1,) on the right: tokens (B, T, ...), mask (B, T) of bool.

    Example:
        >>> unflatten(torch.tensor([[1, 2, 3]]), torch.tensor([0, 1, 3]))[0].tolist()
        [[1, 0], [2, 3]]
    """
    lengths = cu_seq_lens_q.diff().tolist()
    padded = nn.utils.rnn.pad_sequence(tokens[0].split(lengths), batch_first=True)
    position = torch.arange(padded.shape[1], device=tokens.device)
    return padded, position < cu_seq_lens_q.diff().unsqueeze(-1)


@dataclass
class LayerCapture:
    """What the hooks of one forward have read; one instance lives in one call only.

    With `keep_raw` (B, T, D) is kept and reduced after the forward. In training the tensor is alive anyway, as the next
    layer's input, and a hook that runs inside a checkpointed region (transformers before 5.23) must not add operations
    there: reentrant checkpointing would lose their gradient silently.
    """

    spans: TokenSpans
    readout: str
    keep_raw: bool
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def summaries(self, last_hidden_state: Tensor, layers: Sequence[int], num_layers: int) -> Tensor:
        """Returns (B, len(layers), D) in float32; layer `num_layers` is `last_hidden_state`, after the final norm."""
        rows = []
        for layer in layers:
            row = last_hidden_state if layer == num_layers else self.outputs[layer]
            rows.append(self.reduce(row) if row.dim() == 3 else row)
        return torch.stack([row.to(last_hidden_state.device) for row in rows], dim=1)

    def reduce(self, hidden_states: Tensor) -> Tensor:
        """Returns (B, D) in float32 on the device of `hidden_states`."""
        return self.spans.to(hidden_states.device).reduce(hidden_states, self.readout)


# As in transformers' own output capture: state of one forward lives in its context, so that two threads
# may encode on one model.
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
        raise ConfigurationError(
            f"Layer {number} ({type(layer).__name__}) returns shape {tuple(hidden_states.shape)}, several streams per "
            f"token, for which no readout is defined. Use layers=[] with a pooling over tokens, or another base."
        )
    if capture.keep_raw:
        capture.outputs[number] = hidden_states
    else:
        capture.outputs[number] = capture.reduce(hidden_states)


def _prompt_length(features: dict[str, Any]) -> int:
    length = features.get("prompt_length", 0)
    # The trainer's collator makes it a tensor, one value for the batch.
    return int(length.reshape(-1)[0]) if isinstance(length, Tensor) else int(length)
