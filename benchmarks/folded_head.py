"""Folded head against the arithmetic of the paper's code: same weights, same inputs, same output.

The plain alternative does what the released code of arXiv 2409.02727 does: it repeats the latents over the batch and
projects them again for every text, keeps keys and values of every head, and projects all latents back. Run it as

    python benchmarks/folded_head.py [--device cuda] [--texts 4]
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial

import torch
from harness import Row, alternate, arguments, compare, finish
from torch import Tensor
from torch.nn import functional as F

from st_llmpool.designs import PRESETS
from st_llmpool.modules.cross_attention import CrossAttention
from st_llmpool.modules.latent_attention_pooling import LatentAttentionPooling

REQUIRED_RATIO = 15.0


def paper_arithmetic(block: CrossAttention, inputs: Tensor) -> Tensor:
    """Returns what ``block(inputs)`` returns, (B, D), the way that the paper's code computes it."""
    latents = block.latents.expand(len(inputs), -1, -1).contiguous()

    def split(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (block.sizes.num_heads, block.sizes.head_dim)).transpose(1, 2)

    queries = split(block.to_query(block.norm_latents(latents)))
    keys, values = (split(half) for half in block.to_key_value(block.norm_inputs(inputs)).chunk(2, dim=-1))
    attended = F.scaled_dot_product_attention(queries, keys, values)
    latents = latents + block.to_output(attended.transpose(1, 2).flatten(2))
    value, gate = block.to_value_gate(block.norm_feed_forward(latents)).chunk(2, dim=-1)
    return (latents + block.from_hidden(value * F.gelu(gate))).mean(dim=1)


def kept_bytes(block: CrossAttention) -> int:
    """Returns the memory that the folded constants take."""
    folded = block._folded
    tensors = (folded.scores, folded.values) if folded is not None else ()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def measure(preset: str, args: Namespace) -> Row:
    """Returns the ratio for one preset."""
    block = LatentAttentionPooling(args.hidden, **PRESETS[preset]).cross_attention.to(args.device).eval()
    inputs = torch.randn(args.texts, args.layers, args.hidden, device=args.device)
    plain, folded = (torch.inference_mode()(partial(run, inputs)) for run in (partial(paper_arithmetic, block), block))
    difference = (plain() - folded()).abs().max().item()
    weights = sum(weight.numel() for weight in block.parameters()) * 4 / 2**20
    note = f"constants {kept_bytes(block) / 2**20:.1f} of {weights:.0f} MiB, max difference {difference:.0e}"
    limit = REQUIRED_RATIO if preset == "paper" else None
    what = f"folded head, {preset}, {args.texts} x {args.layers} x {args.hidden}"
    return compare(what, *alternate(folded, plain, args), limit=limit, at_least=True, note=note)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measures both presets and prints the table."""
    sizes = {"--hidden": 896, "--layers": 24, "--texts": 4}
    args = arguments(__doc__, argv, *((name, {"type": int, "default": value}) for name, value in sizes.items()))
    if args.quick:
        args.hidden, args.layers = 32, 2
    presets = ("compact",) if args.quick else ("compact", "paper")
    return finish("Head alone", [measure(preset, args) for preset in presets], args)


if __name__ == "__main__":
    main()
