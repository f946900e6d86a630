"""Adapt a base to bidirectional attention with masked next-token prediction, and report the gain."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from ...adapters import lora_config
from ...data.training_data import load_texts
from ...designs import resolve_base
from ...modules.attention import set_attention
from ...modules.errors import ConfigurationError, DataError
from ...saved_embedder import is_saved_embedder
from ...utils.files import atomic_folder
from ...utils.parameters import count_weights
from ...utils.reading import read_json_object
from ..arguments import dtype_of, enable_gradient_checkpointing, shared_arguments, trainer_arguments
from ..checks import base_width, check_adapter, check_machine, check_split
from ..interpolation import merge_with_base
from ..optimizers import check_optimization
from ..recipe import MaskingSettings, ModelSettings, merge_weights
from ..reload_check import check_language_model
from ..report import write_report
from ..run_folder import check_output, locked_run, train_in_folder
from .language_model import (
    apply_attention,
    choose_mask_token,
    load_language_model,
    load_tokenizer,
    ordinary_tokens,
    stored_dtype,
    use_mask_token,
)
from .masked_next_token import MaskedTokenTrainer, constant_accuracy, masked_score, most_frequent_token
from .masked_texts import Example, MaskedTexts, Vocabulary, collate, tokenize
from .recipe import AdaptRecipe

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Largest fraction of the training texts that is held out.
_HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class AdaptResult:
    """The result of an adaptation.

    Attributes:
        model_dir: Folder of the adapted base, for `build_embedder` or any ``from_pretrained``.
        report: What is in ``training.json``; empty on processes other than the first.
    """

    model_dir: Path
    report: dict[str, Any]


def adapt(recipe: AdaptRecipe, *, resume: bool = False) -> AdaptResult:
    """Train a base to predict masked tokens.

    In ``recipe.output_dir`` it leaves ``model``, an ordinary base folder with tokenizer and head, the adapter merged;
    ``training.json``, ``loss.png``, ``recipe.yaml`` and ``checkpoints``. The folder says nothing of the attention, as
    no base does: whoever loads it chooses.

    ``training.json`` compares, on the same masked tokens of held-out text (each chosen place holds the mask token,
    whatever ``masking.replacement`` is), the accuracy:

    - ``adapted``: by the result, with the recipe's attention, from the masked text;
    - ``base``: by the base as it was, in the same way: what the change of attention alone leaves of it;
    - ``causal``: by the base as it was, with causal attention, from the text before the token without any mask: what it
      could do before;
    - ``no_context``: by always answering with the most frequent token of the training text.

    Args:
        recipe: The recipe.
        resume: Resume from the last complete checkpoint in ``output_dir``, or start if there is none. Losses and
            weights are those of an uninterrupted run.

    Raises:
        ConfigurationError: If the recipe does not fit the base, this machine, or what is in ``output_dir``, or another
            process trains there.
        TrainingError: If the loss, the gradients or the weights are not finite; the checkpoints before are kept.
        DataError: If a set of texts cannot be trained on.
        AttentionError: If the base cannot attend as the recipe says.

    Example:
        >>> from st_llmpool.training import AdaptRecipe
        >>> recipe = AdaptRecipe.from_yaml("recipe.yaml")  # doctest: +SKIP
        >>> build_embedder(adapt(recipe).model_dir, pooling="mean")  # doctest: +SKIP
    """
    folder = Path(recipe.output_dir)
    check_output(recipe, folder, resume=resume)
    if (folder / "model").is_dir():
        logger.info("%s is finished; nothing to train.", folder)
        return AdaptResult(folder / "model", read_json_object(folder / "training.json"))
    with locked_run(folder) as raise_refusal:
        base, arguments = check_adapt(recipe), _training_arguments(recipe, folder)
        raise_refusal()
        run = _Adaptation(recipe, base, load_tokenizer(recipe, base), arguments)
        return AdaptResult(folder / "model", run.train(resume=resume))


def check_adapt(recipe: AdaptRecipe) -> str:
    """Validate an adaptation before any weights are loaded.

    Returns:
        The base's Hub id or folder.
    """
    base = resolve_base(recipe.base)
    if is_saved_embedder(base, revision=recipe.revision):
        raise ConfigurationError(
            f"base={base!r} is a saved embedder, whose pooling and prompts an adaptation would lose. Adapt the "
            f"language model that it was built from, and train the embedder on the result."
        )
    check_machine(recipe.training, adapter=recipe.tune == "lora")
    _training_arguments(recipe, Path(recipe.output_dir))
    if recipe.tune == "lora":
        trusted, revision = recipe.trust_remote_code, recipe.revision
        check_adapter(ModelSettings(base, lora=recipe.lora, trust_remote_code=trusted, revision=revision), base)
    return base


@dataclass
class _Adaptation:
    """One run: what it starts from, and its trainer's arguments."""

    recipe: AdaptRecipe
    base: str
    tokenizer: PreTrainedTokenizerBase
    arguments: TrainingArguments

    def train(self, *, resume: bool) -> dict[str, Any]:
        """Train, merge, measure and save; return the report on the first process."""
        recipe, folder = self.recipe, Path(self.recipe.output_dir)
        with self.arguments.main_process_first(desc="loading data"):
            train, held_out = _load(recipe)
        set_seed(recipe.seed)
        model = load_language_model(recipe, self.base, dtype=self._dtype)
        use_cache = model.config.use_cache
        token = choose_mask_token(self.tokenizer, recipe.masking.token)
        vocabulary = Vocabulary(use_mask_token(self.tokenizer, model, token), ordinary_tokens(self.tokenizer))
        pieces, examples = self._tokenize(train, held_out, vocabulary)
        apply_attention(model, recipe)
        if recipe.training.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        trainer = self._trainer(_with_adapter(model, recipe), pieces, examples, vocabulary)
        check = partial(self._check_reload, trainer.model, examples[0]["input_ids"][None])
        train_in_folder(folder, recipe, trainer, check, resume=resume)
        model.config.use_cache = use_cache  # the trainer turns it off
        _release(trainer)
        report = self._finish(trainer, pieces, examples) if self.arguments.process_index == 0 else {}
        trainer.accelerator.wait_for_everyone()
        return report

    @property
    def _dtype(self) -> torch.dtype:
        """Float32 for weights that train: small steps round to nothing on 16 bits; autocast computes in them."""
        if self.recipe.tune == "full":
            return torch.float32
        return dtype_of(self.arguments)

    def _tokenize(self, train: Dataset, held_out: Dataset, vocabulary: Vocabulary) -> tuple[Dataset, Sequence[Example]]:
        """Return pieces to train on, and masked examples to measure on."""
        length = self.recipe.max_seq_length
        pieces = tokenize(train, self.tokenizer, max_length=length, long_texts=self.recipe.long_texts)
        others = tokenize(held_out, self.tokenizer, max_length=length, long_texts="truncate")
        for name, found in (("training", pieces), ("held-out", others)):
            if len(found) == 0:
                raise DataError(
                    f"The {name} texts are of one token each: there is nothing before it to predict it from."
                )
        masking = MaskingSettings(mlm_probability=self.recipe.masking.mlm_probability)
        examples = MaskedTexts(others, masking, vocabulary, length=len(others), seed=self.recipe.seed)
        return pieces, [examples[place] for place in range(len(examples))]

    def _trainer(
        self, model: Any, pieces: Dataset, examples: Sequence[Example], vocabulary: Vocabulary
    ) -> MaskedTokenTrainer:
        training = self.recipe.training
        per_step = training.batch_size * training.gradient_accumulation_steps
        steps = training.max_steps or max(1, int(training.num_train_epochs * len(pieces) / per_step))
        self.arguments.max_steps = steps
        check_optimization(self.arguments, steps)
        length, seed = steps * per_step, self.recipe.seed
        return MaskedTokenTrainer(
            model=model,
            args=self.arguments,
            data_collator=partial(collate, padding_side=self.tokenizer.padding_side),
            train_dataset=MaskedTexts(pieces, self.recipe.masking, vocabulary, length=length, seed=seed),
            eval_dataset=examples,
        )

    def _check_reload(self, model: Any, tokens: torch.Tensor) -> None:
        def load(folder: Path) -> PreTrainedModel:
            here = dataclasses.replace(self.recipe, revision=None)
            found = load_language_model(here, str(folder), dtype=torch.float32)
            set_attention(found, self.recipe.attention)
            return found

        def save(trained: Any, folder: Path) -> None:
            self._save(self._merged(trained), folder)

        check_language_model(model, save, load, tokens, Path(self.recipe.output_dir))

    def _merged(self, model: Any) -> Any:
        """Return the base with what was trained in it."""
        if self.recipe.tune == "full":
            return model
        return model.float().merge_and_unload()  # in float32, or the sum would be rounded to the base's 16 bits

    def _save(self, model: Any, folder: Path) -> None:
        set_attention(model, "causal")  # as bases come: the flag in config.json alone is half of the setting
        model.to(stored_dtype(self.recipe, self.base))
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _untouched(self) -> PreTrainedModel:
        """Return the base as it was, with the mask token."""
        model = load_language_model(self.recipe, self.base, dtype=self._dtype)
        use_mask_token(load_tokenizer(self.recipe, self.base), model, str(self.tokenizer.mask_token))
        return model

    def _finish(self, trainer: MaskedTokenTrainer, pieces: Dataset, examples: Sequence[Example]) -> dict[str, Any]:
        """Merge, measure and save; with one model in memory at a time, except to merge."""
        recipe, folder, model = self.recipe, Path(self.recipe.output_dir), cast("Any", trainer.model)
        device = model.device
        trained = count_weights(parameter for parameter in model.parameters() if parameter.requires_grad)
        model = self._merged(model)
        measure = partial(masked_score, examples=examples, batch_size=recipe.evaluation.batch_size)
        alphas = merge_weights(recipe.merge)
        weights = {} if alphas == [1.0] else self._untouched().state_dict()
        alpha, scores = merge_with_base(model, weights, alphas, lambda: measure(model).accuracy)
        adapted = measure(model)
        facts = {
            "licenses": {item.label: item.license for item in recipe.texts},
            "pieces": len(pieces),
            "parameters": count_weights(model.parameters()),
            "trained_parameters": trained,
            "mask_token": self.tokenizer.mask_token,
            "masked_tokens": adapted.tokens,
            "merge": alpha,
            "merge_scores": [[weight, score] for weight, score in scores.items()],
        }
        with atomic_folder(folder / "model") as target:
            self._save(model, target)
            model.to("meta")  # frees its weights, whoever holds it

            untouched: Any = self._untouched()
            untouched.to(device)
            causal = measure(untouched, unmasked=True)
            set_attention(untouched, recipe.attention)
            facts["masked_accuracy"] = {
                "adapted": adapted.accuracy,
                "base": measure(untouched).accuracy,
                "causal": causal.accuracy,
                "no_context": constant_accuracy(examples, most_frequent_token(pieces)),
            }
            return write_report(folder, trainer, facts)


