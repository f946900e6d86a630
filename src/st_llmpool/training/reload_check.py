"""Save and reload a model once before it is trained, so that hours do not end in a folder that loads otherwise."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from ..adapters import has_adapter
from ..hub.loading import load_model
from ..modules.errors import ConfigurationError
from ..utils.files import WriteError, reraise_as_write_error
from ..utils.random_state import preserve_rng_state

_TEXTS = ["A short text.", "A longer text, of which more tokens are read than of the first one.", "42"]
_NOISE = 0.05
# The largest difference of a coordinate: rounding alone, 16-bit weights or another device, and a quantised base.
_EXACT, _ROUGH, _QUANTIZED = 1e-3, 0.03, 0.15
# Deep bases amplify the rounding of 16 bits, so it is also measured by what the noise does; a lost adapter undoes all.
_ROUGH_FRACTION = 0.2
_ROUGH_LOGITS = 0.2  # in proportion to their length, of 16-bit weights under noise; without its adapter it is about 1


def check_reload(model: SentenceTransformer, folder: Path, *, full: bool, trust_remote_code: bool = False) -> None:
    """Save `model`, load it as a user does, and compare vectors.

    A new adapter or pooling has no effect yet, and to lose it would not show: its weights are moved by noise for the
    time of the check. Model and random state are as before afterwards.

    Args:
        model: About to be trained; complete on this process.
        folder: Where the temporary copy goes.
        full: Whether the backbone itself trains, which needs no noise.
        trust_remote_code: As the base was loaded.
    """
    moved = _trained(list(model)[1:] if full else model)
    training = model.training
    with preserve_rng_state():
        before = _vectors(model)
        if has_adapter(model):
            _check_effect(model, before)
    with preserve_rng_state(), _moved(moved), _scratch(folder) as place:
        expected = _vectors(model)
        with reraise_as_write_error(place):
            model.save_pretrained(str(place), create_model_card=False)
        device = _device_for(model)
        try:
            loaded = load_model(place, trust_remote_code=trust_remote_code, device=device, **_quantization(model))
            difference = (_vectors(loaded) - expected).abs().max().item()
            changed = _changed_poolings(model, loaded)
        except Exception as error:  # of many libraries
            raise _not_loaded(error, "model.lora or model.tune") from error
        finally:
            model.train(training)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if changed:  # rounding in the backbone can hide it in the vectors
        raise ConfigurationError(
            f"What this recipe trains gives other vectors once it is saved and loaded: {changed[0]} comes back with "
            f"other values. Change model.pooling or its options; nothing was trained yet."
        )
    limit = _limit(model, device, effect=(expected - before).abs().max().item())
    if not difference <= limit:
        raise ConfigurationError(
            f"What this recipe trains gives other vectors once it is saved and loaded: they differ by {difference:.2g} "
            f"(limit {limit:.2g}). Change model.lora (its target_modules) or model.tune; nothing was trained yet."
        )


def _changed_poolings(model: SentenceTransformer, loaded: SentenceTransformer) -> list[str]:
    """Return the names of weights after the backbone that are not as they were saved."""
    found = loaded.state_dict()
    after = {name: weight for name, weight in model.state_dict().items() if not name.startswith("0.")}
    return [name for name, weight in after.items() if not torch.equal(found[name].to(weight), weight)]


def _check_effect(model: SentenceTransformer, before: torch.Tensor) -> None:
    """Refuse an adapter that moves no vector, such as one in layers above those that the pooling reads."""
    with _moved(_trained([model[0]])):
        after = _vectors(model)
    if torch.equal(before, after):
        raise ConfigurationError(
            "The adapter of model.lora changes no vector, whatever it learns. Change its layers, or model.layers that "
            "the pooling reads; nothing was trained yet."
        )


def check_language_model(
    model: Any, save: Callable[[Any, Path], None], load: Callable[[Path], Any], tokens: torch.Tensor, folder: Path
) -> None:
    """Save a copy of a language model as it will be saved at the end, load it, and compare logits.

    Weights of an adapter are moved by noise for that time, as in :func:`check_reload`.

    Args:
        model: About to be trained; complete on this process.
        save: Called with a copy, which it may change, and where to save it.
        load: Returns the saved model, as those who use it load it.
        tokens: Input (1, T).
        folder: Where the temporary copy goes.
    """
    device, training = model.device, model.training
    moved = _trained([model]) if hasattr(model, "peft_config") else []
    model.eval()
    with preserve_rng_state(), _moved(moved), _scratch(folder) as place:
        try:
            expected = _logits(model, tokens)
            copied = copy.deepcopy(model.cpu())
        finally:
            model.to(device)
            model.train(training)
        try:
            with reraise_as_write_error(place):
                save(copied, place)
            del copied
            found = _logits(load(place), tokens)
        except WriteError:
            raise
        except Exception as error:  # of many libraries
            raise _not_loaded(error, "lora or tune") from error
    difference = ((found - expected).norm() / expected.norm()).item()
    limit = _EXACT if all(weight.dtype == torch.float32 for weight in model.parameters()) else _ROUGH_LOGITS
    if not difference <= limit:
        raise ConfigurationError(
            f"What this recipe trains gives other logits once it is saved and loaded: they differ by "
            f"{100 * difference:.2g} % (limit {100 * limit:g} %). Change lora or tune; nothing was trained yet."
        )


def _not_loaded(error: Exception, settings: str) -> ConfigurationError:
    reason = " ".join(str(error).split())[:300]
    return ConfigurationError(f"What this recipe trains cannot be loaded once it is saved: {reason} Change {settings}.")


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=tokens.to(model.device)).logits.float().cpu()


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Give a place that a killed run leaves for the next start to remove; only one run at a time is in `folder`."""
    place = folder / ".reload.partial"
    shutil.rmtree(place, ignore_errors=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _vectors(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(_TEXTS, convert_to_tensor=True, show_progress_bar=False).float().cpu()


def _trained(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [weight for module in modules for weight in module.parameters() if weight.requires_grad]


@contextmanager
def _moved(weights: list[nn.Parameter]) -> Iterator[None]:
    """Add noise to weights, and take them back to the last bit."""
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
    """Return the model's device if a second copy fits there, else the CPU."""
    if model.device.type != "cuda":
        return str(model.device)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return str(model.device) if torch.cuda.mem_get_info(model.device)[0] > 1.5 * size else "cpu"


def _quantization(model: SentenceTransformer) -> dict[str, Any]:
    """Return what loads the base as it was quantised for this run: a saved adapter does not say it."""
    config = getattr(model[0].model.config, "quantization_config", None)
    return {} if config is None else {"model_kwargs": {"quantization_config": config}}


def _limit(model: SentenceTransformer, device: str, *, effect: float) -> float:
    if getattr(model[0].model.config, "quantization_config", None) is not None:
        return _QUANTIZED
    narrow = any(weight.dtype in (torch.float16, torch.bfloat16) for weight in model.parameters())
    is_rough = narrow or torch.device(device).type != model.device.type
    return max(_ROUGH, _ROUGH_FRACTION * effect) if is_rough else _EXACT
