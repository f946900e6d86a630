"""Validate a recipe before any weights are loaded: names, libraries, adapter targets, layers, batches."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
from sentence_transformers.util import batch_to_device

from ..adapters import PEFT_ERRORS, check_start, lora_config, misfit, without_loftq
from ..designs import DESIGNS, POOLINGS, resolve_base
from ..losses.build import check_columns, check_loss
from ..modules.errors import ConfigurationError, DataError, nearest
from ..modules.llm_transformer import resolve_layers
from ..modules.trainable_pooling import TrainablePooling
from ..saved_embedder import is_saved_embedder, read_architecture
from ..utils.extras import require
from ..utils.random_state import preserve_rng_state
from .freezing import check_freezing
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
    """Checks everything about a recipe that needs neither its data nor the base's weights.

    Args:
        recipe: The recipe.
        two_views: Whether it contrasts two views of each text, which takes dropout.

    Raises:
        ConfigurationError: If names are unknown, this machine lacks something, or the recipe does not fit the base.
    """
    check_names(recipe)
    base = resolve_base(recipe.model.base)
    check_layers(recipe, base)
    check_pooling(recipe.model, base)
    if recipe.model.tune == "lora":
        check_adapter(recipe.model, base)
    if two_views:
        check_dropout(recipe.model, base)


def check_data(datasets: DatasetDict | Mapping[str, Dataset], recipe: Recipe, world_size: int) -> None:
    """Checks that the datasets have the columns that the loss needs, and fill a batch on every process.

    Raises:
        ConfigurationError: If the batch cannot be split over the processes.
        DataError: If a dataset lacks columns, is too small, or has too few distinct texts.
    """
    check_columns(datasets, recipe.loss)
    check_batches(datasets, recipe, world_size)


def check_names(recipe: Recipe) -> None:
    """Checks names, and that the libraries and devices that they need are available.

    Raises:
        ConfigurationError: If a name is unknown, a library is missing, or nothing would train.
    """
    check_loss(recipe.loss)
    model = recipe.model
    if model.design is not None and model.design not in DESIGNS:
        hint = nearest(model.design, DESIGNS)
        raise ConfigurationError(f"model.design={model.design!r} is unknown; known: {list(DESIGNS)}.{hint}")
    pooling = design_arguments(model)["pooling"] or "multi_layer"
    if pooling not in POOLINGS:
        hint = nearest(pooling, POOLINGS)
        raise ConfigurationError(f"model.pooling={pooling!r} is unknown; known: {list(POOLINGS)}.{hint}")
    module = POOLINGS[pooling].module
    if model.tune == "pooling" and not (isinstance(module, type) and issubclass(module, TrainablePooling)):
        raise ConfigurationError(
            f"model.tune=pooling with model.pooling={pooling!r} trains nothing, since that pooling has no weights. "
            f"Use model.tune=lora, or a pooling with weights such as multi_layer."
        )
    check_machine(recipe.training, adapter=model.tune == "lora", quantized=model.quantization is not None)
    if model.tune == "lora":
        check_start(lora_config(model.lora), in_4_bits=model.quantization == "nf4")


def check_machine(training: TrainingSettings, *, adapter: bool, quantized: bool = False) -> None:
    """Checks that this machine has what the settings ask for.

    Raises:
        ConfigurationError: If a library or a GPU is missing.
    """
    if training.precision in ("bf16", "fp16") and not torch.cuda.is_available():
        raise ConfigurationError(
            f"training.precision={training.precision} needs a GPU, and there is none here. Use auto or fp32, "
            f"which is the faster one on a CPU too."
        )
    check_optimizer(training.optim)
    check_reports(training.report_to)
    wanted = {
        "model.tune=lora": ("peft", adapter),
        "model.quantization": ("bitsandbytes", quantized),
    }
    for setting, (library, is_wanted) in wanted.items():
        if is_wanted:
            require("train", library, purpose=setting)


def design_arguments(model: ModelSettings) -> dict[str, Any]:
    """Returns ``attention``, ``pooling`` and ``pooling_kwargs`` for ``build_embedder``; None where nothing is said."""
    arguments: dict[str, Any] = {"pooling_kwargs": {}}
    if model.design is not None:
        arguments = DESIGNS[model.design].as_kwargs()
    arguments["pooling_kwargs"] = {**arguments["pooling_kwargs"], **model.pooling_kwargs}
    if model.design is None:
        arguments |= {"attention": model.attention, "pooling": model.pooling}
    return arguments


def check_layers(recipe: Recipe, base: str) -> None:
    """Checks that there are as many layers as the recipe freezes and trains.

    Args:
        recipe: The recipe.
        base: Hub id or folder of the base.

    Raises:
        ConfigurationError: If the base has no usable config, or fewer layers.
    """
    frozen, sparse = recipe.model.freeze_layers, recipe.training.sparse_tuning
    if not frozen and sparse is None:
        return
    layers = getattr(_read_config(recipe.model, base).get_text_config(decoder=True), "num_hidden_layers", None)
    if layers is not None:
        check_freezing(frozen, layers)
        if sparse is not None:
            check_number_of_layers(sparse, layers - frozen)


def check_pooling(model: ModelSettings, base: str) -> None:
    """Builds the pooling without weights: a wrong option shall not wait for the stages before it.

    Args:
        model: Settings of the model.
        base: Hub id or folder of the base; a saved embedder's own pooling is checked when it is loaded.

    Raises:
        ConfigurationError: If an option is unknown or out of range, or the base has no such layer.
    """
    if model.pooling_init is None and is_saved_embedder(base, revision=model.revision):
        return
    text = _read_config(model, base).get_text_config(decoder=True)
    width, depth = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if not (isinstance(width, int) and isinstance(depth, int)):
        return
    arguments = design_arguments(model)
    layers = resolve_layers("all" if model.layers is None else model.layers, depth)
    backbone: Any = SimpleNamespace(get_embedding_dimension=lambda: width, layers=layers)
    with torch.device("meta"):
        POOLINGS[arguments["pooling"] or "multi_layer"].build(backbone, arguments["pooling_kwargs"])


def check_adapter(model: ModelSettings, base: str) -> None:
    """Checks that the adapter's targets are in the architecture, built without weights.

    Args:
        model: Settings of the model.
        base: Hub id or folder of the base.

    Raises:
        ConfigurationError: If the base has no usable config, or the targets match nothing.
    """
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


def check_dropout(model: ModelSettings, base: str) -> None:
    """Checks that two passes of one text differ in training: that there is dropout in the backbone or the adapter.

    A probability in the config proves nothing, since some architectures never read it: it must be in the modules.

    Args:
        model: Settings of the model.
        base: Hub id or folder of the base.

    Raises:
        ConfigurationError: If there is none.
    """
    if _adapter_drops(model):
        return
    empty = _without_weights(model, base)
    if not any(_drops(module) for module in empty.modules()):
        raise _equal_views(type(empty).__name__, base)


def check_views(embedder: SentenceTransformer, model: ModelSettings) -> None:
    """Checks :func:`check_dropout` on the model itself, since some architectures never apply their dropout.

    The random state is unchanged.

    Args:
        embedder: Not changed.
        model: The settings that it was built from. With dropout in the adapter nothing is compared: an adapter has no
            effect before its first step.

    Raises:
        ConfigurationError: If two passes of one text in training are equal.
    """
    if _adapter_drops(model):
        return
    features = batch_to_device(embedder.preprocess([_TEXT]), embedder.device)
    was_training = embedder.training
    embedder.train()
    with preserve_rng_state(), torch.no_grad():
        first, second = (embedder(dict(features))["sentence_embedding"] for _ in range(2))
    embedder.train(was_training)
    if torch.equal(first, second):
        raise _equal_views(type(embedder.transformers_model).__name__, model.base)


def _read_config(model: ModelSettings, base: str) -> PreTrainedConfig:
    return read_architecture(base, trust_remote_code=model.trust_remote_code, revision=model.revision)


def check_batches(datasets: DatasetDict | Mapping[str, Dataset], recipe: Recipe, world_size: int) -> None:
    """Checks that every dataset fills a batch on every process; errors as for :func:`check_data`."""
    batch_size = recipe.training.batch_size
    if batch_size % world_size:
        lower = max(batch_size // world_size, 1) * world_size
        raise ConfigurationError(
            f"training.batch_size={batch_size} is over all devices and cannot be split evenly over "
            f"{world_size}. Use {lower} or {lower + world_size}."
        )
    if batch_size // world_size < 2 and not recipe.loss.gather_across_devices:
        raise ConfigurationError(
            f"training.batch_size={batch_size} on {world_size} processes is one query each, without negatives of other "
            f"queries. Use at least {2 * world_size}, or loss.gather_across_devices=true."
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


def _check_first_batch(name: str, dataset: Dataset, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sampler = NoDuplicatesBatchSampler(dataset, batch_size=batch_size, drop_last=False, generator=generator)
    found = len(next(iter(sampler)))
    if found < batch_size:
        raise DataError(
            f"The set {name!r} repeats its texts so often that a batch without duplicates ends at {found} rows, below "
            f"training.batch_size={batch_size}. Use a smaller batch, or training.batch_sampler=batch_sampler, "
            f"which lets a text be its own negative."
        )


def _without_weights(model: ModelSettings, base: str) -> torch.nn.Module:
    """Builds the architecture on the meta device."""
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