def _load(recipe: AdaptRecipe) -> tuple[Dataset, Dataset]:
    """Return the texts to train on and those to measure on."""
    train = concatenate_datasets([load_texts(settings) for settings in recipe.texts])
    train = train.add_column("row", list(range(len(train))))
    limit = recipe.evaluation.limit
    if recipe.evaluation.texts:
        held_out = concatenate_datasets([load_texts(settings) for settings in recipe.evaluation.texts])
        return train, held_out.select(range(min(limit, len(held_out))))
    if len(train) < 2:
        raise DataError(
            "texts hold one text, which cannot be trained on and measured on. Give more, or evaluation.texts."
        )
    count = min(limit, max(1, int(_HELD_OUT_FRACTION * len(train))))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    return train.select(sorted(order[count:])), train.select(sorted(order[:count]))


def _training_arguments(recipe: AdaptRecipe, folder: Path) -> TrainingArguments:
    training, evaluation = recipe.training, recipe.evaluation
    model = ModelSettings(recipe.base, trust_remote_code=recipe.trust_remote_code, revision=recipe.revision)
    arguments = trainer_arguments(
        TrainingArguments,
        **shared_arguments(
            training, folder, learning_rate=recipe.learning_rate, seed=recipe.seed, width=base_width(model)
        ),
        per_device_eval_batch_size=evaluation.batch_size,
        eval_strategy="no" if evaluation.eval_steps is None else "steps",
        eval_steps=evaluation.eval_steps,
        save_steps=training.save_steps,
        remove_unused_columns=False,
    )
    check_split(training.batch_size, arguments.world_size)
    if training.max_steps is not None:
        check_optimization(arguments, training.max_steps)
    return arguments


def _with_adapter(model: PreTrainedModel, recipe: AdaptRecipe) -> Any:
    if recipe.tune == "full":
        return model
    from peft import TaskType, get_peft_model

    config = lora_config(recipe.lora)
    config.task_type = TaskType.CAUSAL_LM  # of a wrapper with a head
    adapted = get_peft_model(model, config)
    set_attention(adapted, recipe.attention)  # new submodules may carry an is_causal of their own
    return adapted


def _release(trainer: MaskedTokenTrainer) -> None:
    """Free what only training needs: optimizer, schedule, loader, and the model's wrapper."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model_wrapped = trainer.model  # type: ignore[assignment]
    handler = trainer.callback_handler
    handler.optimizer = handler.lr_scheduler = handler.train_dataloader = None
    trainer.accelerator.free_memory()
