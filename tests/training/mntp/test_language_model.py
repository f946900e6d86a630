"""The mask token is one that has no other use, or a new one that changes nothing else."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from st_llmpool.modules.errors import ConfigurationError
from st_llmpool.training.mntp.language_model import choose_mask_token, ordinary_tokens, use_mask_token
from tests.conftest import tiny_tokenizer


@pytest.mark.parametrize(
    ("special", "extra", "expected"),
    [
        ({"eos_token": "<eos>", "mask_token": "[MASK]", "pad_token": "<pad>"}, [], "[MASK]"),
        (
            {"eos_token": "<eos>", "pad_token": "<pad>"},
            ["<|reserved_special_token_3|>"],
            "<|reserved_special_token_3|>",
        ),
        ({"eos_token": "<eos>", "pad_token": "<|endoftext|>"}, ["<|im_start|>"], "<mask>"),  # Qwen's separator
        ({"eos_token": "<eos>", "pad_token": "<eos>"}, [], "<mask>"),
        ({"eos_token": "<eos>"}, [], "<mask>"),
        ({"eos_token": "<eos>", "pad_token": "<reserved_0>"}, ["<reserved_1>"], "<reserved_1>"),
        ({"eos_token": "<eos>", "pad_token": "<reserved_0>"}, [], "<mask>"),
    ],
)
def test_the_token_that_is_chosen(special, extra, expected):
    tokenizer = tiny_tokenizer(**special)
    tokenizer.add_tokens(extra, special_tokens=True)
    assert choose_mask_token(tokenizer) == expected
    assert choose_mask_token(tokenizer, "<|im_start|>") == "<|im_start|>"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [0, 3])
def test_a_new_token_gets_mean_embeddings_and_leaves_all_else(make_lm, tied, spare_rows, tmp_path):
    base = make_lm({"eos_token": "<eos>"}, tie_word_embeddings=tied)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    size = len(tokenizer)
    if spare_rows:
        model.resize_token_embeddings(size + spare_rows)
    before = model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()
    index = use_mask_token(tokenizer, model, "<mask>")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)

    after = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert index == tokenizer.mask_token_id == size
    assert model.config.vocab_size == len(after[0]) == size + max(1, spare_rows)
    assert (after[0] is after[1]) is tied
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:size], old[:size])
        torch.testing.assert_close(new[size], old[:size].double().mean(dim=0).float())


def test_a_token_that_is_there_adds_nothing(tiny_lm):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_lm), AutoModelForCausalLM.from_pretrained(tiny_lm)
    before = model.get_input_embeddings().weight.detach().clone()
    assert use_mask_token(tokenizer, model, "<pad>") == tokenizer.pad_token_id == tokenizer.mask_token_id
    assert torch.equal(model.get_input_embeddings().weight, before)
    ordinary = set(ordinary_tokens(tokenizer).tolist())
    assert ordinary == set(range(len(tokenizer))) - {tokenizer.pad_token_id, tokenizer.eos_token_id}


def with_gaps(*ids: int, eos: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer with one word to each of `ids`."""
    words = {"<eos>": eos} | {f"word{index}": index for index in ids}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), eos_token="<eos>")


def model_of(rows: int):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=rows, tie_word_embeddings=True, **sizes))


@pytest.mark.parametrize("rows", [10, 12])
def test_a_tokenizer_that_leaves_ids_out_gets_a_row_that_nothing_else_has(rows, tmp_path):
    tokenizer, model = with_gaps(1, 2, 3, 9), model_of(rows)
    before = model.get_input_embeddings().weight.detach().clone()
    index = use_mask_token(tokenizer, model, "<mask>")
    after = model.get_input_embeddings().weight
    used = [0, 1, 2, 3, 9]
    assert index == tokenizer.mask_token_id
    assert index not in used
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id == index
    assert torch.equal(after[used], before[used])
    assert len(after) == max(len(before), index + 1)
    torch.testing.assert_close(after[index], before[used].double().mean(dim=0).float())
    assert ordinary_tokens(tokenizer).tolist() == [1, 2, 3, 9]


@pytest.mark.parametrize(
    ("ids", "eos"),
    [
        ((5, 6, 7, 8), 0),  # the tokenizers library counts five tokens, and takes 5 for the next
        ((0, 1, 2, 3), 9),  # here it takes 10, and 5 when it loads what it saved
    ],
)
def test_a_new_token_without_a_lasting_id_of_its_own_is_refused(ids, eos):
    tokenizer = with_gaps(*ids, eos=eos)
    with pytest.raises(ConfigurationError, match=r"'<mask>' would get that of another token.*masking\.token"):
        use_mask_token(tokenizer, model_of(rows=10), "<mask>")
    tokenizer = with_gaps(*ids, eos=eos)
    assert use_mask_token(tokenizer, model_of(rows=10), f"word{ids[2]}") == ids[2]


def test_the_token_of_a_saved_result_is_found_again(tiny_lm, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_lm), AutoModelForCausalLM.from_pretrained(tiny_lm)
    index = use_mask_token(tokenizer, model, choose_mask_token(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    before = model.get_input_embeddings().weight.detach().clone()
    assert use_mask_token(again, model, choose_mask_token(again)) == index
    assert torch.equal(model.get_input_embeddings().weight, before)
