"""The cross-attention block of the trainable poolings, in two forms: plain, and folded for inference.

A score is (W_k x) · (W_q z) = x · (W_kᵀ W_q z), and the output is W_o Σ a W_v x = Σ a (W_o W_v x). In each, the bracket
depends on weights and latents only. The folded form computes it once and keeps it; it is used in eval mode without
gradients, for sizes where it takes fewer multiply-adds than the plain form and no more memory than the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ConfigurationError
from .trainable_pooling import TrainablePooling, check_choice, check_number, check_sizes, zero_linear

PRESETS: dict[str, dict[str, Any]] = {
    "compact": {"num_latents": 8, "num_heads": 8, "mlp_ratio": 1},
    "paper": {"num_latents": 768, "num_heads": 32, "head_dim": 2048, "mlp_ratio": 4},
}
#: Layers of the paper's released code (arXiv 2409.02727), and ours.
PAPER_NAMES = {
    "pos_emb.weight": "layer_table",
    "latents": "cross_attention.latents",
    "cross_attend_blocks.0.norm": "cross_attention.norm_inputs",
    "cross_attend_blocks.0.norm_context": "cross_attention.norm_latents",
    "cross_attend_blocks.0.fn.to_q": "cross_attention.to_query",
    "cross_attend_blocks.0.fn.to_kv": "cross_attention.to_key_value",
    "cross_attend_blocks.0.fn.to_out": "cross_attention.to_output",
    "cross_attend_blocks.1.norm": "cross_attention.norm_feed_forward",
    "cross_attend_blocks.1.fn.net.0": "cross_attention.to_value_gate",
    "cross_attend_blocks.1.fn.net.2": "cross_attention.from_hidden",
}
#: Rows that the feed-forward projects at a time: what lies between its projections is larger than all else.
_ROWS = 1024


@dataclass(frozen=True)
class Sizes:
    """Sizes of a cross-attention block.

    Attributes:
        num_latents: R.
        num_heads: H.
        head_dim: Size of a head; H * head_dim need not be D.
        mlp_ratio: Width of the feed-forward's value, in multiples of D.
    """

    num_latents: int
    num_heads: int
    head_dim: int
    mlp_ratio: float

    @classmethod
    def resolve(cls, embedding_dimension: int, preset: str | None, **given: Any) -> Self:
        """Fills the sizes that are None from the preset, and ``head_dim`` by D / H if it has none.

        Raises:
            ConfigurationError: If the preset is unknown, or a size is missing without one, or out of range.

        Example:
            >>> Sizes.resolve(896, "compact", num_latents=16)
            Sizes(num_latents=16, num_heads=8, head_dim=112, mlp_ratio=1)
        """
        if preset is not None:
            check_choice("preset", preset, tuple(PRESETS))
        sizes = (PRESETS[preset] if preset else {}) | {name: size for name, size in given.items() if size is not None}
        missing = [field.name for field in fields(cls) if field.name not in {*sizes, "head_dim"}]
        if missing:
            raise ConfigurationError(f"preset=None needs all sizes, {missing} too; or use a preset of {[*PRESETS]}.")
        check_sizes(num_heads=sizes["num_heads"])
        resolved = cls(**{"head_dim": max(1, embedding_dimension // sizes["num_heads"])} | sizes)
        check_number("mlp_ratio", resolved.mlp_ratio, 1e-3, 1e3)
        check_sizes(embedding_dimension=embedding_dimension, num_latents=resolved.num_latents)
        check_sizes(embedding_dimension=embedding_dimension, num_heads=resolved.num_heads, head_dim=resolved.head_dim)
        check_sizes(embedding_dimension=embedding_dimension, hidden=resolved.hidden(embedding_dimension))
        return resolved

    def hidden(self, embedding_dimension: int) -> int:
        """Returns the width of the feed-forward's value."""
        return max(1, round(self.mlp_ratio * embedding_dimension))


