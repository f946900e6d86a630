"""Loads a causal language model with its head, in the attention mode that is asked for, and proves both."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...attention_proof import verify_attention
from ...modules.attention import is_encoder, set_attention, text_config
from ...modules.errors import ConfigurationError
from .recipe import AdaptRecipe


def load_tokenizer(recipe: AdaptRecipe, base: str) -> PreTrainedTokenizerBase:
    """Returns the base's tokenizer.

    Raises:
        ConfigurationError: If it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=recipe.trust_remote_code, revision=recipe.revision)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The tokenizer of base={base!r} cannot be read: {error}") from error


def stored_dtype(recipe: AdaptRecipe, base: str) -> torch.dtype:
    """Returns the dtype that the base says it has; float32 if it says nothing."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=recipe.trust_remote_code, revision=recipe.revision)
    return getattr(config.get_text_config(decoder=True), "dtype", None) or config.dtype or torch.float32


def load_language_model(recipe: AdaptRecipe, base: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the base with its head.

    Args:
        recipe: How to load it.
        base: Hub id or folder.
        dtype: Of the weights.

    Raises:
        ConfigurationError: If it cannot be read, is an encoder, or has no trained head.
    """
    given = {"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {}
    hub = {"trust_remote_code": recipe.trust_remote_code, "revision": recipe.revision}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, output_loading_info=True, **hub, **given)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(f"base={base!r} cannot be loaded as a causal language model: {error}") from error
    model, report = loaded
    if is_encoder(text_config(model)):
        raise ConfigurationError(
            f"base={base!r} is an encoder ({model.config.model_type}), which attends in both directions and predicts "
            f"masked tokens as it is. Use a decoder, or leave this stage out."
        )
    if missing := sorted(report["missing_keys"]):
        raise ConfigurationError(
            f"base={base!r} has no values for {len(missing)} weights of {type(model).__name__}, such as "
            f"{missing[0]!r}: without the head of a language model there is nothing to predict tokens with. Use the "
            f"base as it was published; an embedding model has no head any more."
        )
    return model


def attend(model: PreTrainedModel, recipe: AdaptRecipe) -> None:
    """Sets the recipe's attention and proves it on the loaded weights.

    Raises:
        AttentionError: If the proof fails.
    """
    set_attention(model, recipe.attention)
    report = verify_attention(model)
    if not (report.verdict == "partial" and recipe.allow_partial):
        report.raise_for_failure()
