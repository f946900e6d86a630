"""Vectors in 16 bits stay close to float32's, and sentence-transformers' int8 and binary output are they, rounded."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from sentence_transformers.quantization import quantize_embeddings

from st_llmpool import DESIGNS, build_embedder
from st_llmpool.data import builtin_backbone

#: How far from 1 the cosine of a vector to its float32 self may lie; README has it.
TOLERANCE = {torch.float16: 1e-5, torch.bfloat16: 1e-3}


@pytest.fixture(scope="module")
def texts():
    return [inspect.getdoc(getattr(str, name)) for name in dir(str) if not name.startswith("_")]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("design", ["1", "2", "3", "4", "5", "mean-bidirectional"])
def test_vectors_in_16_bits_are_close_to_those_in_32(design, dtype, texts):
    arguments = {**DESIGNS[design].as_kwargs(), "verify": False, "device": "cpu"}
    torch.manual_seed(0)
    model = build_embedder(builtin_backbone(), **arguments)
    for parameter in model[1].parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # an untrained pooling adds nothing to the readout
    expected = model.encode(texts, convert_to_tensor=True)
    vectors = model.to(dtype).encode(texts, convert_to_tensor=True).float()
    assert (1 - torch.cosine_similarity(vectors, expected)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_int8_and_binary_vectors_are_the_whole_ones_rounded(precision, texts):
    model = build_embedder(builtin_backbone(), device="cpu")
    model.encode(texts)  # the first batch is run the plain way too, which rounds otherwise
    whole = model.encode(texts)
    small = model.encode(texts, precision=precision)
    assert np.array_equal(small, quantize_embeddings(whole, precision))
    is_binary = "binary" in precision
    assert small.shape == (len(texts), model.get_embedding_dimension() // (8 if is_binary else 1))
    if is_binary:
        packed = small if precision == "ubinary" else (small.astype(int) + 128).astype(np.uint8)
        assert np.array_equal(np.unpackbits(packed, axis=1).astype(bool), whole > 0)
    else:
        # sentence-transformers cuts each dimension's range over the texts into 255 steps.
        lowest, step = whole.min(axis=0), np.ptp(whole, axis=0) / 255
        restored = lowest + step * (small.astype(int) + (128 if precision == "int8" else 0))
        assert (np.abs(restored - whole) <= 1.01 * step).all()
