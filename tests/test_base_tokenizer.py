"""Every text ends in EOS, truncated or not, and the saved tokenizer says so by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from st_llmpool.base_tokenizer import append_eos, ensure_pad_token
from st_llmpool.modules.errors import ConfigurationError
from tests.conftest import tiny_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog"


def with_post_processor(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that adds nothing, BOS, or EOS by itself, in the ways that real ones do."""
    tokenizer = tiny_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    bos = processors.TemplateProcessing("<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=special)
    eos = processors.TemplateProcessing("$A <eos>", pair="$A <eos> $B:1 <eos>:1", special_tokens=special)
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.backend_tokenizer.post_processor = {
        "none": None,
        "byte_level": byte_level,
        "bos": bos,
        "llama3": processors.Sequence([byte_level, bos]),
        "eos": eos,
    }[kind]
    return tokenizer


KINDS = ["none", "byte_level", "bos", "llama3", "eos"]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=20)
@given(text=st.text(max_size=30), limit=st.integers(3, 12))
def test_every_text_ends_in_one_added_eos_after_truncation_too(kind, text, limit):
    tokenizer = with_post_processor(kind)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = [tokenizer.bos_token_id] if kind in ("bos", "llama3") else []
    append_eos(tokenizer)
    assert tokenizer(text)["input_ids"] == [*first, *plain, tokenizer.eos_token_id]
    room = limit - len(first) - 1
    cut = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    assert cut == [*first, *plain[:room], tokenizer.eos_token_id]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain


@pytest.mark.parametrize("kind", KINDS)
def test_appending_twice_appends_one_eos(kind):
    tokenizer = with_post_processor(kind)
    append_eos(tokenizer)
    once = tokenizer(WORDS)["input_ids"]
    append_eos(tokenizer)
    assert tokenizer(WORDS)["input_ids"] == once


