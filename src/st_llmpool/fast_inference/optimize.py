"""Switch the fast paths of one model on, after comparing each with the plain forward on probe batches, and off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention_proof import PACKED_SDPA, attention_of
from ..modules.attention import decoder_layers, find_backbone, random_ids, why_no_forward
from ..modules.layer_readout import TokenSpans
from ..utils.random_state import preserve_modes
from .length_groups import CPU_FORWARD_COST, OUTPUTS, NotApplicable, measure_forward_cost, run_in_groups
from .packing import run_packed, why_not_packed
from .shared_start import run_shared, shared_start, why_not_shared

logger = logging.getLogger(__name__)

Features = dict[str, Any]
_WAYS = ("shared start", "packing", "length groups")
_SHARED = 4
_LONGEST_PROBE = {"cpu": 1024}  # tokens: seconds for some hundred million parameters
_LONGEST_PROBE_ELSEWHERE = 8192 + 64


def optimize_inference(model: nn.Module, on: bool = True) -> FastInference:
    """Switch the fast paths of one model on or off; switching on compares each with the plain forward.

    A start that all texts of a batch share (an instruction) is computed once under causal attention, and padded batches
    run as one row of real tokens, or in groups of similar length. Vectors are the same up to rounding. Training and
    gradients run plainly, and nothing is saved. While it is on, hooks on layers may see other shapes, and
    ``config._attn_implementation`` names the packed attention.

    The comparison runs small batches: texts of mixed lengths, padded on the right and on the left, with a shared start,
    and texts longer than the attention windows. A path that differs by more than rounding is not used. Call it again
    after weights have changed.

    Args:
        model: A SentenceTransformer on an ``LLMTransformer``; any other model runs plainly, as the result says.
        on: False restores the plain forward.

    Returns:
        The paths in use and why the others are not; ``str`` gives one line.

    Example:
        >>> from st_llmpool import build_embedder
        >>> from st_llmpool.data import builtin_backbone
        >>> model = build_embedder(builtin_backbone(), attention="bidirectional", verify=False)
        >>> print(optimize_inference(model))
        fast inference: packing, length groups (no shared start: attention is bidirectional, ...)
        >>> print(optimize_inference(model, False))
        plain inference: switched off
    """
    module: Any = model[0] if isinstance(model, nn.Sequential) and len(model) else model
    if not hasattr(type(module), "batch_runner"):
        return FastInference(dict.fromkeys(_WAYS, f"{type(module).__name__} has no batch_runner"))
    module.batch_runner = None
    backbone = find_backbone(module)
    if backbone.config._attn_implementation == PACKED_SDPA:
        backbone.set_attn_implementation("sdpa")
    if not on:
        return FastInference(dict.fromkeys(_WAYS, "switched off"))
    with preserve_modes(module), torch.inference_mode():
        found = _compare(module, backbone)
    if found.uses("packing"):
        backbone.set_attn_implementation(PACKED_SDPA)  # which is sdpa for every batch that is not packed
    if any(map(found.uses, _WAYS)):
        module.batch_runner = found
    logger.info("%s: %s", type(backbone).__name__, found)
    return found


@contextmanager
def optimized_inference(model: nn.Module) -> Iterator[FastInference]:
    """Optimise a model inside a ``with`` block, if it is not yet; yields what :func:`optimize_inference` returns."""
    module = model[0] if isinstance(model, nn.Sequential) and len(model) else model
    earlier = getattr(module, "batch_runner", None)
    try:
        yield earlier if isinstance(earlier, FastInference) else optimize_inference(model)
    finally:
        if earlier is None:
            optimize_inference(model, False)


@dataclass(frozen=True)
class FastInference:
    """The fast paths of one model; the ``batch_runner`` of an ``LLMTransformer``.

    Attributes:
        reasons: Path -> why it is not used; absent for those that are.
        longest: Longest text, in tokens, that the comparison covers; batches with longer ones run plainly. None is no
            limit: no attention window is longer than the probe.
        differences: Path -> largest relative difference from the plain forward over all probes, texts and layers.
        forward_cost: Fixed overhead of one forward, in tokens: a constant on a CPU, measured elsewhere.
    """

    reasons: dict[str, str]
    longest: int | None = None
    differences: dict[str, float] = field(default_factory=dict)
    forward_cost: int = CPU_FORWARD_COST

    def uses(self, way: str) -> bool:
        """Return whether a path ("shared start", "packing", "length groups") is used."""
        return way not in self.reasons

    def __str__(self) -> str:
        """Return one line: the paths in use, and why the others are not."""
        used = [way for way in _WAYS if self.uses(way)]
        if not used:
            return f"plain inference: {'; '.join(dict.fromkeys(self.reasons.values()))}"
        line = f"fast inference: {', '.join(used)}"
        if self.longest is not None:
            line += f", texts up to {self.longest} tokens"
        unused = "; ".join(f"no {way}: {reason}" for way, reason in self.reasons.items())
        return f"{line} ({unused})" if unused else line

    def __call__(self, module: Any, features: Features, spans: TokenSpans) -> Features:
        """Run one batch in inference; arguments as for ``LLMTransformer.run``."""
        if not self._applies(module, features, spans):
            return module.run(features, spans)
        mask = features["attention_mask"]
        cost = self.forward_cost
        padding = int((mask == 0).sum())
        # An attention that was replaced or switched since then is respected.
        packs = padding and self.uses("packing") and module.model.config._attn_implementation == PACKED_SDPA
        if self.uses("shared start") and mask.numel() > cost and attention_of(module.model) == "causal":
            length = shared_start(features, mask)
            if (len(mask) - 1) * length > cost + (padding if packs else 0):
                return run_shared(module, features, spans, length, cost=cost, run_rest=self._padded)
        if packs:
            return run_packed(module, features, spans)
        return self._padded(features, spans, module.run, cost=cost)

    def _applies(self, module: Any, features: Features, spans: TokenSpans) -> bool:
        if torch.compiler.is_compiling() or spans.text is not None or "position_ids" in features:
            return False
        if self.longest is not None and spans.mask.shape[1] > self.longest:
            return False
        wants_states = getattr(module.config, "output_hidden_states", False)
        return not wants_states and not why_no_forward(module.model, _samples(module.model))

    def _padded(self, features: Features, spans: TokenSpans, run: Any, *, cost: int, shared: int = 0) -> Features:
        if not self.uses("length groups") or spans.mask.numel() <= cost:  # all that it could save
            return run(features, spans)
        return run_in_groups(features, spans, run, cost=cost, shared=shared)


def _compare(module: Any, backbone: Any) -> FastInference:
    def shared(features: Features, spans: TokenSpans) -> Features:
        length = shared_start(features, features["attention_mask"])
        return run_shared(module, features, spans, length, cost=0, run_rest=run_in_groups) if length else features

    def packed(features: Features, spans: TokenSpans) -> Features:
        backbone.set_attn_implementation(PACKED_SDPA)
        try:
            return run_packed(module, features, spans)
        finally:
            backbone.set_attn_implementation("sdpa")

    def grouped(features: Features, spans: TokenSpans) -> Features:
        return run_in_groups(features, spans, module.run, cost=0)

    runs = dict(zip(_WAYS, (shared, packed, grouped), strict=True))
    reasons, differences = _reasons(module, backbone), dict[str, float]()
    reach, longest = _windows(module, backbone)
    for features in _probes(module, backbone, reach) if len(reasons) < len(_WAYS) else ():
        spans = TokenSpans.of(features, include_prompt=module.include_prompt)
        plain = module(features)
        for way in [way for way in _WAYS if way not in reasons]:
            try:
                difference = _difference(plain, runs[way](features, spans), spans)
            except NotApplicable as error:
                reasons[way] = str(error)
                continue
            differences[way] = max(differences.get(way, 0.0), difference)
            if difference > _rounding(plain["token_embeddings"]):
                reasons[way] = f"vectors of {type(backbone).__name__} differ by {difference:.1e} with it"
    unused = {way: reasons[way] for way in _WAYS if way in reasons}
    measures = backbone.device.type != "cpu" and unused.keys() != set(_WAYS)
    cost = measure_forward_cost(partial(_forward, module, backbone)) if measures else CPU_FORWARD_COST
    return FastInference(unused, longest, differences, cost)


def _forward(module: Any, backbone: Any, texts: int, tokens: int) -> Callable[[], float]:
    """Return a forward of texts of equal length, the plain way, that waits for the result."""
    lengths = [min(tokens, module.max_seq_length or tokens)] * texts
    features = _probe(module, backbone, lengths, "right", torch.Generator().manual_seed(0))
    spans = TokenSpans.of(features)
    return lambda: module.run(dict(features), spans)["token_embeddings"][0, 0, 0].item()


def _reasons(module: Any, backbone: Any) -> dict[str, str]:
    """Return why paths cannot be used, as far as it shows without a forward."""
    spread = why_no_forward(module.model, _samples(module.model))
    if spread:
        return dict.fromkeys(_WAYS, f"the model is {spread}")
    if _batch_sets_positions(backbone):
        return dict.fromkeys(_WAYS, "rotary positions depend on the longest text of a batch")
    device = backbone.device.type
    known = {"shared start": why_not_shared(backbone), "packing": why_not_packed(backbone, device)}
    return {way: reason for way, reason in known.items() if reason}


def _samples(model: nn.Module) -> list[nn.Parameter]:
    """Return parameters that show how a model is distributed; a look at all takes as long as a layer."""
    return [next(part.parameters()) for part in (model, decoder_layers(model)[0])]


def _batch_sets_positions(backbone: Any) -> bool:
    config = backbone.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    return bool(kinds & {"dynamic", "longrope"})


def _windows(module: Any, backbone: Any) -> tuple[int, int | None]:
    """Return the longest attention window (chunk, sparse selection) that a probe exceeds, and the first that none does.

    The second limits the comparison; None if there is no such window within the model's longest text.
    """
    config = backbone.config.get_text_config(decoder=True).to_dict()
    named = ("window", "chunk", "local", "topk", "top_k")
    sizes = [value for name, value in config.items() if isinstance(value, int) and any(part in name for part in named)]
    limit = min(module.max_seq_length or 2**30, config.get("max_position_embeddings") or 2**30)
    sizes = sorted(size for size in sizes if 1 < size < limit)
    most = _LONGEST_PROBE.get(backbone.device.type, _LONGEST_PROBE_ELSEWHERE) - 32
    within = [size for size in sizes if size <= most]
    return max(within, default=0), min((size for size in sizes if size > most), default=None)


def _probes(module: Any, backbone: Any, reach: int) -> Iterator[Features]:
    """Yield texts of mixed lengths, padded on the right and on the left, then texts that exceed a window."""
    generator = torch.Generator().manual_seed(0)
    limit = min(module.max_seq_length or 2**30, 2**30)
    mixed = [min(length, limit) for length in (9, 31, 17, 6, 24)]
    yield from (_probe(module, backbone, mixed, side, generator) for side in ("right", "left"))
    if reach + 8 > max(mixed):
        long = [min(length, limit) for length in (reach + 24, 11, reach + 9)]
        yield from (_probe(module, backbone, long, side, generator) for side in ("right", "left"))


def _probe(module: Any, backbone: Any, lengths: list[int], side: str, generator: torch.Generator) -> Features:
    ids = random_ids(backbone, len(lengths), max(lengths), generator=generator)
    ids[:, :_SHARED] = ids[:1, :_SHARED]
    count, width = torch.arange(max(lengths)), torch.tensor(lengths).unsqueeze(1)
    mask = (count < width).long()
    ids = torch.where(mask.bool(), ids, module.tokenizer.pad_token_id)
    if side == "left":
        columns = (count + width) % max(lengths)
        ids, mask = ids.gather(1, columns), mask.gather(1, columns)
    device = module.model.get_input_embeddings().weight.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "prompt_length": 2}


def _difference(plain: Features, other: Features, spans: TokenSpans) -> float:
    """Return the largest relative difference ‖plain − other‖/‖plain‖ over outputs, texts and layers."""
    found = []
    for name in OUTPUTS & plain.keys() & other.keys():
        one, two = plain[name].float(), other[name].float()
        if name == "token_embeddings":
            one, two = (tokens.masked_fill(~spans.mask.unsqueeze(-1), 0).flatten(1) for tokens in (one, two))
        found.append(((one - two).norm(dim=-1) / one.norm(dim=-1)).flatten())
    return torch.cat(found or [torch.zeros(1)]).nan_to_num(nan=torch.inf).max().item()


def _rounding(tokens: Tensor) -> float:
    """Return the relative difference that rounding may explain; autocast rounds more."""
    kind = tokens.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
    # In bfloat16 correct paths differed by up to 0.056 in 24 layers, wrong ones by 0.1 or more.
    return max(1e-4, 8 * torch.finfo(low).eps, 8 * torch.finfo(tokens.dtype).eps)
