"""What the tests share: small language models that are made on the spot, so that no test needs a network."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from st_llmpool.training import Recipe

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "cats", "sleep", "near", "tall", "green", "trees"]

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


def unseal(folder: Path) -> None:
    """Leave `folder` as a version without seals would have saved it."""
    (folder / "st_llmpool.json").unlink()
    file = folder / "config_sentence_transformers.json"
    config = json.loads(file.read_text())
    del config["sealed"]
    file.write_text(json.dumps(config))


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


class _Warnings(logging.Handler):
    """Collects what the package logs as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "The pooling has no effect" not in record.msg:  # true of every run of a few steps
            self.lines.append(f"{record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def a_clean_run_logs_no_warning(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in which the package warns, unless it reads the log (`caplog`) or is marked `logs_warning`."""
    handler, logger = _Warnings(), logging.getLogger("st_llmpool")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if "caplog" not in request.fixturenames and request.node.get_closest_marker("logs_warning") is None:
        assert not handler.lines, "a clean run logs no warning; ask for it with caplog or @pytest.mark.logs_warning"


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


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs: on the CPU, and once more on a GPU by `pytest -m gpu`."""
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The text sets that lie beside a checkout in the project's own workplace; elsewhere the test skips."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_data2() -> Path:
    """As `shared_data`: the sets of the suite `open`."""
    return _shared("data2")


def _shared(name: str) -> Path:
    folder = Path(__file__).resolve().parents[2] / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"needs the text sets in {folder}, which this checkout does not have")
    return folder


@pytest.fixture(autouse=True, scope="session")
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the code of loaded models apart from that of earlier runs, whose commits may have the same names."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps the Arrow copies that `datasets` makes of files out of the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets_cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def write_pairs() -> Callable[..., str]:
    """`write_pairs(path, rows, seed)` writes rows of query, positive and negative, no text twice."""
    return _write_pairs


def _write_pairs(path: Path, rows: int, seed: int = 0) -> str:
    rng = random.Random(seed)

    def text(length: int, mark: str) -> str:
        return " ".join([mark, *rng.choices(WORDS, k=length)])

    lines = [
        json.dumps({"query": text(4, f"q{row}"), "positive": text(8, f"p{row}"), "negative": text(6, f"n{row}")})
        for row in range(rows)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSONL file of 12 rows."""
    return _write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows=12)


@pytest.fixture(scope="session")
def make_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`make_lm(tie_word_embeddings=True)` saves a two-layer Llama with its head and returns its folder."""

    def make(special_tokens: dict[str, str] | None = None, **changes: Any) -> str:
        folder = str(tmp_path_factory.mktemp("tiny_lm"))
        tokenizer = tiny_tokenizer(**(special_tokens or {"eos_token": "<eos>", "pad_token": "<pad>"}))
        tokenizer.save_pretrained(folder)
        values = TINY_CONFIG.to_dict() | {"num_hidden_layers": 2, "vocab_size": len(tokenizer)} | changes
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(LlamaConfig(**values)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_lm(make_lm: Callable[..., str]) -> str:
    """Folder of a language model with its head. Read only: tests share it."""
    return make_lm(tie_word_embeddings=True)


@pytest.fixture(scope="session")
def words_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text file of 40 lines."""
    rng = random.Random(5)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 14))) for _ in range(40)]
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refusal("train", "recipe.yaml")` is what a command that fails prints, once it has ended with status 1."""
    from st_llmpool.cli import main

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["st-llmpool", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        return " ".join(capsys.readouterr().err.split())

    return run


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_llm: str, pairs: str) -> Callable[..., Recipe]:
    """`make_recipe({"training": {"max_steps": 3}}, "seed=1")` changes a recipe that trains in seconds."""
    from st_llmpool.training import Recipe
    from st_llmpool.utils.settings import merge

    def make(changes: dict[str, Any] | None = None, *overrides: str) -> Recipe:
        values = {
            "output_dir": str(tmp_path / "run"),
            "model": {"base": tiny_llm, "max_seq_length": 24},
            "data": [{"source": pairs}],
            "training": {"max_steps": 2, "batch_size": 4, "logging_steps": 1, "warmup_steps": 0},
        }
        return Recipe.from_dict(merge(values, changes or {}), overrides)

    return make