@pytest.mark.parametrize("kind", ["none", "bos", "llama3"])
def test_both_texts_of_a_pair_end_in_eos(kind):
    tokenizer = with_post_processor(kind)
    append_eos(tokenizer)
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the fox", "dog"))
    bos = [tokenizer.bos_token_id] if kind != "none" else []
    assert tokenizer("the fox", "dog")["input_ids"] == [
        *bos,
        *first,
        tokenizer.eos_token_id,
        *second,
        tokenizer.eos_token_id,
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_real_token_of_a_padded_batch_is_eos(side):
    tokenizer = with_post_processor("llama3")
    append_eos(tokenizer)
    tokenizer.padding_side = side
    batch = tokenizer([WORDS, "fox", ""], padding=True)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        real = [token for token, is_real in zip(ids, mask, strict=True) if is_real]
        assert real[0] == tokenizer.bos_token_id
        assert real[-1] == tokenizer.eos_token_id


# --- endings of the tokenizer's own ----------------------------------------------------------------------------------

OWN_ENDINGS = {
    "another name": ["<|endoftext|>"],  # Qwen3-Embedding: beside an eos_token <|im_end|>
    "bert": ["[SEP]"],
    "t5": ["<eos>"],
    "two": ["[SEP]", "<|endoftext|>"],
}


def with_own_ending(ending: list[str], *, eos: bool = True) -> PreTrainedTokenizerFast:
    names = {"eos_token": "<eos>"} if eos else {}
    tokenizer = tiny_tokenizer(cls_token="[CLS]", sep_token="[SEP]", pad_token="<|endoftext|>", **names)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", *ending)]
    single = " ".join(["[CLS]", "$A", *ending])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("eos", [True, False], ids=["eos token", "no eos token"])
@pytest.mark.parametrize("kind", OWN_ENDINGS)
def test_a_text_that_ends_in_special_tokens_already_gets_no_second_ending(kind, eos):
    if kind == "t5" and not eos:
        pytest.skip("ends in the EOS token itself")
    tokenizer = with_own_ending(OWN_ENDINGS[kind], eos=eos)
    ending = tokenizer.convert_tokens_to_ids(OWN_ENDINGS[kind])
    plain = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    append_eos(tokenizer)
    assert tokenizer(WORDS)["input_ids"] == [tokenizer.cls_token_id, *plain, *ending]
    assert tokenizer("")["input_ids"] == [tokenizer.cls_token_id, *ending]
    cut = tokenizer(WORDS, truncation=True, max_length=6)["input_ids"]
    assert cut == [tokenizer.cls_token_id, *plain[: 5 - len(ending)], *ending]


def test_an_eos_token_that_is_only_put_in_front_is_no_ending():
    tokenizer = tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")  # as OPT's
    special = [("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<eos> $A", special_tokens=special)
    append_eos(tokenizer)
    assert tokenizer("fox")["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_probing_is_left_in_the_tokenizer(kind):
    tokenizer = with_post_processor(kind)
    tokenizer.backend_tokenizer.enable_truncation(77)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    before = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    append_eos(tokenizer)
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == before


# --- saved tokenizers -----------------------------------------------------------------------------------------------


def trained_bpe(pre_tokenizer: Any, alphabet: list[str]) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    return json.loads(tokenizer.to_str())["model"]


def of_class(name: str, **settings: Any) -> PreTrainedTokenizerBase:
    """A tokenizer of one of the classes that transformers rebuilds from vocabulary and merges at load."""
    if name in ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer"):
        model = trained_bpe(pre_tokenizers.Metaspace(), [])
    else:
        model = trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair) for pair in model["merges"]]
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return getattr(transformers, name)(vocab=model["vocab"], merges=merges, **special, **settings)


def save(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, folder: Path, **settings: Any) -> None:
    """Saves as a base on the Hub looks: the tokenizer beside a model's config, with the flags in its config."""
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("LlamaTokenizer", LlamaConfig()),
        ("LlamaTokenizerFast", LlamaConfig()),
        ("CodeLlamaTokenizer", LlamaConfig()),
        ("Qwen2Tokenizer", Qwen2Config()),
        ("Qwen2Tokenizer", Qwen3Config()),
        ("GPT2Tokenizer", GPT2Config()),
        ("GemmaTokenizer", GemmaConfig()),
        ("GPTNeoXTokenizer", GPTNeoXConfig()),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True, "add_eos_token": False}, {"add_bos_token": False}], ids=str
)
def test_a_saved_tokenizer_of_any_class_keeps_eos_when_transformers_loads_it(name, config, flags, tmp_path):
    save(of_class(name), config, tmp_path / "base", **flags)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    before = tokenizer("the fox")["input_ids"]
    append_eos(tokenizer)
    assert tokenizer("the fox")["input_ids"] == [*before, tokenizer.eos_token_id]
    for generation in ("first", "second"):
        save(tokenizer, config, tmp_path / generation)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / generation)
        assert tokenizer("the fox")["input_ids"] == [*before, tokenizer.eos_token_id], generation
        assert tokenizer("the quick fox", truncation=True, max_length=4)["input_ids"][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_generic_tokenizer_keeps_eos_when_transformers_loads_it(kind, tmp_path):
    tokenizer = with_post_processor(kind)
    append_eos(tokenizer)
    save(tokenizer, LlamaConfig(), tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", "fox", WORDS):
        assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]


# --- what cannot work -----------------------------------------------------------------------------------------------


def test_a_tokenizer_without_eos_is_refused_with_the_way_out():
    with pytest.raises(ConfigurationError, match=r"no EOS token.*set one.*add_eos_token=False"):
        append_eos(tiny_tokenizer(pad_token="<pad>"))


class CharacterTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, as a few old models have: there is no post-processor to change."""

    def __init__(self, **special: Any) -> None:
        self.characters = {"<eos>": 0, **{chr(code): code for code in range(1, 128)}}
        super().__init__(**special)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def get_vocab(self) -> dict[str, int]:
        return self.characters

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.characters[token]

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.characters)[index]


def test_a_tokenizer_that_cannot_be_changed_is_refused_with_the_way_out():
    with pytest.raises(
        ConfigurationError, match=r"CharacterTokenizer cannot be made to end texts in '<eos>'.*fast tokenizer"
    ):
        append_eos(CharacterTokenizer(eos_token="<eos>"))


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special_tokens", "expected"),
    [
        ({"eos_token": "<eos>", "pad_token": "<pad>"}, "<pad>"),
        ({"eos_token": "<eos>", "unk_token": "<unk>"}, "<unk>"),
        ({"eos_token": "<eos>"}, "<eos>"),
    ],
)
def test_padding_has_a_token(special_tokens, expected):
    tokenizer = tiny_tokenizer(**special_tokens)
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == expected
    assert tokenizer(["fox", WORDS], padding=True)["attention_mask"][0].count(0) > 0


@pytest.mark.parametrize("spare", ["<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<unused3>"])
def test_a_spare_special_token_is_padding_before_unk_and_eos(spare):
    tokenizer = tiny_tokenizer(eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<other>", spare]})
    size = len(tokenizer)
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == spare
    assert len(tokenizer) == size  # a new token would need a new row of embeddings


def test_a_tokenizer_without_any_special_token_is_refused():
    with pytest.raises(ConfigurationError, match=r"neither a padding token nor a special token.*tokenizer.pad_token"):
        ensure_pad_token(tiny_tokenizer())
