"""Pretrains the built-in backbone: a small Llama-type causal LM on Wikipedia paragraphs and docstrings.

    python scripts/pretrain_backbone.py train --text-dir DATA --out runs/backbone
    python scripts/pretrain_backbone.py export --model runs/backbone/final
    python scripts/evaluate_backbone.py --text-dir DATA --run runs/backbone

`DATA` holds `squad_text/train.parquet` and `wikitext2/valid.parquet`, each with a column `text`. A run that was stopped
goes on from its last checkpoint when the same command is given again; another number of steps stretches what is left
of it. `export` writes the half-precision copy that the package ships. 2,200 steps take 45 minutes on one CPU core.
"""

from __future__ import annotations

import json
import random
import shutil
from itertools import groupby
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from st_llmpool.data import docstrings, installed_sources

VOCABULARY = 8192
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>"}
MAX_POSITIONS = 1024
BLOCK = 256
WARMUP_STEPS = 100
DECAY = 0.4  # share of the steps over which the learning rate falls to zero, along a cosine
DOCSTRING_CHARACTERS = 500  # the prose of a docstring is at its start, tables of parameters follow
BUILTIN = Path(__file__).parents[1] / "src/st_llmpool/data/builtin"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def read_corpus(text_dir: Path) -> dict[str, list[str]]:
    """Returns the training documents of each source; docstrings are those of the training packages only."""
    return {
        "squad_text/train": pq.read_table(text_dir / "squad_text/train.parquet")["text"].to_pylist(),
        "wikitext2/valid": sections(pq.read_table(text_dir / "wikitext2/valid.parquet")["text"].to_pylist()),
        "docstrings": [row.text[:DOCSTRING_CHARACTERS] for row in docstrings("train")],
    }


def sections(lines: list[str]) -> list[str]:
    """Joins wikitext lines to documents; each starts with its headings."""
    documents: list[str] = []
    for is_heading, group in groupby(lines, key=lambda line: line.strip().startswith("= ")):
        if is_heading or not documents:
            documents.append("".join(group))
        else:
            documents[-1] += "".join(group)
    return documents


def shuffled(corpus: dict[str, list[str]]) -> list[str]:
    """Returns all documents in an order that depends on nothing but the text."""
    documents = [document for source in corpus.values() for document in source]
    random.Random(0).shuffle(documents)
    return documents


def describe(corpus: dict[str, list[str]], tokens: int) -> dict[str, object]:
    """Returns what the card says of the data: sizes, and which distributions the docstrings come from."""
    sizes = {
        name: {"documents": len(rows), "bytes": sum(len(row.encode()) for row in rows)} for name, rows in corpus.items()
    }
    read = {row.distribution for row in docstrings("train")}
    distributions = {tree.distribution: tree.version for tree in installed_sources() if tree.distribution in read}
    return {"sources": sizes, "tokens": tokens, "distributions": distributions}


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE: any text can be encoded and decoded without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL_TOKENS.values()), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns the untrained backbone: 6 layers, 6 query and 2 key-value heads of 32, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """Returns the token ids of all documents in a row, each followed by EOS."""
    rows = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])


def collate(rows: list[tuple[Tensor]]) -> dict[str, Tensor]:
    """Makes the batch of a causal LM; the model shifts the labels itself."""
    ids = torch.stack([row[0] for row in rows])
    return {"input_ids": ids, "labels": ids}


def optimizer(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


@app.command()
def train(
    text_dir: Annotated[Path, typer.Option(help="Folder with squad_text and wikitext2.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; goes on with its last checkpoint.")],
    steps: int = 2200,
    batch_size: int = 8,
    learning_rate: float = 3e-3,
    save_steps: int = 200,
    threads: Annotated[int, typer.Option(help="CPU threads, 0 for torch's default.")] = 0,
) -> None:
    """Trains tokenizer and model, and writes them to OUT/final."""
    if threads:
        torch.set_num_threads(threads)
    set_seed(0)
    corpus = read_corpus(text_dir)
    documents = shuffled(corpus)
    if not (out / "tokenizer").is_dir():
        train_tokenizer(documents).save_pretrained(out / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    stream = encode(tokenizer, documents)
    blocks = stream[: len(stream) // BLOCK * BLOCK].view(-1, BLOCK)
    (out / "data.json").write_text(json.dumps(describe(corpus, blocks.numel()), indent=1))
    typer.echo(f"{len(documents):,} documents, {blocks.numel():,} tokens, {steps * batch_size * BLOCK:,} to be seen")
    model = new_model(tokenizer)
    adamw = optimizer(model, learning_rate)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": int(DECAY * steps)},
            warmup_steps=min(WARMUP_STEPS, steps // 10),
            max_grad_norm=1.0,
            logging_steps=20,
            save_steps=save_steps,
            save_total_limit=2,
            report_to="none",
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=TensorDataset(blocks),
        data_collator=collate,
        optimizers=(adamw, None),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out))
    trainer.save_model(str(out / "final"))
    (out / "history.json").write_text(
        json.dumps({"batch_size": batch_size, "log": trainer.state.log_history}, indent=1)
    )


@app.command()
def export(
    model: Annotated[Path, typer.Option(help="Folder of a trained model, as OUT/final.")],
    to: Annotated[Path, typer.Option(help="Folder to write.")] = BUILTIN,
) -> None:
    """Writes the copy that the package ships: float16 weights that load as float32."""
    shutil.rmtree(to, ignore_errors=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(to)
    AutoModelForCausalLM.from_pretrained(model).half().save_pretrained(to)
    change_json(to / "config.json", dtype="float32", use_cache=True)
    (to / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    # The class name that all versions know, and no trace of where the tokenizer was loaded from.
    change_json(
        to / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        backend=None,
        is_local=None,
        local_files_only=None,
    )


def change_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file; None removes one."""
    merged = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}, indent=2) + "\n")


if __name__ == "__main__":
    app()