class CrossAttention(nn.Module):
    """Pre-norm cross-attention between inputs X (B, K, D) and trainable latents Z (R, D), then a mean: (B, D).

    ``X' = LN_x(X)`` and ``Z' = LN_z(Z)``. With ``queries="latents"`` Z' queries X', Y = Z + attention, and the
    result is the mean over the R latents of ``Y + FF(LN(Y))`` (arXiv 2409.02727 §3.2). With ``queries="inputs"``
    X' queries Z', Y = X + attention, and the mean is over the real inputs (NV-Embed, arXiv 2405.17428 §3.1).
    FF projects to [value; gate], multiplies value by the exact GELU of gate, and projects back.

    The folded constants are no part of the state dict, copies or pickles, and are dropped by ``train()``, by moving or
    saving the module, and when a weight changes. Only a write through ``parameter.data`` goes unseen, as it does by
    autograd: call ``train()`` after one. Threads may share the block: at worst both compute the same constants.

    Example:
        >>> block = CrossAttention(8, Sizes(num_latents=3, num_heads=2, head_dim=4, mlp_ratio=1))
        >>> block(torch.randn(5, 7, 8), mask=torch.ones(5, 7, dtype=torch.bool)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self, embedding_dimension: int, sizes: Sizes, *, queries: Literal["latents", "inputs"] = "latents"
    ) -> None:
        super().__init__()
        inner, hidden = sizes.num_heads * sizes.head_dim, sizes.hidden(embedding_dimension)
        self.sizes = sizes
        self.queries = queries
        # Small, so that the texts and not a constant vector make the result: LN_z scales the queries up anyway.
        self.latents = nn.Parameter(torch.randn(sizes.num_latents, embedding_dimension) * 0.02)
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
        """Pools inputs (B, K, D) of any float dtype to (B, D) in float32.

        `mask` (B, K) is True for real inputs, at least one in every row; None if all are real. Masked inputs get
        exactly zero weight and gradient, whatever they hold.
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

    def weights(self, inputs: Tensor) -> Tensor:
        """Returns the attention weights between inputs (B, K, D) and latents, (B, K, H, R).

        They sum to 1 over the inputs with ``queries="latents"``, and over the latents with ``queries="inputs"``.
        """
        scores = self._scores(self.norm_inputs(inputs.float()), self._constants())
        return scores.softmax(dim=1 if self.queries == "latents" else -1)

    def _scores(self, normed: Tensor, folded: _Folded | None) -> Tensor:
        """Returns (B, K, H, R)."""
        if folded is not None:
            return F.linear(normed, folded.scores).unflatten(-1, (self.sizes.num_heads, -1))
        projected = torch.einsum("bki,hdi->bkhd", normed, self._projections().inputs)
        if self._are_few(rows=normed.shape[0] * normed.shape[1]):
            projected = torch.einsum("bkhd,hdi->bkhi", projected, self._projections().latents)
            return projected @ self.norm_latents(self.latents).T * self.sizes.head_dim**-0.5
        return torch.einsum("bkhd,rhd->bkhr", projected, self._latent_side())

    def _are_few(self, rows: int) -> bool:
        """Returns whether to project `rows` by two matrices in place of all latents by one.

        At the paper's size (hidden 896, 24 layers) a training step of 1 text takes 3.1 s of CPU time with it, 8.0 s
        without it in the scores, and 12.5 s without it in the output too, which is projected for each text.
        """
        (num_latents, dimension), head_dim = self.latents.shape, self.sizes.head_dim
        return rows * dimension * (head_dim + num_latents) <= num_latents * head_dim * (dimension + rows)

    def _latent_side(self) -> Tensor:
        """Returns the latents' queries or keys, scaled, (R, H, head_dim)."""
        latents = self.norm_latents(self.latents) * self.sizes.head_dim**-0.5
        return torch.einsum("ri,hdi->rhd", latents, self._projections().latents)

    def _read_latents(self, weights: Tensor, folded: _Folded | None) -> Tensor:
        """Returns what each input reads from the latents, (B, K, D)."""
        if folded is not None and folded.values is not None:
            return weights.flatten(2) @ folded.values
        values = torch.einsum("ri,hdi->rhd", self.norm_latents(self.latents), self._projections().values)
        return self.to_output(torch.einsum("bkhr,rhd->bkhd", weights, values).flatten(2))

    def _read_inputs(self, weights: Tensor, normed: Tensor, folded: _Folded | None) -> Tensor:
        """Returns what each latent reads from the inputs, (B, R, D)."""
        if folded is not None and folded.values is not None:
            outputs = (normed @ folded.values).unflatten(-1, (self.sizes.num_heads, -1))
            return torch.einsum("bkhr,bkho->bro", weights, outputs)
        values = torch.einsum("bki,hdi->bkhd", normed, self._projections().values)
        if self._are_few(rows=normed.shape[1]):
            outputs = torch.einsum("bkhd,hdo->bkho", values, self._projections().output)
            return torch.einsum("bkhr,bkho->bro", weights, outputs)
        return self.to_output(torch.einsum("bkhr,bkhd->brhd", weights, values).flatten(2))

    def _mean_feed_forward(self, attended: Tensor, weights: Tensor) -> Tensor:
        """Returns the mean of Y + FF(LN(Y)), (B, D), by `weights`; the last projection is linear and runs after it."""
        texts = max(1, _ROWS // attended.shape[1])
        parts = zip(self.norm_feed_forward(attended).split(texts), weights.split(texts), strict=True)
        hidden = torch.cat([torch.einsum("bk,bkd->bd", share, self._gated(part)) for part, share in parts])
        return torch.einsum("bk,bkd->bd", weights, attended) + self.from_hidden(hidden)

    def _gated(self, normed: Tensor) -> Tensor:
        # Projected one by one: halves of one product are strided, and what follows is a tenth slower on them.
        parts = zip(self.to_value_gate.weight.chunk(2), self.to_value_gate.bias.chunk(2), strict=True)
        value, gate = (F.linear(normed, weight, bias) for weight, bias in parts)
        return F.gelu(gate).mul_(value)

    def _projections(self) -> _Projections:
        key, value = self.to_key_value.weight.chunk(2)
        latents, inputs = (self.to_query.weight, key) if self.queries == "latents" else (key, self.to_query.weight)
        weights = (latents, inputs, value, self.to_output.weight.T)
        return _Projections(*(weight.unflatten(0, (self.sizes.num_heads, -1)) for weight in weights))

    def _constants(self) -> _Folded | None:
        """Returns the folded constants, or None for the plain form."""
        (num_latents, dimension), head_dim = self.latents.shape, self.sizes.head_dim
        pays = num_latents <= 2 * head_dim and num_latents * dimension <= head_dim * (num_latents + dimension)
        if not pays or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        linears = (self.to_query, self.to_key_value, self.to_output)
        sources = (self.latents, *self.norm_latents.parameters(), *(linear.weight for linear in linears))
        if any(source.is_inference() for source in sources):  # these do not count their changes
            return None
        state = tuple((source.data_ptr(), source._version) for source in sources)
        folded = self._folded
        if folded is None or folded.state != state:
            folded = self._folded = _Folded(state, tuple(source.detach() for source in sources), *self._fold())
        return folded

    def _fold(self) -> tuple[Tensor, Tensor | None]:
        """Returns the constants of scores and values."""
        weights = self._projections()
        scores = torch.einsum("rhd,hdi->hri", self._latent_side(), weights.inputs).flatten(0, 1)
        if self.queries == "inputs":
            values = torch.einsum("ri,hdi->rhd", self.norm_latents(self.latents), weights.values)
            return scores, torch.einsum("rhd,hdo->hro", values, weights.output).flatten(0, 1)
        if self.sizes.head_dim < self.latents.shape[1]:  # more than half of W_v and W_o together
            return scores, None
        return scores, torch.einsum("hdi,hdo->iho", weights.values, weights.output).flatten(1)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; the way into training drops the constants (``encode`` calls ``eval()`` every time)."""
        self._folded = None if mode else self._folded
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._folded = None
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._folded = None
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the constants out of copies and pickles."""
        return {**self.__dict__, "_folded": None}


class _Projections(NamedTuple):
    """The block's matrices by head, each (H, head_dim, D): W_q and W_k go by which side asks; W_o is transposed."""

    latents: Tensor
    inputs: Tensor
    values: Tensor
    output: Tensor


class _Folded(NamedTuple):
    """What depends on no text.

    Attributes:
        state: Address and version of each weight that it was computed from.
        sources: Aliases of those weights, so that no other tensor is given their addresses.
        scores: The latents' side of the scores, (H * R, D).
        values: If inputs query, the latents' values after W_o, (H * R, D). If latents query, W_o W_v of each head,
            (D, H * D), or None where that is more than the two matrices.
    """

    state: tuple[tuple[int, int], ...]
    sources: tuple[Tensor, ...]
    scores: Tensor
    values: Tensor | None


class CrossAttentionPooling(TrainablePooling):
    """Base of the poolings that read a set of vectors through :class:`CrossAttention`.

    Args:
        embedding_dimension: D.
        preset: Where sizes that are not given come from: ``"compact"`` (8 latents, 8 heads that share D, mlp_ratio 1)
            or ``"paper"`` (768 latents, 32 heads of 2048, mlp_ratio 4); None if all are given.
        queries: ``"latents"`` or ``"inputs"``.
        readout_skip: Embedding = r + U · pooled, where r is the plain readout of the last layer and U (D, D)
            starts at zero, so that training starts from the plain baseline. False: embedding = pooled.
        **sizes: ``num_latents``, ``num_heads``, ``head_dim`` and ``mlp_ratio``, see :class:`Sizes`.

    Raises:
        ConfigurationError: If a setting is unknown, missing, of the wrong type or out of range.
    """

    config_keys = ["embedding_dimension", *(field.name for field in fields(Sizes)), "queries", "readout_skip"]
    num_latents: int
    num_heads: int
    head_dim: int
    mlp_ratio: float

    def __init__(
        self,
        embedding_dimension: int,
        *,
        preset: Literal["compact", "paper"] | None = "compact",
        queries: Literal["latents", "inputs"] = "latents",
        readout_skip: bool = True,
        **sizes: float | None,
    ) -> None:
        super().__init__(embedding_dimension, readout_skip=readout_skip)
        check_choice("queries", queries, ("latents", "inputs"))
        resolved = Sizes.resolve(embedding_dimension, preset, **sizes)
        for name, size in asdict(resolved).items():
            setattr(self, name, size)
        self.queries = queries
        self.cross_attention = CrossAttention(embedding_dimension, resolved, queries=queries)
        if readout_skip:
            self.to_embedding = zero_linear(embedding_dimension, embedding_dimension)

    @classmethod
    def from_paper_state_dict(cls, state_dict: Mapping[str, Tensor], *, num_heads: int) -> Self:
        """Builds the pooling of a checkpoint of the paper's code, with ``readout_skip=False``.

        Args:
            state_dict: Its tensors, with or without the prefix ``weights.``; those of the backbone are ignored.
            num_heads: H, the one size that no tensor shows; the paper uses 32.

        Raises:
            ConfigurationError: If tensors are missing, unknown or of the wrong shape, or the heads do not divide.
        """
        tensors = {}
        for name, tensor in state_dict.items():
            layer = (name := name.removeprefix("weights.")).removesuffix(".weight").removesuffix(".bias")
            layer = name if name == "pos_emb.weight" else layer
            if name.startswith(("latents", "pos_emb.", "cross_attend_blocks.")):
                tensors[name.replace(layer, PAPER_NAMES.get(layer, layer), 1)] = tensor
        try:
            num_latents, dimension = tensors["cross_attention.latents"].shape
            inner = len(tensors["cross_attention.to_query.weight"])
            ratio = tensors["cross_attention.from_hidden.weight"].shape[1] / dimension
            sizes: dict[str, Any] = {"num_latents": num_latents, "head_dim": inner // num_heads, "mlp_ratio": ratio}
            if "layer_table" in tensors:
                sizes["num_layers"] = len(tensors["layer_table"])
            pooling = cls(dimension, num_heads=num_heads, readout_skip=False, **sizes)
            pooling.load_state_dict(tensors)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"The state dict does not fit {cls.__name__} with num_heads={num_heads} (pos_emb.weight, the layer "
                f"weights, belongs to MultiLayerPooling alone): {' '.join(str(error).split())}"
            ) from error
        return pooling
