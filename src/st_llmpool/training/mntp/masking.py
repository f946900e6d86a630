"""Which tokens of a text are masked, and what stands in their place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..recipe import MaskingSettings

#: Label of a token that is not to be predicted; what torch's cross-entropy passes over.
IGNORE = -100

# BERT (Devlin et al. 2018, arXiv 1810.04805, section 3.1): of the chosen tokens 80 % are masked, 10 % become a random
# token, 10 % stay, so that the model cannot rely on the mask token to know where to predict.
_BERT_MASKED, _BERT_RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of a tokenizer.

    Attributes:
        mask: Id of the mask token.
        ordinary: (V',) Ids that may stand in a text: all but special tokens.
    """

    mask: int
    ordinary: Tensor


def maskable(ids: Tensor, special: Tensor) -> Tensor:
    """Returns the places (M,) that may be masked: no special token, and not the first, which has no predecessor.

    Args:
        ids: (T,) Tokens of one text without padding.
        special: (T,) 1 for special tokens.

    Example:
        >>> maskable(torch.tensor([5, 6, 7, 2]), torch.tensor([0, 0, 0, 1]))
        tensor([1, 2])
    """
    allowed = special == 0
    allowed[0] = False
    return allowed.nonzero().flatten()


def mask_tokens(
    ids: Tensor, places: Tensor, settings: MaskingSettings, vocabulary: Vocabulary, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Masks one text.

    Args:
        ids: (T,) Its tokens without padding.
        places: (M,) Those that may be masked, at least one.
        settings: Share and replacement; their number is the share of `places`, rounded, and at least one.
        vocabulary: Mask token and random tokens.
        generator: Source of the choice.

    Returns:
        The tokens to read, (T,), and the labels, (T,): the token that stood in each chosen place, ``IGNORE`` elsewhere.

    Example:
        >>> vocabulary = Vocabulary(mask=9, ordinary=torch.arange(5, 8))
        >>> generator = torch.Generator().manual_seed(0)
        >>> mask_tokens(torch.tensor([5, 6]), torch.tensor([1]), MaskingSettings(), vocabulary, generator)
        (tensor([5, 9]), tensor([-100,    6]))
    """
    count = max(1, round(settings.share * len(places)))
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
