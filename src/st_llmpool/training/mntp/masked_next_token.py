"""Masked next-token prediction: each masked token from the hidden state one position before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...modules.errors import ConfigurationError
from .masking import IGNORE


def masked_logits(
    model: nn.Module, head: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns what the model predicts for the masked tokens, and for no others.

    A decoder's head reads position t to predict the token at t + 1. The masked token at t is therefore predicted from
    the hidden state at t - 1 (MNTP, BehnamGhader et al. 2024, arXiv 2404.05961, section 2.1), and the logits are
    ``head(h_{t-1})``. The hidden states are chosen before the head reads them, so that memory is M × V and not
    B × T × V; what a model does with its logits afterwards (soft-capping, scaling) still happens.

    Args:
        model: A causal language model, also wrapped by PEFT or DDP.
        head: The module inside it that turns hidden states into logits, ``get_output_embeddings()``.
        input_ids: (B, T).
        attention_mask: (B, T), padding on either side.
        labels: (B, T), the token where one is masked and -100 elsewhere; never a text's first real token.

    Returns:
        Logits (M, V) of the masked tokens, text by text, and their labels (M,).

    Raises:
        ConfigurationError: If the model computes its logits without calling its head.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=9)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> ids, labels = torch.tensor([[3, 8, 5, 8]]), torch.tensor([[-100, 4, -100, 6]])
        >>> logits, targets = masked_logits(model, model.get_output_embeddings(), ids, torch.ones_like(ids), labels)
        >>> logits.shape, targets
        (torch.Size([2, 9]), tensor([4, 6]))
    """
    rows, places = (labels != IGNORE).nonzero(as_tuple=True)
    with _only(head, rows, places - 1):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    if logits.shape[:2] != (1, len(rows)):
        raise ConfigurationError(
            f"{type(model).__name__} gives logits of shape {tuple(logits.shape)} for {len(rows)} masked tokens: it "
            f"does not call its head on hidden states (B, T, D), so those of single tokens cannot be had. Use another "
            f"base."
        )
    return logits[0], labels[rows, places]


def masked_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed cross-entropy of logits (M, V) and targets (M,), in float32 at least."""
    return nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum"
    )


@contextmanager
def _only(head: nn.Module, rows: Tensor, places: Tensor) -> Iterator[None]:
    """Makes `head` read hidden states (1, M, D), those of `places` (M,) in `rows` (M,), instead of (B, T, D)."""

    def choose(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][rows, places].unsqueeze(0), *inputs[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
