"""Measure whether a loaded model attends the way its configuration says, layer by layer and with padding.

A flag that is accepted proves nothing: state-space layers ignore it, some families drop it where a batch has no
padding, others leak padding. So each layer runs again on its input with a few tokens changed: which others move?
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from dataclasses import asdict, dataclass
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
from .modules.errors import AttentionError, check_choice
from .utils.random_state import preserve_modes
from .utils.words import ranges

#: The attention of a model that runs packed batches, and all others as sdpa does; see `fast_inference`.
PACKED_SDPA = "st_llmpool_packed"
_MEANINGS = {
    "causal": "no layer lets a token see what follows it",
    "bidirectional": "every layer lets a token see what follows it",
    "partial": "some layers attend in both directions, others see only what came before",
    "batch_dependent": "a text's vector depends on the other texts of its batch",
    "padding_leak": "padding changes the vectors of real tokens",
    "padding_side": "left and right padding give different vectors",
}
_AFTER_LOAD = "Call set_attention after every load and PEFT wrap"
_WAYS_OUT = {
    "causal": f"{_AFTER_LOAD}; recurrent and linear-attention layers need attention='causal' or another base.",
    "bidirectional": "Call set_attention(model, 'causal'), or build with attention='bidirectional'.",
    "partial": "Use attention='causal' or another base, or pass allow_partial=True to accept and record it.",
    "batch_dependent": f"{_AFTER_LOAD}, or use another attn_implementation.",
    "padding_leak": "Use another attn_implementation or another base.",
    "padding_side": f"{_AFTER_LOAD} (it counts absolute positions from the first real token), or use another base.",
}
VERDICTS = tuple(_MEANINGS)

# Two texts of 12 tokens, or of 12 and 9 with 3 of padding: several tokens before and after those that change, and an
# odd shift, which no block of tokens hides.
_FULL, _SHORT = 12, 9
# Effects are ratios. Over 161 configurations the smallest real one was 2.4e-4 and the largest in a causal model 1.4e-6.
_SEEN = 2e-5
# Noise is measured on the model itself; an effect must stand out from it by this factor.
_ABOVE_NOISE = 8.0
# Direction, signal, effect on later tokens and noise of one module.
_Effect = tuple[str, float, float, float]


@dataclass(frozen=True)
class LayerReport:
    """What one decoder layer does, run alone on the input that it received.

    Attributes:
        number: 1 for the first layer.
        name: Its class.
        unpadded, right, left: `"bidirectional"`, `"causal"`, `"tokenwise"` (no token moves another) or `"not_run"`,
            without padding, padded on the right and padded on the left.
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
        """Return what the layer is, `"partial"` if a part of it sees only what came before."""
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
        batch: Change of a text's vectors with padding, or with other texts in its batch, as a fraction of the
            difference between two texts.
        side, leak, noise: The same between left and right padding, for other ids in the padding, and for another
            batch size alone, which is rounding.
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
    light: bool = False

    @property
    def ok(self) -> bool:
        """Whether the verdict is the expected one; the light form does not distinguish partial from bidirectional."""
        found = (self.verdict, self.expected)
        return self.verdict == self.expected or (self.light and found == ("bidirectional", "partial"))

    @property
    def causal_layers(self) -> tuple[int, ...]:
        """Numbers, from 1, of the layers in which a token, or a part of the layer, sees only what came before."""
        return tuple(layer.number for layer in self.layers if layer.direction in ("causal", "partial"))

    @property
    def signal(self) -> float:
        """Least effect of a later token on an earlier one over the reverse, of layers that mix tokens; 0 if causal."""
        mixing = [layer.signal for layer in self.layers if layer.direction not in ("tokenwise", "not_run")]
        return min(mixing, default=0.0)

    def raise_for_failure(self) -> None:
        """Raise AttentionError, with architecture, layers and the way out, unless `ok`."""
        if not self.ok:
            layers = f", causal in layers {ranges(self.causal_layers)}" if self.verdict == "partial" else ""
            raise AttentionError(
                f"{self.architecture} ({self.attn_implementation}, {self.dtype}) should be {self.expected} but is "
                f"{self.verdict}: {_MEANINGS[self.verdict]}{layers}. {_WAYS_OUT[self.verdict]}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for a model card or a JSON file."""
        return {"ok": self.ok, "signal": self.signal, "causal_layers": list(self.causal_layers), **asdict(self)}

    def __str__(self) -> str:
        """Return a readable table: the verdict, then layers that behave alike on one line."""
        verdict = f"{self.verdict}, expected {self.expected} -> {'ok' if self.ok else 'NOT OK'}"
        head = f"{self.architecture} ({self.attn_implementation}, {self.dtype}): {verdict}"
        lines = [head, f"  {_MEANINGS[self.verdict]}"]
        if self.light:
            return "\n".join([*lines, "  light form: two forwards, the last layer only"])
        changes = {"batch": self.batch, "padding side": self.side, "padding ids": self.leak, "noise": self.noise}
        lines.append("  " + "  ".join(f"{name} {change:.1e}" for name, change in changes.items()))
        groups: dict[tuple[str, ...], list[LayerReport]] = {}
        for layer in self.layers:
            alike = (layer.unpadded, layer.right, layer.left, ", ".join(layer.causal_parts))
            groups.setdefault(alike, []).append(layer)
        rows: list[tuple[str, ...]] = [
            ("layers", "unpadded", "padded right", "padded left", "signal", "noise", "leak", "causal parts")
        ]
        for (*directions, parts), group in groups.items():
            signal = min(layer.signal for layer in group)
            noise, leak = max(layer.noise for layer in group), max(layer.leak for layer in group)
            figures = (f"{figure:.1e}" for figure in (signal, noise, leak))
            rows.append((ranges(layer.number for layer in group), *directions, *figures, parts))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
        return "\n".join(lines)


def verify_attention(model: nn.Module, expected: str | None = None, *, light: bool = False) -> AttentionReport:
    """Measure the attention of the loaded weights: direction, padding and batch, layer by layer.

    It takes six forwards of at most [2, 12] tokens and about as long again for single layers, needs no tokenizer, and
    leaves weights, modes and random state as they were. Each layer is run again on the input that it received, with a
    few tokens changed: a causal layer moves later tokens only. Effects are ratios, so they hold in half precision.

    It does not cover texts longer than an attention window, chunk or sparse selection, flat (packed) input, and a
    causal path inside one attention module that is neither a submodule nor a convolution.

    Args:
        model: A transformers model, also wrapped by PEFT, or a SentenceTransformer on one.
        expected: One of `VERDICTS`; by default what the model's first module or config says. Pass `"partial"` for a
            model that was built with `allow_partial=True`.
        light: Run only two forwards of the model: enough to notice a lost flag, not to prove a model.

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
    check_choice("expected", expected, VERDICTS)
    backbone = find_backbone(model)
    about: dict[str, Any] = {
        "expected": expected,
        "architecture": type(backbone).__name__,
        "attn_implementation": implementation_of(backbone),
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
    with preserve_modes(backbone):
        if light:
            return AttentionReport(verdict=measured_attention(backbone), light=True, **about)
        probe = _Probe(backbone)
        layers, whole = probe.layers(), probe.whole()
        mixing = any(layer.direction not in ("tokenwise", "not_run") for layer in layers)
        verdict = _verdict(layers, whole, backbone.dtype) if mixing else measured_attention(backbone)
    return AttentionReport(verdict=verdict, layers=layers, **whole, **about)


def attention_of(model: nn.Module) -> str:
    """Return the attention that the config of `model` asks for; `verify_attention` measures it."""
    return config_attention(find_backbone(model).config)


def config_attention(config: PreTrainedConfig) -> str:
    """Return the attention that a config asks for: `"causal"` or `"bidirectional"`."""
    text_config = config.get_text_config(decoder=True)
    bidirectional = is_encoder(text_config) or getattr(text_config, "is_causal", True) is False
    return "bidirectional" if bidirectional else "causal"


def implementation_of(model: nn.Module) -> str:
    """Return the name of the attention implementation; the one that packs batches is ``sdpa`` otherwise."""
    name = str(find_backbone(model).config._attn_implementation)
    return "sdpa" if name == PACKED_SDPA else name


def _claim(model: nn.Module) -> str:
    """Return what the module's own setting says (a class of ours, or a repository's copy), else the config."""
    module = model[0] if isinstance(model, nn.Sequential) and len(model) else model
    claim = getattr(module, "attention", None)
    return claim if claim in ATTENTION_MODES else attention_of(model)


def _verdict(layers: tuple[LayerReport, ...], whole: dict[str, Any], dtype: torch.dtype) -> str:
    limit, modes = max(_rounding(dtype), _ABOVE_NOISE * whole["noise"]), set(ATTENTION_MODES)
    if whole["leak"] > limit or any(layer.leak > max(_SEEN, _ABOVE_NOISE * layer.noise) for layer in layers):
        return "padding_leak"
    if whole["batch"] > limit or any({layer.unpadded, layer.right} == modes for layer in layers):
        return "batch_dependent"
    if whole["side"] > limit or any({layer.right, layer.left} == modes for layer in layers):
        return "padding_side"
    directions = {layer.direction for layer in layers} - {"tokenwise", "not_run"}
    if directions == {"bidirectional"}:
        return "bidirectional"
    return "partial" if directions & {"bidirectional", "partial"} else "causal"


def _rounding(dtype: torch.dtype) -> float:
    """Return the change of a forward that rounding may explain, as a fraction of the difference between two texts."""
    return max(1e-4, 16 * torch.finfo(dtype).eps)


@dataclass
class _Call:
    """One call of a module: its arguments, which of them holds the tokens, and what it returned."""

    arguments: dict[int | str, Any]  # by position or name
    key: int | str
    shape: tuple[int, ...]
    output: Tensor

    def replay(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """Run the module again on other tokens and returns the states of each token (B, T, ...)."""
        given = {name: tokens if name == self.key else _shallow(value) for name, value in self.arguments.items()}
        args = [value for name, value in given.items() if isinstance(name, int)]
        try:
            output = module(*args, **{name: value for name, value in given.items() if isinstance(name, str)})
        except Exception as error:
            reason = f"{type(module).__name__} cannot be run alone ({type(error).__name__}: {error})"
            raise AttentionError(f"{reason}, so its attention cannot be proven. Use another base.") from error
        return _by_token(_first_tensor(output), self.shape)


class _Probe:
    """Runs a backbone, and each of its layers alone, on two random texts."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        self.backbone = backbone
        self.stack = decoder_layers(backbone)
        self.generator = torch.Generator().manual_seed(20240917)
        self.texts = random_ids(backbone, 2, _FULL, generator=self.generator)
        self.padding = random_ids(backbone, 2, _FULL - _SHORT, generator=self.generator)
        self.calls: dict[str, dict[nn.Module, _Call]] = {}

    def layers(self) -> tuple[LayerReport, ...]:
        """Return what every decoder layer does in the three situations."""
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
        """Return the changes of whole forwards, as fractions of the difference between the two texts."""
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

        def change(first: Tensor, second: Tensor, quantile: float = nearly_all) -> float:
            return (_norms(first - second).flatten().quantile(quantile) / scale).item()

        text = right[1:, :_SHORT]
        return {
            "noise": change(alone_full, unpadded[:1]),
            "batch": max(change(alone_short, text), change(right[:1], unpadded[:1])),
            "side": change(left[1:, -_SHORT:], text),
            "leak": change(other_padding[1:, :_SHORT], text, 1.0),  # the same shapes, so nothing flips by rounding
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

    def _direction(self, module: nn.Module, situation: str, dtype: torch.dtype = torch.float32) -> _Effect:
        """Return the effect of changed tokens; what moves by less than the rounding of `dtype` did not move."""
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

    def _effect(self, module: nn.Module, call: _Call, real: Tensor, changed: Tensor, dtype: torch.dtype) -> _Effect:
        moved = self._moved(module, call, positions=changed)
        earlier, later = _rms(moved[1, real[real < changed[0]]]), _rms(moved[1, real[real > changed[-1]]])
        noise = _rms(moved[0])
        # Experts run on other groups of tokens when one token changes, so that others are rounded differently.
        floor = max(_ABOVE_NOISE * noise, 4 * torch.finfo(dtype).eps * _rms(moved[1, changed]))
        signal = earlier / later if later else 0.0
        if earlier > max(floor, _SEEN * later):
            return "bidirectional", signal, later, noise
        return ("causal" if later > floor else "tokenwise"), signal, later, noise

    def _leak(self, layer: nn.Module, situation: str, later: float) -> tuple[float, float]:
        """Return the effect of changed padding on its own text and on the other one, as fractions of `later`."""
        call = self.calls[situation].get(layer)
        if call is None or not later:
            return 0.0, 0.0
        mask = self.inputs[situation][1][1].bool()
        moved = self._moved(layer, call, positions=(~mask).nonzero().flatten())
        return _rms(moved[1, mask]) / later, _rms(moved[0]) / later

    def _causal_parts(self, layer: nn.Module) -> Iterator[str]:
        """Name the parts of a bidirectional layer that see only the past."""
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

    def _moved(self, module: nn.Module, call: _Call, positions: Tensor) -> Tensor:
        """Replace tokens of the second text by noise of the same size; returns how far each token moved (B, T)."""
        tokens = call.arguments[call.key].clone()
        by_token = _by_token(tokens, call.shape)
        old = by_token[1, positions]
        noise = torch.randn(old.shape, generator=self.generator).to(old.device)
        by_token[1, positions] = (noise * old.float().pow(2).mean().sqrt()).to(old.dtype)
        return _norms(call.replay(module, tokens) - call.output)

    def _last(self, calls: dict[nn.Module, _Call]) -> Tensor:
        return calls[[layer for layer in self.stack if layer in calls][-1]].output

    def _run(self, ids: Tensor, mask: Tensor) -> dict[nn.Module, _Call]:
        """Run the backbone and records the first call of every layer and of every direct part of one."""
        calls: dict[nn.Module, _Call] = {}
        shape = tuple(ids.shape)
        arriving: dict[nn.Module, tuple[dict[int | str, Any], int | str]] = {}

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            key = next((name for name, value in named.items() if _has_tokens(value, shape)), None)
            if key is not None and module not in calls:
                copies = {name: value.clone() if name == key else _shallow(value) for name, value in named.items()}
                arriving[module] = copies, key

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            tensor = _first_tensor(output)
            if module in arriving and _has_tokens(tensor, shape):
                calls[module] = _Call(*arriving.pop(module), shape, _by_token(tensor, shape).clone())

        watched = {module: None for layer in self.stack for module in (layer, *layer.children())}
        handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in watched]
        handles += [module.register_forward_hook(after) for module in watched]
        try:
            run_on_ids(self.backbone, ids, mask)
        finally:
            for handle in handles:
                handle.remove()
        if not any(layer in calls for layer in self.stack):
            name = type(self.backbone).__name__
            raise AttentionError(f"The layers of {name} pass on no states (B, T, ...) to measure. Use another base.")
        if not self._last(calls)[mask.bool()].isfinite().all():
            broken = f"{type(self.backbone).__name__} gives NaN or infinity in {self.backbone.dtype}"
            raise AttentionError(f"{broken}. Check the checkpoint, or load it in float32.")
        return calls


def _token_axis(tensor: Tensor, shape: tuple[int, ...]) -> int | None:
    """Return where (B, T) stand in (B, T, ...) or, with several streams per token, in (streams, B, T, ...)."""
    return next((axis for axis in range(tensor.dim() - 2) if tensor.shape[axis : axis + 2] == shape), None)


def _has_tokens(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and _token_axis(value, shape) is not None


def _by_token(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a view (B, T, ...)."""
    axis = _token_axis(tensor, shape) or 0
    return tensor.movedim((axis, axis + 1), (0, 1))


def _first_tensor(output: Any) -> Any:
    """Return what a layer hands on: a tensor itself, or the first of a tuple or list."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output


def _shallow(value: Any) -> Any:
    """Copy a dict through which layers pass keys and values on, so that a layer run again does not change it."""
    return copy.copy(value) if isinstance(value, MutableMapping) else value


def _norms(states: Tensor) -> Tensor:
    """Return the length of each token's vector in float32, (B, T) from (B, T, ...)."""
    return states.float().flatten(2).norm(dim=-1)


def _rms(values: Tensor) -> float:
    return values.pow(2).mean().sqrt().item() if values.numel() else 0.0
