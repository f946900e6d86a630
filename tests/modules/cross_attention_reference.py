"""The cross-attention block of DESIGN.md §5 in plain Python floats: one text, one head, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from st_llmpool.paper_weights import PAPER_NAMES

Vector = list[float]


def paper_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a block or pooling under the paper's names."""
    papers = {ours.removeprefix("cross_attention."): paper for paper, ours in PAPER_NAMES.items()}
    weights = {}
    for name, tensor in module.state_dict().items():
        layer, _, kind = name.removeprefix("cross_attention.").rpartition(".")
        if (layer or kind) in papers:
            weights[f"{papers[layer]}.{kind}" if layer else papers[kind]] = tensor
    return weights


def slow_cross_attention(
    weights: Mapping[str, Tensor], inputs: Tensor, num_heads: int, queries: str = "latents"
) -> Vector:
    """Pools the rows of `inputs` (K, D), all of them real, with weights under the paper's names."""
    w: dict[str, Any] = {name: tensor.double().tolist() for name, tensor in weights.items()}
    rows: list[Vector] = inputs.double().tolist()
    latents: list[Vector] = w["latents"]
    cross, feed = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    normed_rows = [_layer_norm(row, w[cross + "norm.weight"], w[cross + "norm.bias"]) for row in rows]
    context_norm = w[cross + "norm_context.weight"], w[cross + "norm_context.bias"]
    normed_latents = [_layer_norm(row, *context_norm) for row in latents]
    asking, asked, residual = (
        (normed_latents, normed_rows, latents) if queries == "latents" else (normed_rows, normed_latents, rows)
    )
    all_keys_values = w[cross + "fn.to_kv.weight"]
    inner = len(all_keys_values) // 2
    query = [_times(w[cross + "fn.to_q.weight"], row) for row in asking]
    key = [_times(all_keys_values[:inner], row) for row in asked]
    value = [_times(all_keys_values[inner:], row) for row in asked]
    results = []
    for start, own_query in zip(residual, query, strict=True):
        context = _attend(own_query, key, value, num_heads)
        attended = _plus(start, _times(w[cross + "fn.to_out.weight"], context))
        normed = _layer_norm(attended, w[feed + "norm.weight"], w[feed + "norm.bias"])
        both = _plus(_times(w[feed + "fn.net.0.weight"], normed), w[feed + "fn.net.0.bias"])
        half = len(both) // 2
        gated = [v * 0.5 * g * (1 + math.erf(g / math.sqrt(2))) for v, g in zip(both[:half], both[half:], strict=True)]
        back = _plus(_times(w[feed + "fn.net.2.weight"], gated), w[feed + "fn.net.2.bias"])
        results.append(_plus(attended, back))
    return [sum(column) / len(results) for column in zip(*results, strict=True)]


def _attend(query: Vector, keys: list[Vector], values: list[Vector], num_heads: int) -> Vector:
    size = len(query) // num_heads
    context: Vector = []
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = [sum(q * k for q, k in zip(query[part], key[part], strict=True)) / math.sqrt(size) for key in keys]
        exponentials = [math.exp(score - max(scores)) for score in scores]
        shares = [e / sum(exponentials) for e in exponentials]
        context += [sum(s * v[part][i] for s, v in zip(shares, values, strict=True)) for i in range(size)]
    return context


def _times(matrix: list[Vector], vector: Vector) -> Vector:
    return [sum(m * x for m, x in zip(row, vector, strict=True)) for row in matrix]


def _plus(first: Vector, second: Vector) -> Vector:
    return [a + b for a, b in zip(first, second, strict=True)]


def _layer_norm(row: Vector, weight: Vector, bias: Vector) -> Vector:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + 1e-5)
    return [(x - mean) / deviation * w + b for x, w, b in zip(row, weight, bias, strict=True)]
