"""PEFT adapters on the backbone: their config, initialisation, and merging into the base."""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import nn

from .modules.attention import set_attention
from .modules.errors import ConfigurationError
from .utils.reading import read_json_object

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

#: Initialisations that need neither data nor other weights of the base.
_STARTS = ("gaussian", "orthogonal", "mica")

#: What peft and torch raise over a config that does not fit a model: its patterns are regular expressions, some of its
#: options import other libraries.
PEFT_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, ImportError, LookupError, re.error)

_MAGNITUDE = "lora_magnitude_vector"  # of DoRA
#: Fields of a peft config that an error shows.
_SHOWN = ("target_modules", "modules_to_save", "trainable_token_indices", "use_dora")
#: Fields of a peft config that do not affect what the adapter computes.
_ABOUT_A_SAVE = {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type", "auto_mapping"}


def lora_config(peft_config: PeftConfig | Mapping[str, Any] | str) -> PeftConfig:
    """Return the peft config for a user's short form, the fields of a ``LoraConfig`` or ``"paper"``."""
    from peft import LoftQConfig, LoraConfig

    check_peft()
    if isinstance(peft_config, str):
        if peft_config != "paper":
            raise ConfigurationError(
                f"peft_config={peft_config!r} is unknown; the only name is 'paper'. Pass a dict of LoraConfig fields."
            )
        peft_config = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1}
    if not isinstance(peft_config, Mapping):
        return peft_config
    _check_fields(peft_config)
    fields = {"target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION", **peft_config}
    if fields.get("init_lora_weights") == "loftq":
        fields.setdefault("loftq_config", LoftQConfig())  # peft asks for one
    try:
        return LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"peft_config={dict(peft_config)} is not a LoraConfig: {error}.") from error


def _check_fields(fields: Mapping[str, Any]) -> None:
    """Check what peft uses as it comes: "no" counts as true there, and no error says that a rate is out of range."""
    from peft import LoraConfig

    for name, kind in get_type_hints(LoraConfig).items():
        if name not in fields or kind not in (bool, int, float):
            continue
        value = fields[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (isinstance(value, bool) if kind is bool else is_number):
            wanted = "true or false" if kind is bool else "a number"
            raise ConfigurationError(f"{name}={value!r} of the adapter must be {wanted}.")
    dropout, alpha = fields.get("lora_dropout", 0), fields.get("lora_alpha", 1)
    if not 0 <= dropout < 1:
        raise ConfigurationError(f"lora_dropout={dropout} of the adapter must be at least 0 and below 1.")
    if not 0 < alpha < float("inf"):
        raise ConfigurationError(f"lora_alpha={alpha} of the adapter must be above 0: it scales what the adapter adds.")
    if fields.get("inference_mode"):
        raise ConfigurationError("inference_mode=True of the adapter freezes it: leave it out to train.")


def check_peft() -> None:
    """Check that the installed transformers accepts the installed peft."""
    from transformers.integrations import peft as integration
    from transformers.utils import check_peft_version

    try:
        check_peft_version(min_version=integration.MIN_PEFT_VERSION)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"No adapter works with this peft {metadata.version('peft')} and transformers "
            f"{metadata.version('transformers')}: {error} Use an older transformers; st-llmpool[train] has one."
        ) from error


def add_adapter(model: SentenceTransformer, peft_config: PeftConfig | Mapping[str, Any] | str) -> None:
    """Add a trainable PEFT adapter to the backbone; the pooling stays fully trainable.

    Args:
        model: Changed in place.
        peft_config: A ``peft`` config, the fields of a ``LoraConfig`` as a dict, or ``"paper"``. With
            ``init_lora_weights="loftq"`` the adapter starts at the quantisation error of a 4-bit backbone.

    Raises:
        ConfigurationError: If the config is unknown, or cannot train or be saved on this backbone.
    """
    wanted = lora_config(peft_config)
    check_start(wanted, in_4_bits=is_in_4_bits(model.transformers_model))
    config = without_loftq(wanted)
    asked = reprlib.repr({key: value for key, value in config.to_dict().items() if value and key in _SHOWN})
    try:
        model.add_adapter(config)
        # New submodules may have an is_causal of their own.
        set_attention(model, model[0].attention)
        if getattr(model.transformers_model, "is_quantized", False):
            _try_training_forward(model)
    except PEFT_ERRORS as error:
        raise misfit(f"peft_config {asked}", type(model.transformers_model).__name__, error) from error
    if config is not wanted:
        start_at_quantization_error(model.transformers_model)


