"""Texts laid into batches, for the tests of poolings over tokens and of the backbone's fast paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from st_llmpool.fast_inference import FastInference, optimize_inference


def embed(pooling: nn.Module, **features: Tensor) -> Tensor:
    return pooling(features)["sentence_embedding"]


def padded(texts: list[Tensor], left: list[int], width: int) -> dict[str, Tensor]:
    """Lays each text into a row of junk, `left` places from its start."""
    tokens, mask = torch.full((len(texts), width, texts[0].shape[1]), 1e4), torch.zeros(len(texts), width).long()
    for row, (text, start) in enumerate(zip(texts, left, strict=True)):
        tokens[row, start : start + len(text)], mask[row, start : start + len(text)] = text, 1
    return {"token_embeddings": tokens, "attention_mask": mask}


def flat(texts: list[Tensor]) -> dict[str, Tensor]:
    """Lays the texts one after the other, without padding."""
    offsets = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0).int()
    return {"token_embeddings": torch.cat(texts)[None], "cu_seq_lens_q": offsets}


def id_batch(
    lengths: list[int], *, shared: int = 0, side: str = "right", extra: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    """Random ids of the tiny tokenizer; all texts start with the same `shared` ones; `extra` columns of padding."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(2, 250, (shared,), generator=generator)
    width = max(lengths) + extra
    ids, mask = torch.ones(len(lengths), width).long(), torch.zeros(len(lengths), width).long()
    for row, length in enumerate(lengths):
        text = torch.randint(2, 250, (length,), generator=generator)
        text[:shared] = start[:length]
        if length > shared:
            text[shared] = 2 + row  # so that no more than `shared` tokens are shared
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def computed_tokens(backbone: Any) -> Iterator[list[tuple[int, int]]]:
    """Yields a list to which every forward of the backbone adds the shape of its ids."""
    shapes: list[tuple[int, int]] = []

    def note(embedding: nn.Module, args: tuple[Any, ...]) -> None:
        shapes.append(tuple(args[0].shape))

    hook = backbone.model.get_input_embeddings().register_forward_pre_hook(note)
    try:
        yield shapes
    finally:
        hook.remove()


def plain(backbone: Any, features: dict[str, Any]) -> dict[str, Any]:
    """Runs the backbone without any fast path."""
    runner, backbone.batch_runner = backbone.batch_runner, None
    try:
        with torch.no_grad(), computed_tokens(backbone) as shapes:
            outputs = backbone(features)
        assert shapes == [tuple(features["input_ids"].shape)]
        return outputs
    finally:
        backbone.batch_runner = runner


def switch_on(backbone: Any, *ways: str) -> FastInference:
    """Optimises the backbone, checks that `ways` are used, and leaves out the others."""
    found = optimize_inference(backbone)
    assert all(map(found.uses, ways)), found
    others = {"shared start", "packing", "length groups"} - set(ways)
    backbone.batch_runner = dataclasses.replace(found, reasons=dict.fromkeys(others, "not in this test"))
    return found


def assert_same(outputs: dict[str, Any], expected: dict[str, Any], atol: float = 1e-5) -> None:
    """Compares what poolings read; what stands in padding is nobody's."""
    assert outputs.keys() == expected.keys()
    assert torch.equal(outputs["attention_mask"], expected["attention_mask"])
    for name in ("readout", "layer_summaries"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=atol)
    kept = expected["attention_mask"].bool()
    tokens, others = (part["token_embeddings"] for part in (outputs, expected))
    assert (tokens.shape, tokens.dtype) == (others.shape, others.dtype)
    torch.testing.assert_close(tokens[kept], others[kept], rtol=0, atol=atol)
