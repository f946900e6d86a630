"""Save and reload a model once before it is trained, so that hours do not end in a folder that loads otherwise."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from ..hub.loading import load_model
from ..modules.errors import ConfigurationError
from ..utils.files import reraise_as_write_error
from ..utils.random_state import preserve_rng_state

_TEXTS = ["A short text.", "A longer text, of which more tokens are read than of the first one.", "42"]
_NOISE = 0.05
# The largest difference of a coordinate: rounding alone, 16-bit weights or another device, and a quantised base.
_EXACT, _ROUGH, _QUANTIZED = 1e-3, 0.03, 0.15


def check_reload(model: SentenceTransformer, folder: Path, *, full: bool, trust_remote_code: bool = False) -> None:
    """Saves `model`, loads it as a user does, and compares vectors.

    An adapter or a pooling that has not been trained changes nothing, and so would its loss; for the time of the check
    their weights are moved by noise. Model and random state are as before afterwards.

    Args:
        model: About to be trained; whole on this process.
        folder: Where the temporary copy goes.
        full: Whether the backbone itself trains, whose own weights are no start from nothing.
        trust_remote_code: As the base was loaded.

    Raises:
        ConfigurationError: If what is saved does not load, or gives other vectors.
        WriteError: If there is no space for one copy.
    """
    moved = list(_trained(model, without_backbone=full))
    training = model.training
    with preserve_rng_state(), _moved(moved), _scratch(folder) as place:
        expected = _vectors(model)
        with reraise_as_write_error(place):
            model.save_pretrained(str(place), create_model_card=False)
        device = _device_for(model)
        try:
            loaded = load_model(place, trust_remote_code=trust_remote_code, device=device, **_quantization(model))
            difference = (_vectors(loaded) - expected).abs().max().item()
        except Exception as error:  # of many libraries
            reason = " ".join(str(error).split())[:300]
            raise ConfigurationError(
                f"What this recipe trains cannot be loaded once it is saved: {reason} Change model.lora or model.tune."
            ) from error
        finally:
            model.train(training)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    limit = _limit(model, device)
    if not difference <= limit:
        raise ConfigurationError(
            f"What this recipe trains gives other vectors once it is saved and loaded: they differ by {difference:.2g} "
            f"(limit {limit:g}). Change model.lora (its target_modules) or model.tune; nothing was trained yet."
        )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Gives a place that a killed run leaves for the next start to remove; only one run at a time is in `folder`."""
    place = folder / ".reload.partial"
    shutil.rmtree(place, ignore_errors=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _vectors(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(_TEXTS, convert_to_tensor=True, show_progress_bar=False).float().cpu()


def _trained(model: SentenceTransformer, *, without_backbone: bool) -> Iterator[nn.Parameter]:
    for number, module in enumerate(model):
        if number > 0 or not without_backbone:
            yield from (weight for weight in module.parameters() if weight.requires_grad)


@contextmanager
def _moved(weights: list[nn.Parameter]) -> Iterator[None]:
    """Adds noise to weights, and takes them back to the last bit."""
    generator = torch.Generator().manual_seed(0)
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.add_(_NOISE * torch.randn(weight.shape, generator=generator).to(weight))
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


def _device_for(model: SentenceTransformer) -> str:
    """Returns the model's device if a second copy fits there, else the CPU."""
    if model.device.type != "cuda":
        return str(model.device)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return str(model.device) if torch.cuda.mem_get_info(model.device)[0] > 1.5 * size else "cpu"


def _quantization(model: SentenceTransformer) -> dict[str, Any]:
    """Returns what loads the base as it was quantised for this run: a saved adapter does not say it."""
    config = getattr(model[0].model.config, "quantization_config", None)
    return {} if config is None else {"model_kwargs": {"quantization_config": config}}


def _limit(model: SentenceTransformer, device: str) -> float:
    if getattr(model[0].model.config, "quantization_config", None) is not None:
        return _QUANTIZED
    narrow = any(weight.dtype in (torch.float16, torch.bfloat16) for weight in model.parameters())
    return _ROUGH if narrow or torch.device(device).type != model.device.type else _EXACT
