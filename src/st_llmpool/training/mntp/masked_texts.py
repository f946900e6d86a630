"""Mask texts: each example is a function of seed and position alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from ..recipe import MaskingSettings
from .language_model import special_ids

if TYPE_CHECKING:
    from datasets import Dataset

#: Label of a token that is not to be predicted; what torch's cross-entropy passes over.
IGNORE = -100

# BERT (Devlin et al. 2018, arXiv 1810.04805, section 3.1): of the chosen tokens 80 % are masked, 10 % become a random
# token, 10 % stay, so that the model cannot rely on the mask token to know where to predict.
_BERT_MASKED, _BERT_RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that masking uses.

    Attributes:
        mask: Id of the mask token.
        ordinary: (V',) Ids that may stand in a text: all but special tokens.
    """

    mask: int
    ordinary: Tensor


def maskable(ids: Tensor, special: Tensor) -> Tensor:
    """Return the places (M,) that may be masked: no special token (1 in `special`), and not the first."""
    allowed = special == 0
    allowed[0] = False
    return allowed.nonzero().flatten()


def mask_tokens(
    ids: Tensor, places: Tensor, settings: MaskingSettings, vocabulary: Vocabulary, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mask one text.

    Args:
        ids: (T,) Its tokens without padding.
        places: (M,) Those that may be masked, at least one.
        settings: Probability and replacement; ``mlm_probability`` of `places` are masked, rounded, at least one.
        vocabulary: Mask token and random tokens.
        generator: Source of the choice.

    Returns:
        The tokens to read, (T,), and the labels, (T,): the token that stood in each chosen place, ``IGNORE`` elsewhere.
    """
    count = max(1, round(settings.mlm_probability * len(places)))
    chosen = places[torch.randperm(len(places), generator=generator)[:count]]
    masked, labels = ids.clone(), torch.full_like(ids, IGNORE)
    labels[chosen] = ids[chosen]
    if settings.replacement == "mask":
        masked[chosen] = vocabulary.mask
        return masked, labels
    draw = torch.rand(count, generator=generator)
    others = vocabulary.ordinary[torch.randint(len(vocabulary.ordinary), (count,), generator=generator)]
    masked[chosen] = torch.where(
        draw < _BERT_MASKED, vocabulary.mask, torch.where(draw < _BERT_MASKED + _BERT_RANDOM, others, ids[chosen])
    )
    return masked, labels


Example = dict[str, Tensor]

#: Tokens of a piece, 1 for those that the tokenizer added, and the place of its text.
_Piece = tuple[list[int], list[int], int]


def tokenize(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int, long_texts: Literal["cut", "truncate"]
) -> Dataset:
    """Return the tokens of each text, one row a piece; pieces are never put together.

    Args:
        texts: Columns ``text`` and, to name rows that fail, ``row``.
        tokenizer: Adds what special tokens it adds by itself, to each piece.
        max_length: Longest piece in tokens.
        long_texts: ``cut`` makes several pieces of a longer text, ``truncate`` leaves the rest out.

    Returns:
        Columns ``input_ids``, ``special``, 1 for special tokens, those that a text spells out too, and ``row`` of its
        text; rows without a token that may be masked are left out.
    """
    cut = long_texts == "cut"
    split = _cut_by_hand if cut and not tokenizer.is_fast else partial(_split, cut=cut)
    never = special_ids(tokenizer)

    def pieces(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        found = [
            (ids, [int(added or index in never) for index, added in zip(ids, special, strict=True)], place)
            for ids, special, place in split(rows["text"], tokenizer, max_length)
        ]
        kept = [(ids, special, place) for ids, special, place in found if 0 in special[1:]]
        columns = {"input_ids": [ids for ids, _, _ in kept], "special": [special for _, special, _ in kept]}
        return {**columns, **({"row": [rows["row"][place] for _, _, place in kept]} if "row" in rows else {})}

    # A name of its own instead of a hash of the tokenizer: nothing is read from a cache that an edited one would miss.
    return texts.map(pieces, batched=True, remove_columns=texts.column_names, load_from_cache_file=False)


class MaskedTexts(TorchDataset):
    """A fixed number of masked examples: each pass shuffles the pieces and draws new masks.

    Args:
        pieces: From :func:`tokenize`.
        settings: How to mask.
        vocabulary: Mask token and random tokens.
        length: Number of examples.
        seed: Of order and masks. The same seed and place give the same example, whoever asks and when.

    Example:
        >>> from datasets import Dataset
        >>> pieces = Dataset.from_dict({"input_ids": [[5, 6]], "special": [[0, 0]]})
        >>> vocabulary = Vocabulary(mask=9, ordinary=torch.arange(5, 8))
        >>> MaskedTexts(pieces, MaskingSettings(), vocabulary, length=3)[2]
        {'input_ids': tensor([5, 9]), 'labels': tensor([-100,    6])}
    """

    def __init__(
        self, pieces: Dataset, settings: MaskingSettings, vocabulary: Vocabulary, *, length: int, seed: int = 0
    ) -> None:
        self.pieces = pieces.with_format("torch")
        self.settings = settings
        self.vocabulary = vocabulary
        self.length = length
        self.seed = seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.length

    def __getitem__(self, place: int) -> Example:
        """Return ``input_ids`` (T,), ``labels`` (T,) and, if it is known, the ``row`` of the text."""
        visit, within = divmod(place, len(self.pieces))
        if self._order[0] != visit:
            self._order = (visit, torch.randperm(len(self.pieces), generator=self._generator(visit)))
        piece = self.pieces[int(self._order[1][within])]
        ids, places = piece["input_ids"], maskable(piece["input_ids"], piece["special"])
        generator = self._generator(2**32 + place)
        masked, labels = mask_tokens(ids, places, self.settings, self.vocabulary, generator)
        return {"input_ids": masked, "labels": labels, **({"row": piece["row"]} if "row" in piece else {})}

    def _generator(self, number: int) -> torch.Generator:
        # Seeds that differ in few bits give streams that are alike, so the two numbers are spread over all bits.
        return torch.Generator().manual_seed(hash((self.seed, number)) & (2**63 - 1))


def collate(examples: Sequence[Example], *, padding_side: str = "right") -> dict[str, Tensor]:
    """Pad examples to ``input_ids`` (B, T), zero where there is padding, ``attention_mask`` and ``labels``."""
    from torch.nn.utils.rnn import pad_sequence

    def pad(tensors: list[Tensor], value: int) -> Tensor:
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=padding_side)

    return {
        "input_ids": pad([example["input_ids"] for example in examples], 0),
        "attention_mask": pad([torch.ones_like(example["input_ids"]) for example in examples], 0),
        "labels": pad([example["labels"] for example in examples], IGNORE),
    }


def _split(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, *, cut: bool) -> Iterator[_Piece]:
    options: dict[str, Any] = {"return_overflowing_tokens": True} if cut else {}
    encoded = tokenizer(
        texts,
        truncation=True,
        max_length=max_length,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        **options,
    )
    places = encoded["overflow_to_sample_mapping"] if cut else range(len(texts))
    return zip(encoded["input_ids"], encoded["special_tokens_mask"], places, strict=True)


def _cut_by_hand(texts: list[str], tokenizer: Any, max_length: int) -> Iterator[_Piece]:
    """Cut for tokenizers without a fast backend, which give no rows of what is beyond `max_length`."""
    size = max_length - tokenizer.num_special_tokens_to_add()
    for place, ids in enumerate(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]):
        for start in range(0, len(ids), size):
            piece = tokenizer.prepare_for_model(ids[start : start + size], return_special_tokens_mask=True)
            yield piece["input_ids"], piece["special_tokens_mask"], place
