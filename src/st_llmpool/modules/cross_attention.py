"""The cross-attention block of the trainable poolings, in two forms: plain, and folded for inference.

A score is (W_k x) · (W_q z) = x · (W_kᵀ W_q z), and the output is W_o Σ a W_v x = Σ a (W_o W_v x). The folded form
computes the brackets once, in eval mode without gradients, where that saves multiply-adds and takes no more memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import check_choice
from .trainable_pooling import TrainablePooling, check_number, check_sizes, zero_linear

#: Rows that the feed-forward projects at a time: what lies between its projections is larger than all else.
_ROWS = 1024


class Sizes(NamedTuple):
    """Sizes of a block: R latents, H heads of `head_dim`, and the feed-forward's width in multiples of D."""

    num_latents: int
    num_heads: int
    head_dim: int
    mlp_ratio: float


class CrossAttention(nn.Module):
    """Pre-norm cross-attention between inputs X (B, K, D) and trainable latents Z (R, D), then a mean: (B, D).

    ``X' = LN_x(X)`` and ``Z' = LN_z(Z)``. With ``queries="latents"`` Z' queries X', Y = Z + attention, and the
    result is the mean over the R latents of ``Y + FF(LN(Y))`` (arXiv 2409.02727 §3.2). With ``queries="inputs"``
    X' queries Z', Y = X + attention, and the mean is over the real inputs (NV-Embed, arXiv 2405.17428 §3.1).
    FF projects to [value; gate], multiplies value by the exact GELU of gate, and projects back.

    The folded constants are in no state dict, copy or pickle, and are dropped by ``train()``, by moving or saving the
    module, and when a weight changes, except through ``parameter.data``: call ``train()`` then.

    Example:
        >>> block = CrossAttention(8, Sizes(num_latents=3, num_heads=2, head_dim=4, mlp_ratio=1))
        >>> block(torch.randn(5, 7, 8), mask=torch.ones(5, 7, dtype=torch.bool)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self, embedding_dimension: int, sizes: Sizes, *, queries: str = "latents", init_std: float = 0.02
    ) -> None:
        super().__init__()
        inner, hidden = sizes.num_heads * sizes.head_dim, max(1, round(sizes.mlp_ratio * embedding_dimension))
        self.sizes, self.queries = sizes, queries
        # Small, so that texts make the result and not a constant vector; LN_z scales the queries up anyway.
        self.latents = nn.Parameter(torch.randn(sizes.num_latents, embedding_dimension) * init_std)
        self.norm_inputs = nn.LayerNorm(embedding_dimension)
        self.norm_latents = nn.LayerNorm(embedding_dimension)
        self.to_query = nn.Linear(embedding_dimension, inner, bias=False)
        self.to_key_value = nn.Linear(embedding_dimension, 2 * inner, bias=False)
        self.to_output = nn.Linear(inner, embedding_dimension, bias=False)
        self.norm_feed_forward = nn.LayerNorm(embedding_dimension)
        self.to_value_gate = nn.Linear(embedding_dimension, 2 * hidden)
        self.from_hidden = nn.Linear(hidden, embedding_dimension)
        self._folded: _Folded | None = None

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool inputs (B, K, D) of any float dtype to (B, D) in float32; `mask` (B, K) is True for real ones.

        Masked inputs get exactly zero weight and gradient, whatever they hold; at least one of each row is real.
        """
        inputs = inputs.float()
        mask = torch.ones_like(inputs[..., 0], dtype=torch.bool) if mask is None else mask
        inputs = inputs.masked_fill(~mask.unsqueeze(-1), 0.0)
        normed, folded = self.norm_inputs(inputs), self._constants()
        scores = self._scores(normed, folded)
        if self.queries == "inputs":
            attended = inputs + self._read_latents(scores.softmax(dim=-1), folded)
            return self._mean_feed_forward(attended, mask.float() / mask.sum(dim=1, keepdim=True))
        weights = scores.masked_fill(~mask[:, :, None, None], -math.inf).softmax(dim=1)
        attended = self.latents + self._read_inputs(weights, normed, folded)
        return self._mean_feed_forward(attended, attended.new_full(attended.shape[:2], 1 / attended.shape[1]))

    def _scores(self, normed: Tensor, folded: _Folded | None) -> Tensor:
        """Return (B, K, H, R)."""
        if folded is not None:
            return F.linear(normed, folded.scores).unflatten(-1, (self.sizes.num_heads, -1))
        projected = torch.einsum("bki,hdi->bkhd", normed, self._projections().inputs)
        if self._are_few(rows=normed.shape[0] * normed.shape[1]):
            projected = torch.einsum("bkhd,hdi->bkhi", projected, self._projections().latents)
            return projected @ self.norm_latents(self.latents).T * self.sizes.head_dim**-0.5
        return torch.einsum("bkhd,rhd->bkhr", projected, self._latent_side())

    def _are_few(self, rows: int) -> bool:
        """Return whether `rows` times two matrices cost less than all latents times one; 3 s for 8 s at paper size."""
        (num_latents, dimension), head_dim = self.latents.shape, self.sizes.head_dim
        return rows * dimension * (head_dim + num_latents) <= num_latents * head_dim * (dimension + rows)

    def _latent_side(self) -> Tensor:
        """Return the latents' queries or keys, scaled, (R, H, head_dim)."""
        latents = self.norm_latents(self.latents) * self.sizes.head_dim**-0.5
        return torch.einsum("ri,hdi->rhd", latents, self._projections().latents)

    def _read_latents(self, weights: Tensor, folded: _Folded | None) -> Tensor:
        """Return what each input reads from the latents, (B, K, D)."""
        if folded is not None and folded.values is not None:
            return weights.flatten(2) @ folded.values
        values = torch.einsum("ri,hdi->rhd", self.norm_latents(self.latents), self._projections().values)
        return self.to_output(torch.einsum("bkhr,rhd->bkhd", weights, values).flatten(2))

    def _read_inputs(self, weights: Tensor, normed: Tensor, folded: _Folded | None) -> Tensor:
        """Return what each latent reads from the inputs, (B, R, D)."""
        if folded is not None and folded.values is not None:
            outputs = (normed @ folded.values).unflatten(-1, (self.sizes.num_heads, -1))
            return torch.einsum("bkhr,bkho->bro", weights, outputs)
        values = torch.einsum("bki,hdi->bkhd", normed, self._projections().values)
        if self._are_few(rows=normed.shape[1]):
            outputs = torch.einsum("bkhd,hdo->bkho", values, self._projections().output)
            return torch.einsum("bkhr,bkho->bro", weights, outputs)
        return self.to_output(torch.einsum("bkhr,bkhd->brhd", weights, values).flatten(2))

    def _mean_feed_forward(self, attended: Tensor, weights: Tensor) -> Tensor:
        """Return the mean of Y + FF(LN(Y)), (B, D), by `weights`; the last projection is linear and runs after it."""
        texts = max(1, _ROWS // attended.shape[1])
        parts = zip(self.norm_feed_forward(attended).split(texts), weights.split(texts), strict=True)
        hidden = torch.cat([torch.einsum("bk,bkd->bd", weight, self._gated(part)) for part, weight in parts])
        return torch.einsum("bk,bkd->bd", weights, attended) + self.from_hidden(hidden)

    def _gated(self, normed: Tensor) -> Tensor:
        # Projected one by one: what follows is a tenth slower on the strided halves of one product.
        parts = zip(self.to_value_gate.weight.chunk(2), self.to_value_gate.bias.chunk(2), strict=True)
        value, gate = (F.linear(normed, weight, bias) for weight, bias in parts)
        return F.gelu(gate).mul_(value)

    def _projections(self) -> _Projections:
        key, value = self.to_key_value.weight.chunk(2)
        latents, inputs = (self.to_query.weight, key) if self.queries == "latents" else (key, self.to_query.weight)
        weights = (latents, inputs, value, self.to_output.weight.T)
        return _Projections(*(weight.unflatten(0, (self.sizes.num_heads, -1)) for weight in weights))

    def _constants(self) -> _Folded | None:
        """Return the folded constants, or None for the plain form."""
        (num_latents, dimension), head_dim = self.latents.shape, self.sizes.head_dim
        pays = num_latents <= 2 * head_dim and num_latents * dimension <= head_dim * (num_latents + dimension)
        if not pays or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        weights = (self.to_query.weight, self.to_key_value.weight, self.to_output.weight)
        sources = (self.latents, *self.norm_latents.parameters(), *weights)
        if any(source.is_inference() for source in sources):  # these do not count their changes
            return None
        state = tuple((source.data_ptr(), source._version) for source in sources)
        folded = self._folded
        if folded is None or folded.state != state:
            folded = self._folded = _Folded(state, tuple(source.detach() for source in sources), *self._fold())
        return folded

    def _fold(self) -> tuple[Tensor, Tensor | None]:
        weights = self._projections()
        scores = torch.einsum("rhd,hdi->hri", self._latent_side(), weights.inputs).flatten(0, 1)
        if self.queries == "inputs":
            values = torch.einsum("ri,hdi->rhd", self.norm_latents(self.latents), weights.values)
            return scores, torch.einsum("rhd,hdo->hro", values, weights.output).flatten(0, 1)
        if self.sizes.head_dim < self.latents.shape[1]:  # more than half of W_v and W_o together
            return scores, None
        return scores, torch.einsum("hdi,hdo->iho", weights.values, weights.output).flatten(1)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; training drops the constants."""
        self._folded = None if mode else self._folded
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._folded = None
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._folded = None
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the constants out of copies and pickles."""
        return {**self.__dict__, "_folded": None}


class _Projections(NamedTuple):
    """The block's matrices by head, each (H, head_dim, D): W_q and W_k go by which side asks; W_o is transposed."""

    latents: Tensor
    inputs: Tensor
    values: Tensor
    output: Tensor


class _Folded(NamedTuple):
    """What depends on no text, and the weights behind it."""

    state: tuple[tuple[int, int], ...]  # address and version of each weight
    sources: tuple[Tensor, ...]  # aliases that keep the addresses
    scores: Tensor  # the latents' side of the scores, (H * R, D)
    values: Tensor | None  # W_o W_v of each head, (D, H * D), None if too large; if inputs query, of latents (H * R, D)


class CrossAttentionPooling(TrainablePooling):
    """Base of the poolings that read a set of vectors through :class:`CrossAttention`.

    Args:
        embedding_dimension: Hidden size D of the backbone.
        num_latents, num_heads, head_dim, mlp_ratio: As :class:`Sizes`; ``head_dim=None`` is D / H.
        queries: ``"latents"`` or ``"inputs"``.
        init_std: Standard deviation of the latents at the start, 1 in the paper; not saved.
        readout_skip: As :class:`TrainablePooling`, with U (D, D). False: embedding = pooled.
    """

    config_keys = ["embedding_dimension", *Sizes._fields, "queries", "readout_skip"]

    def __init__(
        self,
        embedding_dimension: int,
        *,
        num_latents: int = 8,
        num_heads: int = 8,
        head_dim: int | None = None,
        mlp_ratio: float = 1,
        queries: Literal["latents", "inputs"] = "latents",
        readout_skip: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(embedding_dimension, readout_skip=readout_skip)
        check_choice("queries", queries, ("latents", "inputs"))
        check_number("init_std", init_std, 0, 100)
        check_sizes(num_heads=num_heads)
        head_dim = max(1, embedding_dimension // num_heads) if head_dim is None else head_dim
        sizes = Sizes(num_latents, num_heads, head_dim, mlp_ratio)
        check_number("mlp_ratio", mlp_ratio, 1e-3, 1e3)
        check_sizes(embedding_dimension=embedding_dimension, num_latents=num_latents)
        check_sizes(embedding_dimension=embedding_dimension, num_heads=num_heads, head_dim=head_dim)
        check_sizes(embedding_dimension=embedding_dimension, hidden=max(1, round(mlp_ratio * embedding_dimension)))
        self.num_latents, self.num_heads, self.head_dim, self.mlp_ratio = num_latents, num_heads, head_dim, mlp_ratio
        self.queries = queries
        self.cross_attention = CrossAttention(embedding_dimension, sizes, queries=queries, init_std=init_std)
        # Adam moves every weight alike, so that a sum over a width moves with it (Yang et al. 2022, arXiv 2203.03466).
        self.default_learning_rate = 1e-3 * min(1, 256 / max(embedding_dimension, num_heads * head_dim))
        if readout_skip:
            self.to_embedding = zero_linear(embedding_dimension, embedding_dimension)
