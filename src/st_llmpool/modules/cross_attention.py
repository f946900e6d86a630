"""The cross-attention block of the trainable poolings, and its folding: what no text can change is computed once.

Two facts of algebra make the block cheap without changing its output:

* A score is (W_k x) · (W_q z) = x · (W_kᵀ W_q z) = (W_qᵀ W_k x) · z. One of the two sides is a latent and constant, so
  in eval mode the first bracket is computed once: R vectors of size D for each head, in place of projecting every
  input. In training, where nothing is constant, the second spares a small batch the projection of many latents.
* The output is W_o Σ a W_v x, a sum over inputs between two constant matrices. Matrices and sum may be taken in
  any order, and W_o W_v may be one matrix for each head.

Which form is cheaper depends on the sizes, so multiply-adds are counted and the cheaper one is taken. A weight is
read once for each multiply-add of one row, so the same count stands for the bytes, and what is kept never holds
more numbers than the weights that it stands in for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

QUERIES = ("latents", "inputs")
#: Rows to project at a time in the feed-forward: the paper's 768 latents of one text, or short texts together.
_ROWS = 1024
Form = Literal["folded", "projected", "through inputs"]


class CrossAttention(nn.Module):
    """Pre-norm cross-attention between inputs X (B, K, D) and trainable latents Z (R, D), then a mean: (B, D).

    ``X' = LN_x(X)`` and ``Z' = LN_z(Z)``. With ``queries="latents"`` Z' queries X', Y = Z + attention, and the
    result is the mean over the R latents of ``Y + FF(LN(Y))`` (arXiv 2409.02727 §3.2). With ``queries="inputs"``
    X' queries Z', Y = X + attention, and the mean is over the real inputs (NV-Embed, arXiv 2405.17428 §3.1).
    FF projects to [value; gate], multiplies value by the exact GELU of gate, and projects back.

    In eval mode without gradients the constants are kept between calls (see the module's docstring). They are no
    part of the state dict, copies or pickles, and are dropped by ``train()``, by moving or saving the module, and
    when a weight changes. Only a write through ``parameter.data`` goes unseen, as it does by autograd:
    call ``train()`` after one. Threads may share the block: at worst both compute the same constants.

    Args:
        embedding_dimension: D.
        num_latents: R.
        num_heads: H.
        head_dim: Size of a head; H * head_dim need not be D.
        mlp_ratio: Width of the feed-forward's value, in multiples of D.
        queries: Which side asks, ``"latents"`` or ``"inputs"``.

    Example:
        >>> block = CrossAttention(8, num_latents=3, num_heads=2, head_dim=4, mlp_ratio=1)
        >>> block(torch.randn(5, 7, 8), mask=torch.ones(5, 7, dtype=torch.bool)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        embedding_dimension: int,
        *,
        num_latents: int,
        num_heads: int,
        head_dim: int,
        mlp_ratio: float,
        queries: Literal["latents", "inputs"] = "latents",
    ) -> None:
        super().__init__()
        inner, hidden = num_heads * head_dim, max(1, round(mlp_ratio * embedding_dimension))
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.queries = queries
        # Small, so that the texts and not a constant vector make the result: LN_z scales the queries up anyway.
        self.latents = nn.Parameter(torch.randn(num_latents, embedding_dimension) * 0.02)
        self.norm_inputs = nn.LayerNorm(embedding_dimension)
        self.norm_latents = nn.LayerNorm(embedding_dimension)
        self.to_query = nn.Linear(embedding_dimension, inner, bias=False)
        self.to_key_value = nn.Linear(embedding_dimension, 2 * inner, bias=False)
        self.to_output = nn.Linear(inner, embedding_dimension, bias=False)
        self.norm_feed_forward = nn.LayerNorm(embedding_dimension)
        self.to_value_gate = nn.Linear(embedding_dimension, 2 * hidden)
        self.from_hidden = nn.Linear(hidden, embedding_dimension)
        self._kept: _Kept | None = None

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pools the inputs.

        Args:
            inputs: (B, K, D) in any float dtype; computed in float32.
            mask: (B, K), True for real inputs, at least one in every row; None if all are real. Masked inputs get
                exactly zero weight and gradient, whatever they hold.

        Returns:
            (B, D) in float32.
        """
        inputs = inputs.float()
        if mask is not None:
            inputs = inputs.masked_fill(~mask.unsqueeze(-1), 0.0)
        constants = self._constants(rows=inputs.shape[0] * inputs.shape[1])
        normed = self.norm_inputs(inputs)
        scores = self._scores(normed, constants)
        if self.queries == "inputs":
            return self._mean_feed_forward(inputs + self._read_latents(scores, constants), mask)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, None, None], -math.inf)
        return self._mean_feed_forward(self.latents + self._read_inputs(scores, normed, constants), None)

    def weights(self, inputs: Tensor) -> Tensor:
        """Returns the attention weights between inputs (B, K, D) and latents, (B, K, H, R).

        They sum to 1 over the inputs with ``queries="latents"``, and over the latents with ``queries="inputs"``.
        """
        constants = self._constants(rows=inputs.shape[0] * inputs.shape[1])
        scores = self._scores(self.norm_inputs(inputs.float()), constants)
        return scores.softmax(dim=1 if self.queries == "latents" else -1)

    def _scores(self, normed: Tensor, constants: _Constants) -> Tensor:
        """Returns (B, K, H, R)."""
        if constants.form == "folded":
            return F.linear(normed, constants.scores).unflatten(-1, (self.num_heads, -1))
        projected = self._heads(F.linear(normed, self._input_weight))
        if constants.form == "projected":
            return torch.einsum("bkhd,rhd->bkhr", projected, constants.scores)
        latent_weight = self._latent_weight.unflatten(0, (self.num_heads, self.head_dim))
        return torch.einsum("bkhd,hdi->bkhi", projected, latent_weight) @ constants.scores.T

    def _read_latents(self, scores: Tensor, constants: _Constants) -> Tensor:
        """Returns what each input reads from the latents, (B, K, D)."""
        assert constants.values is not None
        weights = scores.softmax(dim=-1)
        if constants.form == "folded":
            return weights.flatten(2) @ constants.values
        return self.to_output(torch.einsum("bkhr,rhd->bkhd", weights, constants.values).flatten(2))

    def _read_inputs(self, scores: Tensor, normed: Tensor, constants: _Constants) -> Tensor:
        """Returns what each latent reads from the inputs, (B, R, D), by the cheapest order of the same product."""
        weights = scores.softmax(dim=1)
        num_inputs, num_latents = scores.shape[1], scores.shape[3]
        inner, dimension = self.to_output.in_features, self.to_output.out_features
        through_both = 2 * inner * dimension if constants.values is None else constants.values.numel()
        reordered = min(num_inputs, num_latents) * through_both + math.prod(scores.shape[1:]) * dimension
        plain = (num_inputs + num_latents) * inner * dimension + num_inputs * num_latents * inner
        if plain < reordered:
            values = self._heads(F.linear(normed, self._value_weight))
            return self.to_output(torch.einsum("bkhr,bkhd->brhd", weights, values).flatten(2))
        if num_inputs < num_latents:
            projected = self._through_both(normed, constants.values)
            return weights.flatten(1, 2).mT @ projected.flatten(1, 2)
        pooled = (weights.flatten(2).mT @ normed).unflatten(1, (self.num_heads, num_latents))
        if constants.values is not None:
            return torch.einsum("bhri,iho->bro", pooled, constants.values)
        value_weight = self._value_weight.unflatten(0, (self.num_heads, self.head_dim))
        return self.to_output(torch.einsum("bhri,hdi->brhd", pooled, value_weight).flatten(2))

    def _through_both(self, normed: Tensor, folded: Tensor | None) -> Tensor:
        """Returns W_o W_v x of each head, (B, K, H, D)."""
        if folded is not None:
            return (normed @ folded.flatten(1)).unflatten(-1, (self.num_heads, -1))
        values = self._heads(F.linear(normed, self._value_weight))
        return torch.einsum("bkhd,ohd->bkho", values, self._heads(self.to_output.weight))

    def _mean_feed_forward(self, attended: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the mean of Y + FF(LN(Y)), (B, D); the last projection is linear, so it runs after the mean."""
        # Some texts at a time, as what lies between the projections is larger than all else, and than a CPU's caches.
        texts = max(1, _ROWS // attended.shape[1])
        parts = self.norm_feed_forward(attended).split(texts)
        masks = [None] * len(parts) if mask is None else mask.split(texts)
        hidden = torch.cat([_mean(self._gated(part), of) for part, of in zip(parts, masks, strict=True)])
        return _mean(attended, mask) + self.from_hidden(hidden)

    def _gated(self, normed: Tensor) -> Tensor:
        # Projected one by one: halves of one product are strided, and what follows is a tenth slower on them.
        parts = zip(self.to_value_gate.weight.chunk(2), self.to_value_gate.bias.chunk(2), strict=True)
        value, gate = (F.linear(normed, weight, bias) for weight, bias in parts)
        return F.gelu(gate).mul_(value)

    def _constants(self, rows: int) -> _Constants:
        """Returns the kept constants if they may be kept, else computes them for `rows` inputs."""
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return self._compute_constants(rows)
        sources = (
            self.latents,
            self.norm_latents.weight,
            self.norm_latents.bias,
            self.to_query.weight,
            self.to_key_value.weight,
            self.to_output.weight,
        )
        if any(source.is_inference() for source in sources):  # these do not count their changes
            return self._compute_constants(rows)
        state = tuple((source.data_ptr(), source._version) for source in sources)
        kept = self._kept
        if kept is None or kept.state != state:
            storages = tuple(source.untyped_storage() for source in sources)
            kept = self._kept = _Kept(state, storages, self._compute_constants(None))
        return kept.constants

    def _compute_constants(self, rows: int | None) -> _Constants:
        """Computes what depends on no text, in the form that is cheapest for `rows` inputs, None for many calls."""
        form = self._cheapest_form(rows)
        latents = self.norm_latents(self.latents)
        if form == "through inputs":
            scores = latents * self.head_dim**-0.5
        else:
            scores = self._heads(F.linear(latents, self._latent_weight)) * self.head_dim**-0.5
        if form == "folded":
            input_weight = self._input_weight.unflatten(0, (self.num_heads, self.head_dim))
            scores = torch.einsum("rhd,hdi->hri", scores, input_weight).flatten(0, 1)
        values = None
        output_weight = self._heads(self.to_output.weight)
        if self.queries == "inputs":
            values = self._heads(F.linear(latents, self._value_weight))
            if form == "folded":
                values = torch.einsum("rhd,ohd->hro", values, output_weight).flatten(0, 1)
        elif rows is None and self.head_dim >= self.to_output.out_features:  # at most half of W_v and W_o together
            value_weight = self._value_weight.unflatten(0, (self.num_heads, self.head_dim))
            values = torch.einsum("hdi,ohd->iho", value_weight, output_weight).contiguous()
        return _Constants(form, scores, values)

    def _cheapest_form(self, rows: int | None) -> Form:
        num_latents, dimension = self.latents.shape
        inner = self.to_output.in_features
        projection, latents = inner * dimension, self.num_heads * num_latents * dimension
        for_each_row: dict[Form, int] = {
            "folded": latents,
            "projected": projection + num_latents * inner,
            "through inputs": 2 * projection + latents,
        }
        once: dict[Form, int] = {
            "folded": 2 * num_latents * projection,
            "projected": num_latents * projection,
            "through inputs": 0,
        }
        if rows is None:
            return min(for_each_row, key=lambda form: for_each_row[form])
        return min(for_each_row, key=lambda form: rows * for_each_row[form] + once[form])

    def _heads(self, projected: Tensor) -> Tensor:
        """Splits the last dimension into heads: (..., H, head_dim)."""
        return projected.unflatten(-1, (self.num_heads, self.head_dim))

    @property
    def _latent_weight(self) -> Tensor:
        """Projects latents for the scores: queries or keys."""
        return self.to_query.weight if self.queries == "latents" else self.to_key_value.weight.chunk(2)[0]

    @property
    def _input_weight(self) -> Tensor:
        """Projects inputs for the scores: keys or queries."""
        return self.to_key_value.weight.chunk(2)[0] if self.queries == "latents" else self.to_query.weight

    @property
    def _value_weight(self) -> Tensor:
        return self.to_key_value.weight.chunk(2)[1]

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; the way into training drops the kept constants (``encode`` calls ``eval()`` every time)."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept = None
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._kept = None
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the kept constants out of copies and pickles."""
        return {**self.__dict__, "_kept": None}


class _Constants(NamedTuple):
    """What depends on no text.

    Attributes:
        form: Which form `scores` has, and `values` if inputs query.
        scores: The latents' side of the scores, scaled: (H * R, D) if folded, (R, H, head_dim) if projected, and
            (R, D) if the inputs go through both matrices.
        values: If inputs query, the latents' values: (H * R, D) if folded, else (R, H, head_dim). If latents query,
            W_o W_v of each head, (D, H, D), or None where the two matrices are not more than it.
    """

    form: Form
    scores: Tensor
    values: Tensor | None


class _Kept(NamedTuple):
    """Constants with what they were computed from.

    Attributes:
        state: Address and version of each weight.
        storages: Keeps those addresses from being given to other tensors.
        constants: The constants.
    """

    state: tuple[tuple[int, int], ...]
    storages: tuple[torch.UntypedStorage, ...]
    constants: _Constants


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the mean (B, D) over the real ones of (B, K, D)."""
    if mask is None:
        return rows.mean(dim=1)
    return torch.einsum("bk,bkd->bd", mask.to(rows.dtype), rows) / mask.sum(dim=1, keepdim=True)
