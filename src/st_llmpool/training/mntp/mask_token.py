"""Finds or adds the token that stands for a masked one."""

from __future__ import annotations

import logging
import re
import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...modules.errors import ConfigurationError

logger = logging.getLogger(__name__)

NEW_TOKEN = "<mask>"
_SPARE = re.compile(r"mask|reserved|unused|extra_id|placeholder", re.IGNORECASE)


def choose_mask_token(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> str:
    """Returns the mask token: one that the tokenizer has, or one that it does not have yet.

    The padding token is never taken: many bases have read it at the end of each document (Qwen's ``<|endoftext|>``),
    so that it has a meaning of its own.

    Args:
        tokenizer: Stays as it is.
        wanted: A name; None takes the tokenizer's mask token, else a special token that is reserved or unused by its
            name, else ``<mask>``.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from st_llmpool.data import builtin_backbone
        >>> choose_mask_token(AutoTokenizer.from_pretrained(builtin_backbone()))
        '<mask>'
    """
    if wanted is not None:
        return wanted
    if tokenizer.mask_token is not None:
        return tokenizer.mask_token
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token, tokenizer.pad_token}
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    return next((token for token in special if _SPARE.search(token) and token not in used), NEW_TOKEN)


def use_mask_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, token: str) -> int:
    """Makes `token` the tokenizer's mask token, and gives it embeddings if it is new.

    A new token gets the mean of the old embeddings, in the input and, if they are not tied, in the output matrix, which
    no longer than needed grow: many models have rows to spare. Drawing it at random would make resuming inexact.

    Args:
        tokenizer: Changed in place.
        model: Changed in place if the token is new.
        token: The token.

    Returns:
        Its id.

    Raises:
        ConfigurationError: If a new token cannot have an id of its own, here and in the tokenizer that is saved.
    """
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"mask_token": token})
    index = int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]
    if not _is_settled(tokenizer, token, index, is_new=token not in known):
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
    """Returns the ids of all tokens that stand for no text."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids} | added


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Returns the ids (V',) of all tokens that are not special, in order; some tokenizers leave ids out."""
    return torch.tensor(sorted({*tokenizer.get_vocab().values()} - special_ids(tokenizer)))


def _is_settled(tokenizer: PreTrainedTokenizerBase, token: str, index: int, *, is_new: bool) -> bool:
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
    """Returns the embedding matrices, tied ones once."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(module.weight): module.weight for module in modules if module is not None}.values())
