"""A faster way to run a backbone, compared with the plain way before it is trusted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from .attention import find_backbone
from .layer_readout import TokenSpans
from .length_split import OUTPUTS

logger = logging.getLogger(__name__)

Outputs = dict[str, Any]
T = TypeVar("T")


@dataclass
class Shortcut:
    """Runs the batches of one backbone by a shorter way, where it is right.

    Architectures differ in what they make of unusual input, so a batch that is longer than any before is run both ways:
    the plain vectors are returned, and if the others differ by more than rounding, the shorter way is off for this
    backbone from then on, with a warning. For texts in random order that is about ln(n) of n batches; ``encode`` sorts
    the longest first, so it is the first one.

    Attributes:
        off: Why it is off for this backbone; None while it is on.
        checked: Tokens of the longest batch that was run both ways.
    """

    off: str | None = None
    checked: int = 0
    _said: set[str] = field(default_factory=set)

    #: What is said when it is not taken, with the reason.
    message: ClassVar[str] = "The short way is not taken: %s."

    def take(
        self, model: nn.Module, spans: TokenSpans, plain: Callable[[], Outputs], short: Callable[[], Outputs]
    ) -> Outputs:
        """Runs a batch the short way, or both ways if it is the longest so far.

        Args:
            model: The backbone, for its name.
            spans: Of the batch, padded.
            plain: Runs the batch the plain way.
            short: Runs it the short way.
        """
        width = spans.mask.shape[1]
        if width <= self.checked:
            found = self._try(model, short)
            return plain() if found is None else found
        expected = plain()
        share = self._try(model, lambda: _difference(expected, short(), spans))
        if share is not None:
            self.checked = width
            if share > _rounding(expected["token_embeddings"]):
                self._turn_off(f"vectors of {_name(model)} differ by {share:.1e} with it")
        return expected

    def _try(self, model: nn.Module, run: Callable[[], T]) -> T | None:
        try:
            return run()
        except torch.OutOfMemoryError:  # of this batch beside whatever else is there now
            self.decline("memory ran out")
        except Exception as error:  # whatever an architecture raises over input that it does not expect
            self._turn_off(f"{_name(model)} fails with it ({type(error).__name__}: {error})")
        return None

    def _turn_off(self, reason: str) -> None:
        self.off = reason
        self._say(reason, logging.WARNING)

    def decline(self, reason: str) -> None:
        """Says why a batch is run the plain way, each reason once."""
        self._say(reason, logging.INFO)

    def _say(self, reason: str, level: int) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.log(level, self.message, reason)


def _difference(plain: Outputs, other: Outputs, spans: TokenSpans) -> float:
    """Returns how far the outputs lie apart, as the largest share of the plain ones in any text and layer."""
    shares = []
    for name in OUTPUTS & plain.keys():
        one, two = plain[name].float(), other[name].float()
        if name == "token_embeddings":
            one, two = (tokens.masked_fill(~spans.mask.unsqueeze(-1), 0).flatten(1) for tokens in (one, two))
        shares.append(((one - two).norm(dim=-1) / one.norm(dim=-1)).flatten())
    return torch.cat(shares).nan_to_num(nan=torch.inf).max().item()


def _rounding(tokens: torch.Tensor) -> float:
    """Returns the share that other orders of the same sums may explain; autocast rounds more than `tokens` tell."""
    kind = tokens.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
    # In bfloat16 correct ways were up to 0.056 apart in 24 layers, wrong ones from 0.1 on.
    return max(1e-4, 8 * torch.finfo(low).eps, 8 * torch.finfo(tokens.dtype).eps)


def _name(model: nn.Module) -> str:
    return type(find_backbone(model)).__name__
