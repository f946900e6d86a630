"""What the tests share: small language models that are made on the spot, so that no test needs a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

TINY_CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def tiny_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges; `special_tokens` such as ``eos_token="<eos>"`` come first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special_tokens.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special_tokens)


def save_tiny_llm(
    folder: Path, config: PreTrainedConfig = TINY_CONFIG, tokenizer: PreTrainedTokenizerFast | None = None
) -> str:
    """Saves a randomly initialised model of `config` with a tokenizer that has EOS and padding, no BOS."""
    tokenizer = tokenizer or tiny_tokenizer(eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the one test that takes minutes first: at the end, the other workers would wait for it."""
    items.sort(key=lambda item: "test_sharing_table" not in item.nodeid)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a four-layer Llama, 32 wide. Read only: tests share it."""
    return save_tiny_llm(tmp_path_factory.mktemp("tiny_llm"))


@pytest.fixture
def make_llm(tmp_path: Path) -> Callable[..., str]:
    """`make_llm(config, tokenizer)` saves a model of any architecture and returns its folder."""

    def make(config: PreTrainedConfig = TINY_CONFIG, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
        return save_tiny_llm(tmp_path / f"{config.model_type}-{len(list(tmp_path.iterdir()))}", config, tokenizer)

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The text sets that lie beside a checkout in the project's own workplace; elsewhere the test skips."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the text sets in {folder}, which this checkout does not have")
    return folder
