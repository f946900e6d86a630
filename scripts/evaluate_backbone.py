"""Measures the built-in backbone on held-out text beside a bigram model, and writes its card.

    python scripts/evaluate_backbone.py --text-dir DATA --run runs/backbone

Bits per byte on wikitext-2's test file: the bits of every token, ends of documents included, over the bytes of the
text. The bigram model has the same tokenizer and may count all of the training text, also what the backbone's steps
did not reach.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from numpy.typing import NDArray
from pretrain_backbone import BLOCK, DOCSTRING_CHARACTERS, encode, read_corpus, sections, shuffled
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from st_llmpool.data import builtin_backbone

STRIDE = BLOCK // 2  # each token is predicted from at least this many before it
WINDOWS = 16  # in one forward
TUNING_SHARE = 20  # one document of so many tunes the bigram model's weights
CARD = Path(__file__).parents[1] / "model_cards/builtin-backbone"

Stream = NDArray[np.int64]


class InterpolatedBigram:
    """p(b | a) = w2 · count(a b) / count(a) + w1 · count(b) / N + w0 / V, weights fitted by EM on other text.

    Args:
        stream: Token ids to count.
        tuning: Token ids that the weights are fitted to.
        vocabulary: Number of token ids, V.
    """

    def __init__(self, stream: Stream, tuning: Stream, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.unigrams = np.bincount(stream, minlength=vocabulary)
        self.contexts = np.bincount(stream[:-1], minlength=vocabulary)
        self.bigrams, self.counts = np.unique(stream[:-1] * vocabulary + stream[1:], return_counts=True)
        self.weights = np.full(3, 1 / 3)
        components = self._components(tuning)
        for _ in range(200):
            shares = components * self.weights
            self.weights = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)

    def bits(self, stream: Stream) -> float:
        """Returns the bits of all tokens but the first."""
        return float(-np.log2(self._components(stream) @ self.weights).sum())

    def _components(self, stream: Stream) -> NDArray[np.float64]:
        """Returns (T - 1, 3): what each part gives to the token that follows. An unseen context is a unigram's."""
        first, second = stream[:-1], stream[1:]
        pairs = first * self.vocabulary + second
        places = np.searchsorted(self.bigrams, pairs).clip(max=len(self.bigrams) - 1)
        found = np.where(self.bigrams[places] == pairs, self.counts[places], 0)
        unigram = self.unigrams[second] / self.unigrams.sum()
        seen = self.contexts[first]
        bigram = np.where(seen > 0, found / np.maximum(seen, 1), unigram)
        return np.stack([bigram, unigram, np.full(len(second), 1 / self.vocabulary)], axis=1)


def language_model_bits(model: LlamaForCausalLM, stream: Stream) -> float:
    """Returns the bits of all tokens but the first, in windows that overlap."""
    tokens = torch.from_numpy(stream)
    window = min(BLOCK + 1, len(tokens))
    windows = tokens.unfold(0, window, STRIDE)
    scored = window - 1 + (len(windows) - 1) * STRIDE
    bits = _window_bits(model, windows[:1], window - 1)
    for begin in track(range(1, len(windows), WINDOWS), "Backbone"):
        bits += _window_bits(model, windows[begin : begin + WINDOWS], STRIDE)
    rest = len(tokens) - 1 - scored
    return bits + (_window_bits(model, tokens[None, -window:], rest) if rest else 0.0)


def _window_bits(model: LlamaForCausalLM, windows: torch.Tensor, last: int) -> float:
    """Returns the bits of the last tokens of each window."""
    with torch.inference_mode():
        logits = model(input_ids=windows[:, :-1]).logits[:, -last:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, -last:].flatten(), reduction="sum")
    return loss.item() / math.log(2)


