"""Which tokens are masked, for any text, and by what."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training.mntp.masked_texts import IGNORE, Vocabulary, mask_tokens, maskable
from st_llmpool.training.recipe import MaskingSettings

MASK = 99
VOCABULARY = Vocabulary(mask=MASK, ordinary=torch.arange(100, 120))


@st.composite
def texts(draw) -> tuple[torch.Tensor, torch.Tensor]:
    length = draw(st.integers(2, 60))
    special = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    special[draw(st.integers(1, length - 1))] = 0
    return torch.arange(length), torch.tensor(special)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(texts(), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_the_share_is_masked_but_never_the_first_nor_a_special_token(text, share, seed):
    ids, special = text
    places = maskable(ids, special)
    masked, labels = mask_tokens(ids, places, MaskingSettings(mlm_probability=share), VOCABULARY, generator(seed))
    chosen = [place for place in range(len(ids)) if labels[place] != IGNORE]
    allowed = [place for place in range(1, len(ids)) if special[place] == 0]
    assert set(chosen) <= set(allowed)
    assert len(chosen) == max(1, round(share * len(allowed)))
    assert [masked[place].item() for place in chosen] == [MASK] * len(chosen)
    assert [labels[place].item() for place in chosen] == chosen  # a token's id is its place here
    rest = [place for place in range(len(ids)) if place not in chosen]
    assert [masked[place].item() for place in rest] == rest


def test_bert_masks_four_fifths_and_replaces_and_leaves_a_tenth_each():
    ids = torch.arange(100_000) % 90
    settings = MaskingSettings(mlm_probability=0.5, replacement="bert")
    masked, labels = mask_tokens(ids, torch.arange(1, 100_000), settings, VOCABULARY, generator(0))
    chosen = labels != IGNORE
    shares = [(masked[chosen] == MASK), (masked[chosen] >= 100), (masked[chosen] == ids[chosen])]
    assert [share.float().mean().item() for share in shares] == pytest.approx([0.8, 0.1, 0.1], abs=0.01)
    assert set(masked[chosen][masked[chosen] >= 100].tolist()) == set(range(100, 120))
    assert torch.equal(labels[chosen], ids[chosen])


def test_every_place_is_chosen_as_often_as_any_other():
    ids = torch.arange(11)
    counts = torch.zeros(11)
    for seed in range(2000):
        counts += (
            mask_tokens(ids, torch.arange(1, 11), MaskingSettings(mlm_probability=0.3), VOCABULARY, generator(seed))[1]
            >= 0
        )
    assert counts[0] == 0
    assert counts[1:].sum() == 6000
    assert counts[1:].min() > 520
    assert counts[1:].max() < 680


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_leaves_nothing_to_do_is_refused(share):
    with pytest.raises(ConfigurationError, match="mlm_probability"):
        MaskingSettings(mlm_probability=share)
