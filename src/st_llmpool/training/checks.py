"""Validate a recipe before any weights are loaded: names, libraries, layers, adapter targets, then its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.util import batch_to_device

from ..adapters import PEFT_ERRORS, check_start, lora_config, misfit, without_loftq
from ..designs import DESIGNS, POOLINGS, resolve_base
from ..losses.build import check_columns, check_loss
from ..modules.errors import ConfigurationError, DataError, check_choice
from ..modules.llm_transformer import resolve_layers
from ..saved_embedder import is_saved_embedder, read_architecture
from ..summary_cache.cached_backbone import reads_tokens
from ..utils.extras import require
from ..utils.files import check_writable
from ..utils.random_state import preserve_modes
from .freezing import check_freezing, freeze_pooling
from .further_arguments import check_reports
from .optimizers import check_optimizer
from .recipe import ModelSettings, Recipe, TrainingSettings
from .sparse_tuning import check_number_of_layers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedConfig

# Long enough that a small dropout meets some of its attention weights.
_TEXT = "Two views of this sentence shall differ, or there is nothing to learn from them. " * 4


def check_recipe(recipe: Recipe, *, two_views: bool = False) -> None:
    """Check everything about a recipe that needs neither its data nor the base's weights.

    What one setting may be, and which contradict each other, its own classes have checked. Here follow names, what the
    machine has, and what fits the base; then :func:`check_data`, and the optimizer's dry run.
    """
    check_names(recipe)
    model, base = recipe.model, resolve_base(recipe.model.base)
    _check_layers(recipe, base)
    if model.pooling_init is not None or not is_saved_embedder(base, revision=model.revision):
        check_pooling(model, base)
    if model.tune == "lora":
        check_adapter(model, base)
    if two_views and not _adapter_drops(model):
        # A probability in the config proves nothing, since some architectures never read it.
        empty = _without_weights(model, base)
        if not any(_drops(module) for module in empty.modules()):
            raise _equal_views(type(empty).__name__, base)


def check_names(recipe: Recipe) -> None:
    """Check names, and that the libraries and devices that they need are available.

    Raises:
        ConfigurationError: If a name is unknown, a library is missing, or nothing would train.
    """
    model = recipe.model
    check_loss(recipe.loss)
    if model.design is not None:
        check_choice("model.design", model.design, tuple(DESIGNS))
    pooling = design_arguments(model)["pooling"] or "multi_layer"
    check_choice("model.pooling", pooling, tuple(POOLINGS))
    if model.tune == "pooling" and not POOLINGS[pooling].is_trainable:
        raise ConfigurationError(
            f"model.tune=pooling trains nothing: model.pooling={pooling!r} has no weights. Use lora, or multi_layer."
        )
    if recipe.training.cache is not None:
        spec, options = POOLINGS[pooling], design_arguments(model)["pooling_kwargs"] or {}
        if spec.reads_with(options) == "tokens":
            raise reads_tokens(f"model.pooling={pooling}")
        check_writable(Path(recipe.training.cache))
    check_machine(recipe.training, adapter=model.tune == "lora")
    if model.quantization is not None:
        require("train", "bitsandbytes", purpose="model.quantization")
    if model.tune == "lora":
        check_start(lora_config(model.lora), in_4_bits=model.quantization == "nf4")


def check_machine(training: TrainingSettings, *, adapter: bool) -> None:
    """Check that this machine has the GPU and the libraries that the settings need."""
    if training.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigurationError("training.precision=fp16 needs a GPU, and there is none here. Use auto, bf16 or fp32.")
    check_optimizer(training.optim)
    check_reports(training.report_to)
    if adapter:
        require("train", "peft", purpose="model.tune=lora")


def base_width(model: ModelSettings) -> int:
    """Return the hidden size of the base, 0 if its config does not say."""
    text = _read_config(model, resolve_base(model.base)).get_text_config(decoder=True)
    return getattr(text, "hidden_size", None) or 0


def design_arguments(model: ModelSettings) -> dict[str, Any]:
    """Return ``attention``, ``pooling`` and ``pooling_kwargs`` for ``build_embedder``; None where nothing is said."""
    if model.design is None:
        return {"attention": model.attention, "pooling": model.pooling, "pooling_kwargs": model.pooling_kwargs}
    arguments = DESIGNS[model.design].as_kwargs()
    return {**arguments, "pooling_kwargs": {**arguments["pooling_kwargs"], **model.pooling_kwargs}}


def _check_layers(recipe: Recipe, base: str) -> None:
    """Check that there are as many layers as the recipe freezes and trains."""
    frozen, sparse = recipe.model.freeze_layers, recipe.training.sparse_tuning
    if not frozen and sparse is None:
        return
    layers = getattr(_read_config(recipe.model, base).get_text_config(decoder=True), "num_hidden_layers", None)
    if layers is not None:
        check_freezing(frozen, layers)
        if sparse is not None:
            check_number_of_layers(sparse, layers - frozen)


def check_pooling(model: ModelSettings, base: str) -> None:
    """Build the pooling without weights, so that a wrong option is found before the stages."""
    text = _read_config(model, base).get_text_config(decoder=True)
    width, depth = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if not (isinstance(width, int) and isinstance(depth, int)):
        return
    arguments = design_arguments(model)
    layers = resolve_layers("all" if model.layers is None else model.layers, depth)
    backbone: Any = SimpleNamespace(get_embedding_dimension=lambda: width, layers=layers)
    with torch.device("meta"):
        pooling = POOLINGS[arguments["pooling"] or "multi_layer"].build(backbone, arguments["pooling_kwargs"])
    freeze_pooling(pooling, model.freeze_pooling)


def check_adapter(model: ModelSettings, base: str) -> None:
    """Check that the adapter's targets are in the architecture, built without weights."""
    from peft import inject_adapter_in_model

    config = without_loftq(lora_config(model.lora))
    targets = getattr(config, "target_modules", None)  # peft replaces it by what it found
    empty = _without_weights(model, base)
    with torch.device("meta"):
        layers = sorted({name.rpartition(".")[2] for name, module in empty.named_modules() if _is_linear(module)})
        try:
            inject_adapter_in_model(config, empty)
        except PEFT_ERRORS as error:
            if "arget modules" not in str(error):
                raise misfit(f"model.lora={model.lora}", type(empty).__name__, error) from error
            raise ConfigurationError(
                f"model.lora: target_modules={targets!r} matches no layer of {type(empty).__name__}, whose linear "
                f"layers are {layers}. Name some of them, or use all-linear."
            ) from error


