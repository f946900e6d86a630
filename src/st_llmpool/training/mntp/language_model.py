"""Load a causal language model with its head, set and verify its attention, and find or add a mask token."""

from __future__ import annotations

import logging
import re
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...attention_proof import verify_attention
from ...modules.attention import is_encoder, set_attention, text_config
from ...modules.errors import ConfigurationError
from .recipe import AdaptRecipe

logger = logging.getLogger(__name__)

NEW_TOKEN = "<mask>"
_SPARE = re.compile(r"mask|reserved|unused|extra_id|placeholder", re.IGNORECASE)


def choose_mask_token(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> str:
    """Return `wanted`, the tokenizer's mask token, its first reserved or unused special token, or ``<mask>``.

    The padding token is never used: many bases have read it at the end of each document (Qwen's ``<|endoftext|>``),
    so that it carries a meaning.
    """
    if wanted is not None:
        return wanted
    if tokenizer.mask_token is not None:
        return tokenizer.mask_token
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token}
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    return next((token for token in special if _SPARE.search(token) and token not in used), NEW_TOKEN)


def use_mask_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, token: str) -> int:
    """Make `token` the tokenizer's mask token, give it embeddings in `model` if it is new, and return its id.

    A new token gets the mean of the old embeddings, in the input and, if they are not tied, in the output matrix, which
    no longer than needed grow: many models have rows to spare. Drawing it at random would make resuming inexact.
    """
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"mask_token": token})
    index = int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]
    if not _has_stable_id(tokenizer, token, index, is_new=token not in known):
        raise ConfigurationError(
            f"The tokenizer leaves ids out, and the mask token {token!r} would get that of another token, now or when "
            f"it is loaded again. Set masking.token to a token that the tokenizer has and that no text needs."
        )
    if token in known:
        return index
    logger.info("The tokenizer has no spare token, so %s is added as token %d.", token, index)
    rows = len(_rows(model)[0])
    old = torch.tensor(sorted({place for place in known.values() if place < rows}))
    if rows <= index:
        model.resize_token_embeddings(index + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in _rows(model):
            weight[index] = weight[old.to(weight.device)].float().mean(dim=0).to(weight.dtype)
    return index


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of all tokens that are not text."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids} | added


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the ids (V',) of all tokens that are not special, in order; some tokenizers leave ids out."""
    return torch.tensor(sorted({*tokenizer.get_vocab().values()} - special_ids(tokenizer)))


def _has_stable_id(tokenizer: PreTrainedTokenizerBase, token: str, index: int, *, is_new: bool) -> bool:
    """Whether `index` is the id of `token` alone, and stays it when the tokenizer is saved and loaded."""
    vocabulary = tokenizer.get_vocab()
    if list(vocabulary.values()).count(index) > 1:
        return False
    if not is_new or len(vocabulary) > max(vocabulary.values()):
        return True
    # The tokenizers library counts tokens to find a new id, and counts others when it loads them.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return bool(type(tokenizer).from_pretrained(folder).convert_tokens_to_ids(token) == index)


def _rows(model: PreTrainedModel) -> list[Tensor]:
    """Return the embedding matrices, tied ones once."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(module.weight): module.weight for module in modules if module is not None}.values())


def load_tokenizer(recipe: AdaptRecipe, base: str) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=recipe.trust_remote_code, revision=recipe.revision)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"The tokenizer of base={base!r} cannot be read: {error}") from error


def stored_dtype(recipe: AdaptRecipe, base: str) -> torch.dtype:
    """Return the dtype that the base says it has; float32 if it says nothing."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=recipe.trust_remote_code, revision=recipe.revision)
    return getattr(config.get_text_config(decoder=True), "dtype", None) or config.dtype or torch.float32


def load_language_model(recipe: AdaptRecipe, base: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base with its head, in `dtype`."""
    given = {"attn_implementation": recipe.attn_implementation} if recipe.attn_implementation else {}
    hub = {"trust_remote_code": recipe.trust_remote_code, "revision": recipe.revision}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, output_loading_info=True, **hub, **given)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(f"base={base!r} cannot be loaded as a causal language model: {error}") from error
    model, report = loaded
    if is_encoder(text_config(model)):
        raise ConfigurationError(
            f"base={base!r} is an encoder ({model.config.model_type}), which needs no adaptation. Use a decoder."
        )
    if missing := sorted(report["missing_keys"]):
        raise ConfigurationError(
            f"base={base!r} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]!r}: nothing "
            f"predicts tokens without a language model's head. Use the base as published, not an embedding model."
        )
    return model


def apply_attention(model: PreTrainedModel, recipe: AdaptRecipe) -> None:
    """Set the recipe's attention and prove it on the loaded weights."""
    set_attention(model, recipe.attention)
    report = verify_attention(model)
    if not (report.verdict == "partial" and recipe.allow_partial):
        report.raise_for_failure()
