"""Pieces of texts, and examples that depend on seed and place alone."""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from st_llmpool.base_tokenizer import append_eos
from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training.mntp.masked_texts import (
    IGNORE,
    MaskedTexts,
    Vocabulary,
    collate,
    mask_tokens,
    maskable,
    tokenize,
)
from st_llmpool.training.recipe import MaskingSettings
from tests.conftest import tiny_tokenizer

VOCABULARY = Vocabulary(mask=0, ordinary=torch.arange(5, 50))
MASK = 99
MASKING_VOCABULARY = Vocabulary(mask=MASK, ordinary=torch.arange(100, 120))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")


def rows(pieces: Dataset) -> list[list[int]]:
    return [list(ids) for ids in pieces["input_ids"][:]]


@pytest.mark.parametrize("with_eos", [False, True])
def test_texts_are_cut_or_truncated_and_never_put_together(tokenizer, with_eos):
    tokenizer = tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")
    if with_eos:
        append_eos(tokenizer)
    texts = ["the quick brown fox jumps over the lazy dog", "a dog", "x"]
    end = [tokenizer.eos_token_id] if with_eos else []
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    size = 4 - len(end)
    cut = [ids[start : start + size] + end for ids in tokens for start in range(0, len(ids), size)]
    expected = [piece for piece in cut if len(piece) - len(end) > 1]  # a lone token has no predecessor
    dataset = Dataset.from_dict({"text": texts})
    assert rows(tokenize(dataset, tokenizer, max_length=4, long_texts="cut")) == expected
    first = [ids[:size] + end for ids in tokens[:2]]
    truncated = tokenize(dataset, tokenizer, max_length=4, long_texts="truncate")
    assert rows(truncated) == first
    assert truncated["special"][:] == [[0] * (len(piece) - len(end)) + [1] * len(end) for piece in first]


def test_a_tokenizer_without_a_fast_backend_loses_nothing_of_a_long_text():
    tokenizer = ByT5Tokenizer()  # a token a byte, EOS at the end
    assert not tokenizer.is_fast
    texts = ["the quick brown fox", "a dog", "of"]
    pieces = rows(tokenize(Dataset.from_dict({"text": texts}), tokenizer, max_length=6, long_texts="cut"))
    assert all(len(piece) <= 6 and piece[-1] == tokenizer.eos_token_id for piece in pieces)
    cut = [text[start : start + 5] for text in texts for start in range(0, len(text), 5)]
    assert [tokenizer.decode(piece[:-1]) for piece in pieces] == cut
    whole = tokenize(Dataset.from_dict({"text": texts}), tokenizer, max_length=40, long_texts="cut")
    assert rows(whole) == [tokenizer(text)["input_ids"] for text in texts]
    assert whole["special"][:] == [[0] * len(text) + [1] for text in texts]
    truncated = tokenize(Dataset.from_dict({"text": texts}), tokenizer, max_length=6, long_texts="truncate")
    assert rows(truncated) == [tokenizer(text[:5])["input_ids"] for text in texts]


@pytest.mark.parametrize("long_texts", ["cut", "truncate"])
def test_special_tokens_that_a_text_spells_out_are_not_predicted(long_texts):
    tokenizer = tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    texts = ["a<pad> dog<|im_start|>x", "a<eos>"]
    pieces = tokenize(Dataset.from_dict({"text": texts}), tokenizer, max_length=20, long_texts=long_texts)
    assert len(pieces) == 1  # of the other one nothing is left to predict
    ids, special = pieces["input_ids"][0], pieces["special"][0]
    marked = [token for token, flag in zip(ids, special, strict=True) if flag]
    assert marked == tokenizer.convert_tokens_to_ids(["<pad>", "<|im_start|>"])
    examples = MaskedTexts(pieces, MaskingSettings(mlm_probability=0.9), VOCABULARY, length=20)
    predicted = {label for place in range(20) for label in examples[place]["labels"].tolist()}
    assert not predicted & set(marked)
    assert len(predicted) > 2


def test_an_example_depends_on_seed_and_place_alone():
    pieces = Dataset.from_dict(
        {"input_ids": [list(range(5 * i + 5, 5 * i + 10)) for i in range(7)], "special": [[0] * 5] * 7}
    )

    def make(seed: int) -> MaskedTexts:
        return MaskedTexts(pieces, MaskingSettings(mlm_probability=0.4), VOCABULARY, length=21, seed=seed)

    forwards, backwards, other = make(3), make(3), make(4)
    one = [forwards[place] for place in range(21)]
    two = [backwards[place] for place in reversed(range(21))][::-1]
    three = [other[place] for place in range(21)]
    for first, second in zip(one, two, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first["labels"], third["labels"]) for first, third in zip(one, three, strict=True))

    def whole(example) -> tuple[int, ...]:
        labels = example["labels"]
        return tuple(torch.where(labels == IGNORE, example["input_ids"], labels).tolist())

    visits = [Counter(whole(example) for example in one[start : start + 7]) for start in (0, 7, 14)]
    assert visits == [Counter(tuple(ids) for ids in rows(pieces))] * 3  # every piece once in a pass
    assert [whole(example) for example in one[:7]] != [whole(example) for example in one[7:14]]


@pytest.mark.parametrize(("side", "expected"), [("right", [1, 1, 0]), ("left", [0, 1, 1])])
def test_padding_is_masked_and_not_predicted(side, expected):
    short = {"input_ids": torch.tensor([7, 8]), "labels": torch.tensor([IGNORE, 9])}
    long = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([IGNORE, 9, IGNORE])}
    batch = collate([short, long], padding_side=side)
    assert batch["attention_mask"].tolist() == [expected, [1, 1, 1]]
    assert (batch["labels"] != IGNORE).sum() == 2
    assert batch["labels"][0, batch["attention_mask"][0] == 1].tolist() == [IGNORE, 9]


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
    masked, labels = mask_tokens(
        ids, places, MaskingSettings(mlm_probability=share), MASKING_VOCABULARY, generator(seed)
    )
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
    masked, labels = mask_tokens(ids, torch.arange(1, 100_000), settings, MASKING_VOCABULARY, generator(0))
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
            mask_tokens(
                ids, torch.arange(1, 11), MaskingSettings(mlm_probability=0.3), MASKING_VOCABULARY, generator(seed)
            )[1]
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
