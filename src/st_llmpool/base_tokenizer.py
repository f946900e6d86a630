"""Prepare a base's tokenizer: every text ends in EOS, after truncation too, and padding has a token of its own.

Both are saved with the tokenizer, so that a saved model needs none of this.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tokenizers import processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .modules.errors import ConfigurationError


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, *, add_eos_token: bool) -> None:
    """Call :func:`append_eos`, if asked for, and :func:`ensure_pad_token`."""
    if add_eos_token:
        append_eos(tokenizer)
    ensure_pad_token(tokenizer)


def append_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `tokenizer` end every text in a special token, also a truncated one; a BOS that it adds by itself stays.

    A tokenizer whose own template ends texts in special tokens (``<|endoftext|>`` where EOS is another, [SEP],
    a language code) keeps that ending and gets no second one: it is what the model was trained to read. Any other
    gets its EOS token. The change is in the tokenizer's post-processor, so it is saved with the tokenizer and any
    library that loads it reproduces it.

    Args:
        tokenizer: Changed in place.

    Raises:
        ConfigurationError: If there is neither an ending nor an EOS token, or the ending cannot be made to stay.
    """
    if ends_every_text(tokenizer):
        return
    before, after = special_tokens_around(tokenizer)
    if not after and tokenizer.eos_token_id is None:
        raise ConfigurationError(
            f"add_eos_token=True, but {type(tokenizer).__name__} has no EOS token: set one, or use add_eos_token=False."
        )
    after = after or [tokenizer.eos_token_id]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.post_processor = _template(tokenizer, before, after)
    if not ends_every_text(tokenizer):
        raise ConfigurationError(
            f"{type(tokenizer).__name__} cannot be made to end texts in {tokenizer.decode(after)!r}. "
            f"Use add_eos_token=False with pooling 'mean', or a fast tokenizer."
        )
    _keep_ending_when_reloaded(tokenizer)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give `tokenizer` a padding token if it has none: a spare special token, else EOS.

    Which one does not matter to the embedding, because masks come from ``attention_mask`` and never from
    comparing ids.
    """
    if tokenizer.pad_token_id is not None:
        return
    spare = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = [token for token in spare if any(mark in token.lower() for mark in ("pad", "reserved", "unused"))]
    choices = [*named, tokenizer.unk_token, tokenizer.eos_token, *spare]
    choice = next((token for token in choices if token is not None), None)
    if choice is None:
        raise ConfigurationError(
            f"{type(tokenizer).__name__} has neither a padding token nor a special token. Set tokenizer.pad_token."
        )
    tokenizer.pad_token = choice


@contextmanager
def without_truncation(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Clear the truncation and padding of a tokenizer's last call inside, and restore them afterwards.

    A fast tokenizer keeps both, and would save them in ``tokenizer.json``.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        backend.enable_padding(**padding) if padding else backend.no_padding()


def special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer adds before and after a text, such as ``([bos], [eos])``."""
    with without_truncation(tokenizer):
        special = tokenizer("a")["input_ids"]
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return special[:start], special[start + len(plain) :]
    return [], []


def ends_every_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a text, an empty one and a truncated one all end in the same special tokens."""
    before, after = special_tokens_around(tokenizer)
    if not after:
        return False
    room = len(before) + len(after)
    with without_truncation(tokenizer):
        texts = [tokenizer(text)["input_ids"] for text in ("a", "")]
        cut = tokenizer("a b c d e f g h i j", truncation=True, max_length=room + 2)["input_ids"]
    return len(cut) <= room + 2 and all(ids[-len(after) :] == after for ids in [*texts, cut])


def _keep_ending_when_reloaded(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer generic whose class (GPTNeoXTokenizer, ...) builds a post-processor of its own at load."""
    if type(tokenizer) is PreTrainedTokenizerFast:
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        reloaded = type(tokenizer).from_pretrained(folder)
    if not ends_every_text(reloaded):
        # The saved tokenizer.json is complete, and the generic class reads it as it is.
        tokenizer.__class__ = PreTrainedTokenizerFast


def _template(tokenizer: PreTrainedTokenizerBase, before: list[int], after: list[int]) -> processors.PostProcessor:
    """Return a post-processor that adds `before` and `after` to a text."""
    names = {index: tokenizer.convert_ids_to_tokens(index) for index in (*before, *after)}
    first = [f"{names[index]}:0" for index in before]
    last = [names[index] for index in after]
    single = [*first, "$A:0", *(f"{token}:0" for token in last)]
    return processors.TemplateProcessing(
        single=single,
        pair=[*single, "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=[(token, index) for index, token in names.items()],
    )