def check_views(embedder: SentenceTransformer, model: ModelSettings) -> None:
    """Check on the model itself that two views of a text differ: some architectures never apply their dropout.

    The random state is unchanged. With dropout in the adapter nothing is compared: it has no effect before its first
    step.
    """
    if _adapter_drops(model):
        return
    features = batch_to_device(embedder.preprocess([_TEXT]), embedder.device)
    with preserve_modes(embedder):
        embedder.train()
        first, second = (embedder(dict(features))["sentence_embedding"] for _ in range(2))
    if torch.equal(first, second):
        raise _equal_views(type(embedder.transformers_model).__name__, model.base)


def check_data(datasets: Mapping[str, Dataset], recipe: Recipe, world_size: int) -> None:
    """Check that the datasets have the columns that the loss needs, and fill a batch on every process."""
    check_columns(datasets, recipe.loss)
    batch_size = recipe.training.batch_size
    check_split(batch_size, world_size)
    if batch_size // world_size < 2 and not recipe.loss.gather_across_devices:
        raise ConfigurationError(
            f"training.batch_size={batch_size} on {world_size} processes is one query each, without negatives. "
            f"Use at least {2 * world_size}, or loss.gather_across_devices=true."
        )
    for name, dataset in datasets.items():
        fitting = len(dataset) // world_size * world_size
        if fitting < batch_size:
            raise DataError(
                f"The set {name!r} has {len(dataset)} rows, fewer than training.batch_size={batch_size}, and each "
                f"batch comes from one set. Use more rows, or training.batch_size={fitting}."
            )
        if recipe.training.batch_sampler == "no_duplicates":
            _check_first_batch(name, dataset, batch_size)


def check_split(batch_size: int, world_size: int) -> None:
    """Check that a batch can be split over the processes."""
    if batch_size % world_size:
        lower = max(batch_size // world_size, 1) * world_size
        raise ConfigurationError(
            f"training.batch_size={batch_size} is over all {world_size} devices, which cannot split it: use "
            f"{lower} or {lower + world_size}."
        )


def _check_first_batch(name: str, dataset: Dataset, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sampler = NoDuplicatesBatchSampler(dataset, batch_size=batch_size, drop_last=False, generator=generator)
    found = len(next(iter(sampler)))
    if found < batch_size:
        raise DataError(
            f"A batch of {name!r} without duplicates ends at {found} rows, below training.batch_size={batch_size}. Use "
            f"a smaller batch, or training.batch_sampler=batch_sampler, which lets a text be its own negative."
        )


def _read_config(model: ModelSettings, base: str) -> PreTrainedConfig:
    return read_architecture(base, trust_remote_code=model.trust_remote_code, revision=model.revision)


def _without_weights(model: ModelSettings, base: str) -> torch.nn.Module:
    """Build the architecture on the meta device."""
    from transformers import AutoModel

    architecture = _read_config(model, base)
    given = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    try:
        with torch.device("meta"):
            return AutoModel.from_config(architecture, trust_remote_code=model.trust_remote_code, **given)
    except (ValueError, ImportError) as error:
        asked = f" with model.attn_implementation={model.attn_implementation}" if given else ""
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"The architecture of {base!r} cannot be built{asked}: {reason}") from error


def _adapter_drops(model: ModelSettings) -> bool:
    return model.tune == "lora" and getattr(lora_config(model.lora), "lora_dropout", 0) > 0


def _equal_views(architecture: str, base: str) -> ConfigurationError:
    return ConfigurationError(
        f"kind=simcse compares two views of a text that differ by dropout, and {architecture} of {base!r} has none: "
        f"the views would be equal and nothing would be learned. Use tune=lora with a lora_dropout above 0, such as "
        f"lora=paper, or set attention_dropout in the base's config.json if it has that setting and applies it."
    )


def _drops(module: torch.nn.Module) -> bool:
    if isinstance(module, torch.nn.Dropout):
        return module.p > 0
    # Attention and some layers apply dropout as a function, with a probability that they store as a number.
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