def plot_loss(log: list[dict[str, float]], tokens_per_step: int, path: Path) -> None:
    """Draws the logged training loss over the tokens seen."""
    rows = [row for row in log if "loss" in row]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["step"] * tokens_per_step / 1e6 for row in rows], [row["loss"] for row in rows], linewidth=1.2)
    axes.set(xlabel="million tokens seen", ylabel="training loss (nats per token)", title="Built-in backbone")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def card_text(
    model: LlamaForCausalLM, history: dict[str, Any], data: dict[str, Any], evaluation: dict[str, Any]
) -> str:
    """Returns the card in Markdown."""
    config = model.config
    losses = [row for row in history["log"] if "loss" in row]
    seen = losses[-1]["step"] * history["batch_size"] * BLOCK
    sources = data["sources"]
    rows = {name: f"{size['documents']:,} | {size['bytes'] / 1e6:.1f} MB" for name, size in sources.items()}
    bits = "\n".join(f"| {name} | {value:.3f} |" for name, value in evaluation["bits_per_byte"].items())
    return f"""---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# Built-in backbone of st-llmpool

A language model small enough to come with a Python package, so that every part of st-llmpool can be tried, tested and
compared without a network: `st_llmpool.data.builtin_backbone()` returns its folder. It is a stand-in that shows that
things work; use a real language model for real embeddings.

| | |
| --- | --- |
| architecture | `{config.model_type}`, causal: RoPE, RMSNorm, grouped-query attention, tied embeddings |
| size | {model.num_parameters():,} parameters; {config.num_hidden_layers} layers, hidden {config.hidden_size}, \
{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads of {config.head_dim} |
| tokenizer | byte-level BPE, {config.vocab_size:,} tokens, trained on the training text; \
`<eos>`, `<pad>` and a spare `<mask>`, no BOS |
| positions | {config.max_position_embeddings:,}; trained on blocks of {BLOCK} |
| stored as | float16, loads as float32 (`"dtype": "float32"` in its config) |

## Held-out text

Bits per byte on {evaluation["held_out"]} ({evaluation["bytes"]:,} bytes, {evaluation["tokens"]:,} tokens); lower is
better. The bigram model (bigram, unigram and uniform probabilities, interpolated) has the same tokenizer, counts
{100 - 100 // TUNING_SHARE} % of all the training text and has its weights fitted to the rest.

| model | bits per byte |
| --- | --- |
{bits}

## Training

{seen:,} tokens in {losses[-1]["step"]:,} steps of {history["batch_size"]} x {BLOCK}, in float32. AdamW; learning rate \
{max(row["learning_rate"] for row in losses):g} after a
warm-up, constant, then along a cosine to zero. Last logged training loss {losses[-1]["loss"]:.2f} nats per token.

![Training loss](loss_curve.png)

The logged values are in `training_log.json`, the figures above in `evaluation.json`.

## Data

| text | documents | size | licence |
| --- | --- | --- | --- |
| paragraphs of SQuAD 1.1 (English Wikipedia), training articles | {rows["squad_text/train"]} | CC BY-SA 4.0 |
| wikitext-2, validation file (English Wikipedia) | {rows["wikitext2/valid"]} | CC BY-SA |
| docstrings of {len(data["distributions"])} Python distributions, the first {DOCSTRING_CHARACTERS} characters of each \
| {rows["docstrings"]} | those of the distributions |

{data["tokens"]:,} tokens in all, seen {seen / data["tokens"]:.2g} times, in random order. Only distributions of the
training split of `docstring_pairs` were read, so its validation and test splits are unseen:

{", ".join(f"{name} {version}" for name, version in data["distributions"].items())}.

## Limits

English only. After {seen / 1e6:.1f} million tokens it knows common words and the form of sentences, and few facts. It
has never seen more than {BLOCK} tokens at a time nor a `<mask>`, is neither aligned nor filtered, and may repeat what
its text says. As an embedding model it does little before it is trained on pairs.

## To make it again

```
python scripts/pretrain_backbone.py train --text-dir DATA --out runs/backbone --steps {losses[-1]["step"]}
python scripts/pretrain_backbone.py export --model runs/backbone/final
python scripts/evaluate_backbone.py --text-dir DATA --run runs/backbone
```

The docstrings are those of the environment that it runs in, so another environment gives a slightly different model.
"""


def main(
    text_dir: Annotated[Path, typer.Option(help="Folder with squad_text and wikitext2.")],
    run: Annotated[Path, typer.Option(help="Folder of the run: history.json, data.json.")],
    model: Annotated[Path | None, typer.Option(help="Model to measure, by default the built-in backbone.")] = None,
    card: Annotated[Path, typer.Option(help="Folder to write the card to.")] = CARD,
) -> None:
    """Measures, then writes README.md, loss_curve.png, training_log.json and evaluation.json to CARD."""
    folder = model or builtin_backbone()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backbone = AutoModelForCausalLM.from_pretrained(folder).eval()
    documents = shuffled(read_corpus(text_dir))
    held_out = sections(pq.read_table(text_dir / "wikitext2/test.parquet")["text"].to_pylist())
    tuning = documents[::TUNING_SHARE]
    del documents[::TUNING_SHARE]
    counted, tuned, test = (encode(tokenizer, texts).numpy() for texts in (documents, tuning, held_out))
    bigram = InterpolatedBigram(counted, tuned, len(tokenizer))
    test = np.concatenate([[tokenizer.eos_token_id], test])
    size = sum(len(text.encode()) for text in held_out)
    evaluation = {
        "held_out": "wikitext2/test",
        "bytes": size,
        "tokens": len(test) - 1,
        "bits_per_byte": {
            "built-in backbone": language_model_bits(backbone, test) / size,
            "interpolated bigram": bigram.bits(test) / size,
            "uniform over the vocabulary": (len(test) - 1) * math.log2(len(tokenizer)) / size,
        },
        "bigram_weights": dict(zip(("bigram", "unigram", "uniform"), bigram.weights.round(4).tolist(), strict=True)),
    }
    history, data = (json.loads((run / name).read_text()) for name in ("history.json", "data.json"))
    card.mkdir(parents=True, exist_ok=True)
    (card / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
    (card / "training_log.json").write_text(json.dumps(history, indent=1) + "\n")
    plot_loss(history["log"], history["batch_size"] * BLOCK, card / "loss_curve.png")
    (card / "README.md").write_text(card_text(backbone, history, data, evaluation))
    typer.echo(json.dumps(evaluation["bits_per_byte"], indent=1))


if __name__ == "__main__":
    typer.run(main)
