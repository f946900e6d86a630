"""The recipe: everything that a training run depends on, as a dataclass that is read from YAML."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml

from ..data.training_data import DatasetSettings, TextSettings
from ..losses.settings import LossSettings
from ..modules.errors import ConfigurationError, check_choice
from ..utils.files import write_atomically
from ..utils.reading import read_yaml
from ..utils.settings import (
    NonNegativeInt,
    PositiveInt,
    Range,
    Settings,
    check_filled,
    from_mapping,
    merge,
    to_mapping,
    with_overrides,
)
from .further_arguments import checked_arguments

#: Longest text in tokens, where a recipe says nothing and its base is no saved embedder.
DEFAULT_LENGTH = 512

Seed = Annotated[int, Range(0, 2**32 - 1)]  # what numpy takes

#: Preset name -> the values it sets; the file and the command line come after it and win. How the poolings are built
#: is not among them: that is what the designs `paper-1` to `paper-5` are for.
PRESETS: dict[str, dict[str, Any]] = {
    # Tang and Yang 2024, arXiv 2409.02727, section 4: what its five designs were trained with.
    "paper": {
        "model": {"tune": "lora", "lora": "paper", "max_seq_length": 1024},
        "loss": {
            "name": "infonce",
            "scale": 20.0,
            "num_negatives": 1,
            "mini_batch_size": 16,
            "gather_across_devices": True,
        },
        "training": {
            "max_steps": 1000,
            "batch_size": 2048,
            "learning_rate": 1e-5,
            "pooling_learning_rate": 1e-5,
            "lr_scheduler_type": "linear",
            "warmup_steps": 100,
        },
    }
}


@dataclass
class ModelSettings(Settings):
    """The model to build, and which part of it trains.

    Attributes:
        base: Hub id or folder of the LLM, or ``builtin`` for the small one that comes with the package; or of a saved
            embedder, which is continued with all that it has.
        design: A name in ``DESIGNS``, instead of `attention` and `pooling`.
        attention: ``bidirectional`` (None is that) or ``causal``; None is a saved embedder's own.
        pooling: A name in ``POOLINGS``; None is ``multi_layer``, or a saved embedder's own.
        pooling_init: ``new`` discards a saved embedder's modules after the backbone and starts a new pooling.
        pooling_kwargs: Options of the pooling, over those of the design.
        layers: ``all`` (None is that), or 1-based numbers of the layers that a pooling over layers reads.
        layer_readout: ``eos`` or ``mean``; None goes by the attention.
        include_prompt: False keeps the instruction's tokens out of the pooling; None is True.
        max_seq_length: Longest text in tokens; None is 512, or a saved embedder's own.
        truncate_dim: Dimensions that the saved model's embeddings are cut to, one of ``loss.matryoshka_dims``; None
            keeps all.
        tune: What trains with the pooling: a ``lora`` adapter, the ``full`` backbone, or the ``pooling`` alone.
        lora: ``paper`` (r 16, alpha 32, dropout 0.1, all linear layers) or fields of a ``peft.LoraConfig``, such as
            ``use_rslora: true`` (arXiv 2312.03732), ``use_dora: true`` (2402.09353) or, with ``quantization: nf4``,
            ``init_lora_weights: loftq`` (2310.08659).
        freeze_layers: Freeze the embeddings and the first N layers (Telly-k, Shi et al. 2023, arXiv 2304.05216); an
            adapter in them has no effect.
        freeze_pooling: Parts of the pooling that keep the values they start from, such as ``[latents]``.
        quantization: ``nf4`` or ``int8`` (bitsandbytes) for the frozen backbone under an adapter.
        allow_partial: Accept layers that cannot be made bidirectional.
        attn_implementation: As in transformers.
        trust_remote_code: Allow the base, and a guide or teacher, to run code of their own.
        revision: Branch, tag or commit of the base.
    """

    where = "model"

    base: str
    design: str | None = None
    attention: Literal["bidirectional", "causal"] | None = None
    pooling: str | None = None
    pooling_kwargs: dict[str, Any] = field(default_factory=dict)
    pooling_init: Literal["new"] | None = None
    layers: Literal["all"] | list[int] | None = None
    layer_readout: Literal["eos", "mean"] | None = None
    include_prompt: bool | None = None
    max_seq_length: PositiveInt | None = None
    truncate_dim: PositiveInt | None = None
    tune: Literal["lora", "full", "pooling"] = "lora"
    lora: str | dict[str, Any] = "paper"
    freeze_layers: NonNegativeInt = 0
    freeze_pooling: list[str] = field(default_factory=list)
    quantization: Literal["nf4", "int8"] | None = None
    allow_partial: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        check_filled(self, "base")
        super().__post_init__()


@dataclass
class MaskingSettings:
    """How texts are masked.

    Attributes:
        mlm_probability: Fraction of a text's tokens that is chosen; at least one token is.
        replacement: ``mask`` puts the mask token in every chosen place; ``bert`` in 80 % of them, another token in
            10 %, and leaves 10 % as they are.
        token: The mask token: one of the tokenizer's, or a new one that is added. None uses the tokenizer's mask
            token, else a reserved or unused special token, else a new one.
    """

    RENAMED: ClassVar = {"share": "mlm_probability"}

    mlm_probability: float = 0.2
    replacement: Literal["mask", "bert"] = "mask"
    token: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.mlm_probability < 1:
            raise ConfigurationError(
                f"masking.mlm_probability={self.mlm_probability} must be above 0, or nothing is predicted, and below 1."
            )


@dataclass
class SparseTuningSettings(Settings):
    """Adapters of a few layers at a time, by importance; :class:`SparseTuning` says how.

    Attributes:
        layers: How many layers train at a time; the paper uses a quarter of them.
        interval: Steps after which importance is measured and layers are redrawn.
        trials: How many sets of layers are weakened to measure it.
        suppression: What is left of a weakened adapter's effect.
        importance_rate: Learning rate of the importance.
    """

    where = "training.sparse_tuning"

    layers: PositiveInt
    interval: PositiveInt = 10
    trials: Annotated[int, Range(2)] = 3  # one would be its own mean, and never a reason to change anything
    suppression: float = 0.25
    importance_rate: Annotated[float, Range(0)] = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.suppression < 1:
            raise ConfigurationError(
                f"training.sparse_tuning.suppression={self.suppression} must be 0 or more, and below 1 (no change)."
            )


@dataclass
class TrainingSettings(Settings):
    """How to train.

    Attributes:
        max_steps: Optimizer steps; None goes by `num_train_epochs`.
        num_train_epochs: Passes over the data, where `max_steps` is None.
        batch_size: Queries in a batch, over all devices together, so that a recipe means the same on any number.
        gradient_accumulation_steps: Batches per optimizer step; negatives come from one batch.
        learning_rate: Of the adapter or the backbone; None is 2e-4 for an adapter, 2e-5 for the full backbone.
        pooling_learning_rate: Of the pooling, which starts from scratch; None is 1e-3 up to a width of 256 and falls
            as 1 / width beyond: 4e-4 at 640, 4e-6 at the paper's 65,536.
        lr_scheduler_type: ``linear``, ``cosine`` or another of transformers.
        warmup_steps: Steps; below 1 a fraction of all steps.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are clipped to this norm; 0 does not clip.
        optim: An optimizer of transformers, such as ``adamw_8bit`` or ``paged_adamw_8bit`` (bitsandbytes), or
            ``lamb``.
        sparse_tuning: Train the adapters of a few layers at a time, drawn by importance (arXiv 2410.11772); None
            trains all.
        precision: ``auto`` is ``bf16`` on a GPU that has it and, for bases of at least 512 dimensions, on a CPU that is
            faster with it; ``fp32`` elsewhere.
        gradient_checkpointing: Recompute activations in the backward pass instead of storing them.
        batch_sampler: ``no_duplicates`` never puts a text into a batch twice, where it would be its own negative;
            ``batch_sampler`` may.
        dataloader_num_workers: Processes that tokenize ahead.
        logging_steps: Steps between two log entries.
        save_steps: Steps between two checkpoints.
        save_total_limit: How many checkpoints to keep.
        report_to: ``none``, or integrations of transformers: ``wandb``, ``trackio``, ``mlflow``, ``tensorboard``, ...
        full_determinism: Deterministic GPU kernels, slower.
        cache: Folder for the layer summaries of the training and evaluation texts: the frozen backbone of
            ``model.tune=pooling`` then reads each text once (:func:`st_llmpool.summary_cache.cached_summaries`).
        cache_dtype: ``float16`` (relative error at most 2**-11) or ``float32`` (exact).
        arguments: Any further field of ``SentenceTransformerTrainingArguments``. In a recipe these stand among the
            others, by their own names, such as ``adam_beta2: 0.95``.
    """

    where = "training"
    RENAMED: ClassVar = {
        "steps": "max_steps",
        "epochs": "num_train_epochs",
        "schedule": "lr_scheduler_type",
        "optimizer": "optim",
        "workers": "dataloader_num_workers",
        "keep_checkpoints": "save_total_limit",
        "no_duplicates": "batch_sampler (no_duplicates or batch_sampler)",
    }

    max_steps: PositiveInt | None = None
    num_train_epochs: Annotated[float, Range(0, is_open=True)] = 1.0
    batch_size: PositiveInt = 64
    gradient_accumulation_steps: PositiveInt = 1
    # AdamW's steps have the size of the rate: above 1 nothing is left of a weight. A pooling may stay as it starts.
    learning_rate: Annotated[float, Range(0, 1, is_open=True)] | None = None
    pooling_learning_rate: Annotated[float, Range(0, 1)] | None = None
    lr_scheduler_type: str = "linear"
    warmup_steps: Annotated[float, Range(0)] = 0.1
    weight_decay: Annotated[float, Range(0, 1e3)] = 0.0
    max_grad_norm: Annotated[float, Range(0)] = 1.0
    optim: str = "adamw_torch"
    sparse_tuning: SparseTuningSettings | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    batch_sampler: Literal["no_duplicates", "batch_sampler"] = "no_duplicates"
    dataloader_num_workers: Annotated[int, Range(0, 1024)] = 0
    logging_steps: PositiveInt = 10
    save_steps: PositiveInt = 200
    save_total_limit: PositiveInt = 2
    report_to: str | list[str] = "none"
    full_determinism: bool = False
    cache: str | None = None
    cache_dtype: Literal["float16", "float32"] = "float16"
    arguments: dict[str, Any] = field(default_factory=dict, metadata={"rest": checked_arguments})

    def rate_of(self, tune: str) -> float:
        """Return the learning rate, or its default for what trains."""
        return (2e-5 if tune == "full" else 2e-4) if self.learning_rate is None else self.learning_rate


@dataclass
class EvaluationSettings(Settings):
    """Evaluation while training; off where neither `data` nor `suite` is given.

    Attributes:
        eval_steps: Steps between two evaluations.
        data: Held-out pairs; each query has to find its positive among all positives and negatives.
        suite: Name or file of a suite of local mteb tasks.
        data_dir: Folder with the suite's data.
        eval_on_start: Evaluate before the first step too.
        load_best_model_at_end: End with the checkpoint that is best instead of the last one: by nDCG@10 on the
            first set of `data`, by the mean of `suite` where there is no `data`.
        batch_size: Batch size.
    """

    where = "evaluation"
    RENAMED: ClassVar = {"steps": "eval_steps", "at_start": "eval_on_start", "keep_best": "load_best_model_at_end"}

    eval_steps: PositiveInt = 100
    data: list[DatasetSettings] = field(default_factory=list)
    suite: str | None = None
    data_dir: str | None = None
    eval_on_start: bool = False
    load_best_model_at_end: bool = False
    batch_size: PositiveInt = 64

    @property
    def metric(self) -> str:
        """The metric that says which checkpoint is best."""
        return f"{self.data[0].label}_cosine_ndcg@10" if self.data else "mean"

    @property
    def is_on(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.data) or self.suite is not None


def check_merge(merge: float | Sequence[float] | None, where: str = "merge") -> None:
    """Check that the weights of a merge lie between 0 and 1."""
    for alpha in merge_weights(merge):
        if not 0 <= alpha <= 1 or math.isnan(alpha):
            raise ConfigurationError(
                f"{where}={alpha} must lie between 0 (the base's weights) and 1 (those that were trained)."
            )
    if isinstance(merge, Sequence) and not merge:
        raise ConfigurationError(f"{where} is an empty list; leave it out to keep the trained weights.")


def merge_weights(merge: float | Sequence[float] | None) -> list[float]:
    """Return the weights of the trained model to choose from; None is the trained model alone.

    Example:
        >>> merge_weights(None), merge_weights(0.5), merge_weights([0.3, 0.6])
        ([1.0], [0.5], [0.3, 0.6])
    """
    if merge is None:
        return [1.0]
    return [float(alpha) for alpha in merge] if isinstance(merge, Sequence) else [float(merge)]


@dataclass
class StageSettings(Settings):
    """A stage before the recipe's own training; it starts from the previous stage's model.

    Attributes:
        kind: ``mntp`` predicts masked tokens (:func:`st_llmpool.training.adapt`), before any other kind; ``simcse``
            contrasts two views of each text that differ by dropout (Gao et al. 2021, arXiv 2104.08821);
            ``contrastive`` trains on pairs as the recipe itself does. The last two train the recipe's pooling too, and
            the next stage goes on with it.
        texts: Unlabelled text, for ``mntp`` and ``simcse``.
        held_out: For ``mntp``, texts to measure the masked accuracy on; without any, some of `texts` are held out.
        data: Pairs, for ``contrastive``.
        tune: What trains with the pooling: a ``lora`` adapter, merged at the end of the stage, or the ``full``
            backbone; None is the recipe's ``model.tune``.
        lora: None is the recipe's ``model.lora``.
        max_seq_length: None is the recipe's ``model.max_seq_length``.
        merge: Weight of the trained model in the backbone that the stage leaves, the rest being what it started from;
            the pooling stays as trained. Of a list the best is taken: by masked accuracy for ``mntp``, by nDCG@10
            on the first set of ``evaluation.data`` else. None keeps the trained weights.
        masking: For ``mntp``.
        loss: For ``simcse`` and ``contrastive``; None is the default for the first and the recipe's for the second.
        training: Steps, learning rates and so on, complete in themselves; None is the recipe's.
        evaluation: For ``simcse`` and ``contrastive``; None is the recipe's.
    """

    where = "stages"

    kind: Literal["mntp", "simcse", "contrastive"]
    texts: list[TextSettings] = field(default_factory=list)
    held_out: list[TextSettings] = field(default_factory=list)
    data: list[DatasetSettings] = field(default_factory=list)
    tune: Literal["lora", "full"] | None = None
    lora: str | dict[str, Any] | None = None
    max_seq_length: PositiveInt | None = None
    merge: float | list[float] | None = None
    masking: MaskingSettings | None = None
    loss: LossSettings | None = None
    training: TrainingSettings | None = None
    evaluation: EvaluationSettings | None = None

    def __post_init__(self) -> None:
        if self.kind not in _STAGE_FIELDS:
            return  # from_mapping says it better
        own = _STAGE_FIELDS[self.kind]
        for name in sorted(set().union(*_STAGE_FIELDS.values()) - own):
            if getattr(self, name):
                raise ConfigurationError(
                    f"stages: {name} does not apply to kind={self.kind}, which has {', '.join(sorted(own))}. Remove it."
                )
        super().__post_init__()
        needed = "data" if self.kind == "contrastive" else "texts"
        if not getattr(self, needed):
            raise ConfigurationError(f"stages: kind={self.kind} needs {needed}, such as [{{source: train.parquet}}].")
        check_merge(self.merge, "stages: merge")


#: Kind of stage -> the settings that not every kind has.
_STAGE_FIELDS = {
    "mntp": {"texts", "held_out", "masking"},
    "simcse": {"texts", "loss", "evaluation"},
    "contrastive": {"data", "loss", "evaluation"},
}


class SavedRecipe(Settings):
    """A recipe, as a dataclass, with its YAML file."""

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a recipe.

        Args:
            path: YAML file.
            overrides: ``dotted.key=value`` each, such as ``training.learning_rate=1e-4`` or ``data.0.limit=100``.

        Raises:
            ConfigurationError: If the file is missing or not YAML, a key is unknown, or a value does not fit.
        """
        return cls.from_dict(read_yaml(path), overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Build a recipe from nested mappings; arguments and errors as for :meth:`from_yaml`."""
        return from_mapping(cls, with_overrides(values, overrides))

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, defaults included, as nested mappings."""
        return to_mapping(self)

    def to_yaml(self, path: str | Path) -> None:
        """Write every setting, defaults included; :meth:`from_yaml` reads it back to an equal recipe."""
        write_atomically(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


@dataclass
class Recipe(SavedRecipe):
    """A training run.

    Attributes:
        output_dir: Folder for the run; the model ends in ``model`` in it.
        model: The model and which part of it trains.
        data: The training sets; each batch comes from one of them.
        loss: The loss.
        training: Steps, learning rates, precision, logging.
        evaluation: Evaluation while training.
        stages: Stages before the recipe's own training; each leaves its model in ``stages/<number>-<kind>/model``.
        seed: Seed of initial weights, data order and dropout.
        card_examples: Show a few rows of the training data, verbatim, in the model card.
        preset: A name in ``PRESETS``, for values that the recipe does not set.

    Raises:
        ConfigurationError: From the constructor, if settings contradict each other.

    Example:
        >>> Recipe("runs/first", ModelSettings("builtin"), [DatasetSettings("docstrings")]).training.batch_size
        64
    """

    output_dir: str
    model: ModelSettings
    data: list[DatasetSettings]
    loss: LossSettings = field(default_factory=LossSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    stages: list[StageSettings] = field(default_factory=list)
    seed: Seed = 0
    card_examples: bool = False
    preset: str | None = None

    def __post_init__(self) -> None:
        check_filled(self, "output_dir")
        super().__post_init__()
        for contradiction in _contradictions(self):
            raise ConfigurationError(contradiction)

    @classmethod
    def from_dict(cls, values: dict[str, Any], overrides: Sequence[str] = ()) -> Self:
        """Build a recipe from nested mappings; arguments and errors as for :meth:`from_yaml`."""
        values = with_overrides(values, overrides)
        preset = values.get("preset")
        if preset is not None:
            check_choice("preset", preset, tuple(PRESETS))
            values = merge(PRESETS[preset], values)
        return from_mapping(cls, values)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the adapter or the backbone."""
        return self.training.rate_of(self.model.tune)


def with_earlier_names(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's nested mappings under the names that fields had before they were transformers' own."""
    named: dict[str, Any] = {"training": TrainingSettings, "evaluation": EvaluationSettings, "masking": MaskingSettings}
    earlier = {}
    for key, value in values.items():
        if isinstance(value, list):
            value = [with_earlier_names(item) if isinstance(item, dict) else item for item in value]
        elif key in named and isinstance(value, dict):
            names = {now: before for before, now in named[key].RENAMED.items()}
            value = {names.get(name, name): item for name, item in value.items()}
        earlier[key] = value
    return earlier


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong with settings together, in the order of the file; each alone was checked by its class."""
    model, loss, training, evaluation = recipe.model, recipe.loss, recipe.training, recipe.evaluation
    if model.design is not None and (model.attention is not None or model.pooling is not None):
        yield (
            f"model.design={model.design!r} says attention and pooling: drop it, or model.attention and model.pooling."
        )
    if model.quantization is not None and model.tune == "full":
        yield f"model.quantization={model.quantization!r} has no gradients for model.tune=full. Use lora, or drop it."
    if model.freeze_layers and model.tune == "pooling":
        yield (
            f"model.freeze_layers={model.freeze_layers} does not apply to model.tune=pooling, which freezes all. "
            f"Drop it, or use model.tune=lora or full."
        )
    if not recipe.data:
        yield "data is empty: name at least one training set, such as data: [{source: pairs.jsonl}]."
    for where, sets in [("data", recipe.data), ("evaluation.data", evaluation.data)]:
        labels = Counter(item.label for item in sets)
        for name in (name for name, count in labels.items() if count > 1):
            yield f"{where} has two sets that are called {name!r}: give each its own name."
    unweighted = [item.label for item in recipe.data if item.weight is None]
    if 0 < len(unweighted) < len(recipe.data):
        yield f"data: {unweighted[0]!r} has no weight, but others have: give all a weight, or none."
    sizes = loss.matryoshka_dims
    if sizes is not None and (not sizes or min(sizes) < 1):
        yield f"loss.matryoshka_dims={sizes} must be numbers of dimensions, such as [64, 128]."
    if model.truncate_dim is not None and model.truncate_dim not in (sizes or []):
        yield (
            f"model.truncate_dim={model.truncate_dim} is not among loss.matryoshka_dims={sizes}, so untrained: add it."
        )
    if training.sparse_tuning is not None and model.tune != "lora":
        yield f"training.sparse_tuning needs an adapter, and model.tune={model.tune} has none. Use lora, or drop it."
    if training.cache is not None and (model.tune != "pooling" or recipe.stages):
        yield (
            f"training.cache={training.cache!r} holds what a frozen backbone gives, and here it trains. Use "
            f"model.tune=pooling without stages, or drop it."
        )
    if training.cache is not None and loss.name == "gist":
        yield "training.cache does not apply to loss.name=gist, whose guide reads tokens. Use infonce or distill."
    if training.batch_size < 2:
        yield (
            f"training.batch_size={training.batch_size} has no negatives of other queries to contrast. Use at least 2; "
            f"with little memory set loss.mini_batch_size=1."
        )
    if evaluation.load_best_model_at_end and not evaluation.is_on:
        yield "evaluation.load_best_model_at_end needs something to measure: give evaluation.data or .suite."
    kinds = [stage.kind for stage in recipe.stages]
    for place, stage in enumerate(recipe.stages):
        if stage.kind == "mntp" and set(kinds[:place]) - {"mntp"}:
            yield f"stages.{place}: kind=mntp after {kinds[place - 1]} would lose head and pooling. Put it first."
        if stage.kind == "mntp" and stage.tune is None and model.tune == "pooling":
            yield f"stages.{place}: model.tune=pooling does not apply to mntp. Set its tune."
        if stage.kind == "mntp" and model.quantization is not None:
            yield (
                f"stages.{place}: model.quantization={model.quantization!r} does not apply to mntp, which ends in a "
                f"complete base. Run st-llmpool adapt by itself, and name its result as model.base."
            )
        if stage.kind == "mntp" and model.freeze_layers:
            yield (
                f"model.freeze_layers={model.freeze_layers} does not apply to stages.{place}, kind=mntp, which adapts "
                f"every layer. Run st-llmpool adapt by itself, and name its result as model.base; or drop it."
            )
        has_pairs = bool((stage.evaluation or evaluation).data)
        if stage.kind != "mntp" and isinstance(stage.merge, list) and len(stage.merge) > 1 and not has_pairs:
            yield (
                f"stages.{place}: merge={stage.merge} needs a score to choose by. Give evaluation.data, or one number."
            )
