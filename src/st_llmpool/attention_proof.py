"""Measures whether a loaded model attends the way its configuration says, layer by layer and with padding.

A flag that is accepted proves nothing: state-space layers ignore it, some families drop it where a batch has no
padding, others let padding through. So each layer is run again on the input that it received, with a few tokens
changed, and the proof looks at which others moved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .modules.attention import (
    ATTENTION_MODES,
    decoder_layers,
    find_backbone,
    is_encoder,
    measured_attention,
    random_ids,
    run_on_ids,
)
from .modules.errors import AttentionError, ConfigurationError, nearest

#: The attention of a model that runs packed batches, and all others as sdpa does; see `fast_inference`.
PACKED_SDPA = "st_llmpool_packed"
VERDICTS = ("causal", "bidirectional", "partial", "batch_dependent", "padding_leak", "padding_side")

_EXPLANATIONS = {
    "causal": "no layer lets a token see what follows it",
    "bidirectional": "every layer lets a token see what follows it",
    "partial": "some layers attend in both directions, others see only what came before",
    "batch_dependent": "a text's vector depends on the texts beside it",
    "padding_leak": "padding changes the vectors of real tokens",
    "padding_side": "left and right padding give different vectors",
}
_WAYS_OUT = {
    "causal": "Call set_attention(model, 'bidirectional') after every load and PEFT wrap; if the layers are recurrent "
    "or linear attention they cannot obey: use attention='causal' or another base.",
    "bidirectional": "Call set_attention(model, 'causal'), or build with attention='bidirectional'.",
    "partial": "Use attention='causal' or another base, or pass allow_partial=True to accept and record it.",
    "batch_dependent": "Call set_attention after every load and PEFT wrap, or use another attn_implementation.",
    "padding_leak": "Use another attn_implementation or another base.",
    "padding_side": "Call set_attention after the load (it makes absolute positions count from the first real token), "
    "or use another base.",
}

# Two texts of 12 tokens, or one of 12 beside one of 9 with 3 tokens of padding: as short as it takes to have several
# tokens before and after those that change, and an odd shift, which no block of tokens swallows.
_FULL, _SHORT = 12, 9
# Effects are ratios. Over 161 configurations the smallest real one was 2.4e-4 and the largest in a causal model 1.4e-6.
_SEEN = 2e-5
# Noise is measured on the model itself; an effect must stand out from it by this factor.
_ABOVE_NOISE = 8.0


@dataclass(frozen=True)
class LayerReport:
    """What one decoder layer does, run alone on the input that it received.

    Attributes:
        number: 1 for the first layer.
        name: Its class.
        unpadded: `"bidirectional"`, `"causal"`, `"tokenwise"` (no token moves another) or `"not_run"`.
        right: The same where the text is padded on the right.
        left: The same where the text is padded on the left.
        signal: Effect of a changed token on earlier tokens over its effect on later ones, the least of the three.
        noise: Effect of a change in another text, where there should be none, over the effect on later tokens.
        leak: Effect of changed padding on real tokens over the effect of a changed token on later ones.
        causal_parts: Submodules of a bidirectional layer that see only what came before.
    """

    number: int
    name: str
    unpadded: str
    right: str
    left: str
    signal: float
    noise: float
    leak: float
    causal_parts: tuple[str, ...] = ()

    @property
    def direction(self) -> str:
        """Returns what the layer is on the whole, `"partial"` if a part of it sees only what came before."""
        if self.causal_parts:
            return "partial"
        seen = [direction for direction in (self.unpadded, self.right, self.left) if direction in ATTENTION_MODES]
        return seen[0] if seen else self.unpadded


@dataclass(frozen=True)
class AttentionReport:
    """What `verify_attention` measured.

    Attributes:
        verdict: One of `VERDICTS`.
        expected: What the model's own configuration, or the caller, says.
        architecture: Class of the backbone.
        attn_implementation: The one that was measured; the proof holds for no other.
        dtype: Of the backbone.
        layers: One entry per decoder layer; empty in the light form.
        batch: Change of a text's vectors with and without padding, and beside other texts, as a share of the
            difference between two texts.
        side: The same between left and right padding.
        leak: The same when other ids stand in the padding.
        noise: The same where nothing differs but the batch size: rounding.
        light: Whether only the light form ran.
    """

    verdict: str
    expected: str
    architecture: str
    attn_implementation: str
    dtype: str
    layers: tuple[LayerReport, ...] = ()
    batch: float = 0.0
    side: float = 0.0
    leak: float = 0.0
    noise: float = 0.0
    light: bool = field(default=False)

    @property
    def ok(self) -> bool:
        """Whether the verdict is the expected one (the light form cannot tell partial from bidirectional)."""
        return self.verdict == self.expected or (
            self.light and (self.verdict, self.expected) == ("bidirectional", "partial")
        )

    @property
    def causal_layers(self) -> tuple[int, ...]:
        """Numbers, from 1, of the layers in which a token, or a part of the layer, sees only what came before."""
        return tuple(layer.number for layer in self.layers if layer.direction in ("causal", "partial"))

    @property
    def signal(self) -> float:
        """Least effect of a later token on an earlier one, over the effect the other way; the layers that mix tokens.

        Zero where any of them is causal.
        """
        mixing = [layer.signal for layer in self.layers if layer.direction not in ("tokenwise", "not_run")]
        return min(mixing, default=0.0)

    def raise_for_failure(self) -> None:
        """Raises AttentionError, with architecture, layers and the way out, unless `ok`."""
        if not self.ok:
            layers = f" in layers {_ranges(self.causal_layers)}" if self.verdict == "partial" else ""
            raise AttentionError(
                f"{self.architecture} ({self.attn_implementation}, {self.dtype}) should be {self.expected} but is "
                f"{self.verdict}: {_EXPLANATIONS[self.verdict]}{layers and f', causal{layers}'}. "
                f"{_WAYS_OUT[self.verdict]}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for a model card or a JSON file."""
        values = asdict(self)
        return {"ok": self.ok, "signal": self.signal, "causal_layers": list(self.causal_layers), **values}

    def __str__(self) -> str:
        """Returns a readable table: the verdict, then layers that behave alike on one line."""
        lines = [
            f"{self.architecture} ({self.attn_implementation}, {self.dtype}): {self.verdict}, expected {self.expected}"
            f" -> {'ok' if self.ok else 'NOT OK'}",
            f"  {_EXPLANATIONS[self.verdict]}",
        ]
        if self.light:
            return "\n".join([*lines, "  light form: two forwards, the last layer only"])
        lines.append(
            f"  batch {self.batch:.1e}  padding side {self.side:.1e}  padding ids {self.leak:.1e}  "
            f"noise {self.noise:.1e}"
        )
        rows = [("layers", "unpadded", "padded right", "padded left", "signal", "noise", "leak", "causal parts")]
        for group in _alike(self.layers):
            first = group[0]
            rows.append(
                (
                    _ranges(tuple(layer.number for layer in group)),
                    first.unpadded,
                    first.right,
                    first.left,
                    f"{min(layer.signal for layer in group):.1e}",
                    f"{max(layer.noise for layer in group):.1e}",
                    f"{max(layer.leak for layer in group):.1e}",
                    ", ".join(first.causal_parts),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(lines)


def verify_attention(model: nn.Module, expected: str | None = None, *, light: bool = False) -> AttentionReport:
    """Measures the attention of the loaded weights: direction, padding and batch, layer by layer.

    Six forwards of at most [2, 12] tokens, and as much again or twice for the layers alone; no tokenizer is needed. It
    runs in eval mode without gradients and leaves weights, modes and random state as they were. Each layer is run
    again on the input that it received, padded and not, with a few tokens changed: a causal layer moves later tokens
    only. Effects are ratios of what moved, so they need no scale and hold in half precision.

    What it cannot see: texts longer than the attention's chunk, window or sparse selection, packed (flattened) input,
    and a causal path inside one attention module that is neither a submodule nor a convolution.

    Args:
        model: A transformers model, also wrapped by PEFT, or a SentenceTransformer on one.
        expected: One of `VERDICTS`; by default what the model's first module or config says. Pass `"partial"` for a
            model that was built with `allow_partial=True`.
        light: Two forwards of the whole model only. Enough to notice a lost flag at load, not to prove a model.

    Raises:
        AttentionError: If the model gives NaN or infinity.
        ConfigurationError: If `expected` is unknown, or the model has no decoder layers that can be found.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=9)
        >>> verify_attention(LlamaModel(LlamaConfig(**sizes))).verdict
        'causal'
    """
    expected = expected if expected is not None else _claim(model)
    if expected not in VERDICTS:
        raise ConfigurationError(
            f"Unknown verdict {expected!r}; expect one of {', '.join(VERDICTS)}.{nearest(expected, VERDICTS)}"
        )
    backbone = find_backbone(model)
    about: dict[str, Any] = {
        "expected": expected,
        "architecture": type(backbone).__name__,
        "attn_implementation": implementation_of(backbone),
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
    with _undisturbed(backbone), torch.no_grad():
        if light:
            return AttentionReport(verdict=measured_attention(backbone), light=True, **about)
        probe = _Probe(backbone)
        layers, whole = probe.layers(), probe.whole()
        mixing = any(layer.direction not in ("tokenwise", "not_run") for layer in layers)
        verdict = _verdict(layers, whole, backbone.dtype) if mixing else measured_attention(backbone)
    return AttentionReport(verdict=verdict, layers=layers, **whole, **about)


def attention_of(model: nn.Module) -> str:
    """Returns the attention that the config of `model` asks for: `"causal"` or `"bidirectional"`.

    That is a claim, not a proof; `verify_attention` measures. See `set_attention` for an example.
    """
    return config_attention(find_backbone(model).config)


def config_attention(config: PreTrainedConfig) -> str:
    """Returns the attention that a config asks for, as :func:`attention_of` does."""
    text_config = config.get_text_config(decoder=True)
    bidirectional = is_encoder(text_config) or getattr(text_config, "is_causal", True) is False
    return "bidirectional" if bidirectional else "causal"


def implementation_of(model: nn.Module) -> str:
    """Returns the name of the attention implementation; what packs batches stands in for ``sdpa``."""
    name = str(find_backbone(model).config._attn_implementation)
    return "sdpa" if name == PACKED_SDPA else name


def _claim(model: nn.Module) -> str:
    """What the module says, if it keeps its attention (a class of ours, or a repository's copy), else the config."""
    module = model[0] if isinstance(model, nn.Sequential) and len(model) else model
    claim = getattr(module, "attention", None)
    return claim if claim in ATTENTION_MODES else attention_of(model)


def _verdict(layers: tuple[LayerReport, ...], whole: dict[str, Any], dtype: torch.dtype) -> str:
    limit = max(_rounding(dtype), _ABOVE_NOISE * whole["noise"])
    if whole["leak"] > limit or any(layer.leak > max(_SEEN, _ABOVE_NOISE * layer.noise) for layer in layers):
        return "padding_leak"
    if whole["batch"] > limit or any(_conflict(layer.unpadded, layer.right) for layer in layers):
        return "batch_dependent"
    if whole["side"] > limit or any(_conflict(layer.right, layer.left) for layer in layers):
        return "padding_side"
    directions = {layer.direction for layer in layers} - {"tokenwise", "not_run"}
    if directions == {"bidirectional"}:
        return "bidirectional"
    return "partial" if directions & {"bidirectional", "partial"} else "causal"


def _conflict(one: str, other: str) -> bool:
    return {one, other} == set(ATTENTION_MODES)


def _rounding(dtype: torch.dtype) -> float:
    """Change of a whole forward that rounding alone may explain, as a share of the difference between two texts."""
    return max(1e-4, 16 * torch.finfo(dtype).eps)


@dataclass
class _Call:
    """One call of a module: its arguments, where in them the tokens stand, and what it returned."""

    args: list[Any]
    kwargs: dict[str, Any]
    key: int | str
    shape: tuple[int, ...]
    output: Tensor

    @property
    def tokens(self) -> Tensor:
        return self.args[self.key] if isinstance(self.key, int) else self.kwargs[self.key]

    def replay(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """Runs the module again on other tokens and returns the states of each token (B, T, ...)."""
        args = [tokens if position == self.key else _shallow(value) for position, value in enumerate(self.args)]
        kwargs = {name: tokens if name == self.key else _shallow(value) for name, value in self.kwargs.items()}
        try:
            output = module(*args, **kwargs)
        except Exception as error:
            raise AttentionError(
                f"{type(module).__name__} cannot be run alone on the input that it received ({type(error).__name__}: "
                f"{error}), so its attention cannot be proven. Use another base."
            ) from error
        return _by_token(_first_tensor(output), self.shape)


class _Probe:
    """Runs one backbone on two random texts, whole and layer by layer."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        self.backbone = backbone
        self.stack = decoder_layers(backbone)
        self.generator = torch.Generator().manual_seed(20240917)
        self.texts = self._random_ids(2, _FULL)
        self.padding = self._random_ids(2, _FULL - _SHORT)
        self.calls: dict[str, dict[nn.Module, _Call]] = {}

    def layers(self) -> tuple[LayerReport, ...]:
        """Returns what every decoder layer does in the three situations."""
        short, mask = self.texts[1, :_SHORT], torch.ones(2, _FULL, dtype=torch.long)
        right, left = self.texts.clone(), self.texts.clone()
        right_mask, left_mask = mask.clone(), mask.clone()
        # The RoBERTa family finds its positions by comparing ids with the padding token.
        pad = getattr(self.backbone.config.get_text_config(decoder=True), "pad_token_id", None)
        padding = self.padding[0] if pad is None or pad < 0 else pad
        right[1, _SHORT:], right_mask[1, _SHORT:] = padding, 0
        left[1, :-_SHORT], left[1, -_SHORT:], left_mask[1, :-_SHORT] = padding, short, 0
        self.inputs = {"unpadded": (self.texts, mask), "right": (right, right_mask), "left": (left, left_mask)}
        for situation, (ids, attention_mask) in self.inputs.items():
            self.calls[situation] = self._run(ids, attention_mask)
        return tuple(self._layer(number, layer) for number, layer in enumerate(self.stack, start=1))

    def whole(self) -> dict[str, Any]:
        """Returns the changes of whole forwards, as shares of the difference between the two texts."""
        unpadded, right, left = (self._last(self.calls[situation]) for situation in ("unpadded", "right", "left"))
        ids, mask = self.inputs["right"]
        other = ids.clone()
        other[1, _SHORT:] = self.padding[1]
        other_padding = self._last(self._run(other, mask))
        alone_full = self._last(self._run(self.texts[:1], mask[:1]))
        alone_short = self._last(self._run(ids[1:, :_SHORT], mask[1:, :_SHORT]))
        scale = _norms(unpadded[:1] - unpadded[1:]).median()

        # In half precision a router flips here and there and moves a few tokens far: leave out the farthest fifth.
        nearly_all = 1.0 if self.backbone.dtype.itemsize >= 4 else 0.8

        def share(first: Tensor, second: Tensor, quantile: float = nearly_all) -> float:
            return (_norms(first - second).flatten().quantile(quantile) / scale).item()

        text = right[1:, :_SHORT]
        return {
            "noise": share(alone_full, unpadded[:1]),
            "batch": max(share(alone_short, text), share(right[:1], unpadded[:1])),
            "side": share(left[1:, -_SHORT:], text),
            "leak": share(other_padding[1:, :_SHORT], text, 1.0),  # the same shapes, so nothing flips by rounding
        }

    def _layer(self, number: int, layer: nn.Module) -> LayerReport:
        found = {situation: self._direction(layer, situation) for situation in self.calls}
        leaks = [self._leak(layer, situation, found[situation][2]) for situation in ("right", "left")]
        noises = [noise / later if later else 0.0 for *_, later, noise in found.values()]
        return LayerReport(
            number=number,
            name=type(layer).__name__,
            **{situation: direction for situation, (direction, *_) in found.items()},
            signal=min((signal for way, signal, *_ in found.values() if way in ATTENTION_MODES), default=0.0),
            noise=max(*noises, *(noise for _, noise in leaks)),
            leak=max(leak for leak, _ in leaks),
            causal_parts=tuple(self._causal_parts(layer)) if found["unpadded"][0] == "bidirectional" else (),
        )

    def _direction(
        self, module: nn.Module, situation: str, dtype: torch.dtype = torch.float32
    ) -> tuple[str, float, float, float]:
        """Returns direction, signal, effect on later tokens and noise of one module when tokens change.

        What moves by less than the rounding of `dtype` did not move.
        """
        call = self.calls[situation].get(module)
        if call is None:
            return "not_run", 0.0, 0.0, 0.0
        real = self.inputs[situation][1][1].nonzero().flatten()
        quarter = len(real) // 4
        found = self._effect(module, call, real, real[quarter : 2 * quarter], dtype)
        if found[0] == "bidirectional":
            return found
        # Earlier tokens of a sparse attention may have selected others: ask again before calling it causal.
        again = self._effect(module, call, real, real[2 * quarter : 3 * quarter], dtype)
        return again if again[0] == "bidirectional" or found[0] == "tokenwise" else found

    def _effect(
        self, module: nn.Module, call: _Call, real: Tensor, changed: Tensor, dtype: torch.dtype
    ) -> tuple[str, float, float, float]:
        moved = self._moved(module, call, row=1, positions=changed)
        earlier, later = _rms(moved[1, real[real < changed[0]]]), _rms(moved[1, real[real > changed[-1]]])
        noise = _rms(moved[0])
        # Experts run on other groups of tokens when one of them changes, so that even what stays is rounded anew.
        floor = max(_ABOVE_NOISE * noise, 4 * torch.finfo(dtype).eps * _rms(moved[1, changed]))
        signal = earlier / later if later else 0.0
        if earlier > max(floor, _SEEN * later):
            return "bidirectional", signal, later, noise
        return ("causal" if later > floor else "tokenwise"), signal, later, noise

    def _leak(self, layer: nn.Module, situation: str, later: float) -> tuple[float, float]:
        """Returns the effect of changed padding on the text beside it and on the other text, as shares of `later`."""
        call = self.calls[situation].get(layer)
        if call is None or not later:
            return 0.0, 0.0
        mask = self.inputs[situation][1][1].bool()
        moved = self._moved(layer, call, row=1, positions=(~mask).nonzero().flatten())
        return _rms(moved[1, mask]) / later, _rms(moved[0]) / later

    def _causal_parts(self, layer: nn.Module) -> Iterator[str]:
        """Names what sees only the past inside a layer that on the whole does not."""
        for name, part in layer.named_children():
            # No residual covers what a part does, so its effects are large, in half precision too.
            if self._direction(part, "unpadded", self.backbone.dtype)[0] == "causal":
                yield name
            else:
                # A convolution over time inside an attention module does not show from outside it.
                yield from (
                    f"{name}.{inner}".rstrip(".")
                    for inner, module in part.named_modules()
                    if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1
                )

    def _moved(self, module: nn.Module, call: _Call, row: int, positions: Tensor) -> Tensor:
        """Replaces the tokens at some positions by noise of the same size; returns how far each token moved (B, T)."""
        tokens = call.tokens.clone()
        by_token = _by_token(tokens, call.shape)
        old = by_token[row, positions]
        noise = torch.randn(old.shape, generator=self.generator).to(old.device)
        by_token[row, positions] = (noise * old.float().pow(2).mean().sqrt()).to(old.dtype)
        return _norms(call.replay(module, tokens) - call.output)

    def _last(self, calls: dict[nn.Module, _Call]) -> Tensor:
        return calls[[layer for layer in self.stack if layer in calls][-1]].output

    def _run(self, ids: Tensor, mask: Tensor) -> dict[nn.Module, _Call]:
        """Runs the backbone and records the first call of every layer and of every direct part of one."""
        calls: dict[nn.Module, _Call] = {}
        shape = tuple(ids.shape)
        arriving: dict[nn.Module, tuple[list[Any], dict[str, Any], int | str]] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            key = next((name for name, value in named.items() if _has_tokens(value, shape)), None)
            if key is not None and module not in calls:
                copies = {name: value.clone() if name == key else _shallow(value) for name, value in named.items()}
                arriving[module] = [copies[i] for i in range(len(args))], {k: copies[k] for k in kwargs}, key

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensor = _first_tensor(output)
            if module in arriving and _has_tokens(tensor, shape):
                calls[module] = _Call(*arriving.pop(module), shape, _by_token(tensor, shape).clone())

        watched = {module: None for layer in self.stack for module in (layer, *layer.children())}
        handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in watched]
        handles += [module.register_forward_hook(after) for module in watched]
        name = type(self.backbone).__name__
        try:
            run_on_ids(self.backbone, ids, mask)
        finally:
            for handle in handles:
                handle.remove()
        if not any(layer in calls for layer in self.stack):
            raise AttentionError(
                f"The layers of {name} do not pass on states of shape (B, T, ...), so nothing can be measured or read "
                f"from them. Use another base."
            )
        if not self._last(calls)[mask.bool()].isfinite().all():
            raise AttentionError(
                f"{name} gives NaN or infinity on an ordinary text: its weights are broken or {self.backbone.dtype} "
                f"cannot hold its activations. Check the checkpoint, or load it in float32."
            )
        return calls

    def _random_ids(self, *shape: int) -> Tensor:
        return random_ids(self.backbone, *shape, generator=self.generator)


@contextmanager
def _undisturbed(backbone: PreTrainedModel) -> Iterator[None]:
    """Eval mode inside; afterwards every module's mode and the random state are what they were."""
    modes = {module: module.training for module in backbone.modules()}
    with torch.random.fork_rng(devices=[backbone.device] if backbone.device.type == "cuda" else []):
        backbone.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _token_axis(tensor: Tensor, shape: tuple[int, ...]) -> int | None:
    """Returns where (B, T) stand in (B, T, ...) or, with several streams per token, in (streams, B, T, ...)."""
    return next((axis for axis in range(tensor.dim() - 2) if tensor.shape[axis : axis + 2] == shape), None)


def _has_tokens(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and _token_axis(value, shape) is not None


def _by_token(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a view (B, T, ...)."""
    axis = _token_axis(tensor, shape) or 0
    return tensor.movedim((axis, axis + 1), (0, 1))


def _first_tensor(output: Any) -> Any:
    """Returns what a layer hands on: a tensor itself, or the first of a tuple or list."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output


def _shallow(value: Any) -> Any:
    """Copies a dict that layers fill for one another, so that running one again leaves the others' alone."""
    return copy.copy(value) if isinstance(value, MutableMapping) else value


def _norms(states: Tensor) -> Tensor:
    """Returns the length of each token's vector in float32, (B, T) from (B, T, ...)."""
    return states.float().flatten(2).norm(dim=-1)


def _rms(values: Tensor) -> float:
    return values.pow(2).mean().sqrt().item() if values.numel() else 0.0


def _alike(layers: tuple[LayerReport, ...]) -> list[list[LayerReport]]:
    groups: dict[tuple[Any, ...], list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault((layer.unpadded, layer.right, layer.left, layer.causal_parts), []).append(layer)
    return list(groups.values())


def _ranges(numbers: tuple[int, ...]) -> str:
    """Writes 1, 2, 3, 5 as 1-3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