def _try_training_forward(model: SentenceTransformer) -> None:
    """Run one text twice as in training: DoRA on 8-bit layers, for one, fails in the second forward."""
    was_training = model.training
    with torch.random.fork_rng():
        model.train()
        for _ in range(2):
            model(batch_to_device(model.preprocess(["a text"]), model.device))
    model.train(was_training)


def misfit(asked: str, architecture: str, error: Exception) -> ConfigurationError:
    """Return the error for an adapter, as it was asked for, that does not fit a model, with the library's message."""
    words = " ".join(str(error).split()).rstrip(".")
    hint = "Use target_modules='all-linear', or names of its linear layers." if "target module" in words.lower() else ""
    return ConfigurationError(f"{asked} does not work on this {architecture}: {words}. {hint}".rstrip())


def has_adapter(model: SentenceTransformer) -> bool:
    """Whether the backbone carries a PEFT adapter."""
    return bool(getattr(model.transformers_model, "_hf_peft_config_loaded", False))


def continue_adapter(model: SentenceTransformer, peft_config: PeftConfig | Mapping[str, Any] | str | None) -> None:
    """Make a loaded adapter trainable again, and refuse one of another config than the one asked for."""
    backbone: Any = model.transformers_model
    name = backbone.active_adapters()[0]
    if peft_config is not None:
        saved, wanted = backbone.peft_config[name].to_dict(), lora_config(peft_config).to_dict()
        wanted = {key: value for key, value in wanted.items() if key not in _ABOUT_A_SAVE}
        if wanted.get("target_modules") == "all-linear":
            del wanted["target_modules"]  # peft replaces it with the names of the layers
        different = [key for key in wanted if _plain(wanted[key]) != _plain(saved.get(key))]
        if different:
            found = ", ".join(f"{key}={saved.get(key)!r}" for key in different)
            asked = ", ".join(f"{key}={wanted[key]!r}" for key in different)
            raise ConfigurationError(
                f"The saved embedder has an adapter with {found}, but {asked} is asked for. Use the same settings to "
                f"continue it, leave peft_config out in Python, or merge it first with st-llmpool export --merge."
            )
    backbone.set_adapter(name)  # loaded adapters are frozen


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, list, tuple)) else value or None


def check_start(peft_config: Any, *, in_4_bits: bool) -> None:
    """Refuse adapters that start from data or from changed weights of the base, or that no text would activate.

    Only the adapter is saved: on the unchanged base, an adapter that started by changing it would give other vectors.
    """
    if getattr(peft_config, "alora_invocation_tokens", None) is not None:
        raise ConfigurationError(
            f"alora_invocation_tokens={peft_config.alora_invocation_tokens} are in no text to embed. Leave it out."
        )
    start = getattr(peft_config, "init_lora_weights", True)
    if isinstance(start, bool) or start in _STARTS:
        return
    if start != "loftq":
        raise ConfigurationError(
            f"init_lora_weights={start!r} does not work here: it needs data before training, or changes the base's "
            f"weights, which are not saved with an adapter. Use true, {', '.join(_STARTS)}, or loftq on 4 bits."
        )
    if not in_4_bits:
        raise ConfigurationError(
            "init_lora_weights='loftq' needs a base in 4 bits. Use quantization nf4, or another initialisation."
        )
    if peft_config.use_dora:
        raise ConfigurationError(
            "init_lora_weights='loftq' and use_dora cannot be combined: LoftQ changes the norms that DoRA measures."
        )


def without_loftq(peft_config: Any) -> Any:
    """Return the config with the default initialisation in place of LoftQ, for which peft changes the base."""
    if getattr(peft_config, "init_lora_weights", None) != "loftq":
        return peft_config
    return dataclasses.replace(peft_config, init_lora_weights=True, loftq_config={})


def start_at_quantization_error(backbone: nn.Module) -> None:
    """Set each adapter on a 4-bit layer to the best low-rank approximation of the quantisation error of its weight W.

    With Q the dequantised weight and the singular values of ``W − Q = U S Vᵀ``, ``A = √S Vᵀ`` and ``B = U √S`` of the r
    largest (over the adapter's scale), Q + scale · B A is the nearest to W of this rank. This is one step of LoftQ (Li
    et al. 2023, arXiv 2310.08659, algorithm 1), which leaves Q unchanged; peft's ``replace_lora_weights_loftq``
    computes the same on a GPU. The singular vectors come from a randomised method, a few per cent from the optimum.

    Args:
        backbone: A model with newly initialised adapters on bitsandbytes' 4-bit layers. Its unquantised weights are
            loaded again, into CPU memory, in the checkpoint's dtype.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer

    base = cast("PreTrainedModel", backbone).config._name_or_path
    unquantized = load_again(backbone, base, dtype="auto")
    found: dict[str, Any] = {name: module for name, module in backbone.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in found.items():
        if not _is_in_4_bits(layer.get_base_layer()):
            continue
        kept = layer.get_base_layer().weight
        weight = unquantized.get_submodule(name).weight.to(device=kept.device, dtype=torch.float32)
        if weight.shape != kept.quant_state.shape:
            raise ConfigurationError(
                f"init_lora_weights='loftq' needs the unquantised weights, and {base!r} has {name} in 4 bits. Name "
                f"the unquantised base with quantization nf4, or use another initialisation."
            )
        lost = weight - dequantize_4bit(kept.data, kept.quant_state).float()
        for adapter, rank in layer.r.items():
            left, sizes, right = torch.svd_lowrank(lost, q=min(rank + 16, *lost.shape), niter=4)
            root = sizes[:rank].sqrt()
            with torch.no_grad():
                layer.lora_A[adapter].weight[: len(root)] = root.unsqueeze(1) * right.T[:rank]
                layer.lora_B[adapter].weight[:, : len(root)] = left[:, :rank] * root / layer.scaling[adapter]


def load_again(backbone: nn.Module, base: str, **kwargs: Any) -> Any:
    """Load a base again, with the class and from the commit of `backbone`, with or without an adapter."""
    loaded: Any = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone  # type: ignore[operator]
    return type(loaded).from_pretrained(base, revision=getattr(loaded.config, "_commit_hash", None), **kwargs)


def is_in_4_bits(model: nn.Module) -> bool:
    """Return whether a model has 4-bit layers of bitsandbytes."""
    return any(_is_in_4_bits(module) for module in model.modules())


def _is_in_4_bits(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit"


def tidy_adapter(folder: Path) -> None:
    """Sort names that peft keeps in sets, and name DoRA's magnitudes as transformers expects, with ``.weight``.

    The module code of a saved model calls this after a save, by name, wherever the package is installed.
    """
    file, adapter = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = json.loads(file.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    weights = load_file(adapter)
    if any(name.endswith(_MAGNITUDE) for name in weights):
        full = {f"{name}.weight" if name.endswith(_MAGNITUDE) else name: weight for name, weight in weights.items()}
        renamed = adapter.with_suffix(".partial")  # a sibling: what was loaded is still read from the file
        save_file(full, renamed, metadata={"format": "pt"})
        renamed.replace(adapter)


def merge_adapter(model: SentenceTransformer, source: Path) -> None:
    """Replace the backbone of `model` with its base and the adapter merged, in place.

    The base is loaded again: after merging a reloaded adapter, transformers keeps the adapter's weight names, and the
    model it then saves loads with random weights. A base in 4 or 8 bits is dequantised, so that the merged model gives
    the vectors of the trained one.
    """
    from peft import PeftModel

    base = str(read_json_object(source / "adapter_config.json").get("base_model_name_or_path"))
    dtype = model.transformers_model.get_input_embeddings().weight.dtype
    quantization = getattr(model.transformers_model.config, "quantization_config", None)
    given = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": "cpu"}}
    backbone = load_again(model.transformers_model, base, dtype=dtype, **given)
    if quantization is not None:
        backbone = backbone.dequantize(dtype)
    model[0].model = PeftModel.from_pretrained(backbone, str(source)).merge_and_unload()
    model.eval()
