"""The settings of an adaptation: masked next-token prediction on a base, before it becomes an embedder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from ...data.training_data import TextSettings
from ...modules.errors import ConfigurationError
from ...utils.settings import PositiveInt, Range, Settings, check_filled
from ..optimizers import OPTIMIZERS
from ..recipe import MaskingSettings, SavedRecipe, Seed, TrainingSettings, check_merge


@dataclass
class AdaptEvaluationSettings(Settings):
    """On what the masked accuracy is measured.

    Attributes:
        texts: Held-out sets; where none is given, `limit` texts of the training sets are held out.
        limit: Most texts to measure on.
        eval_steps: Steps between two measurements while training; None measures at the end only.
        batch_size: Batch size.
    """

    where = "evaluation"
    RENAMED: ClassVar = {"steps": "eval_steps"}

    texts: list[TextSettings] = field(default_factory=list)
    limit: PositiveInt = 500
    eval_steps: PositiveInt | None = None
    batch_size: PositiveInt = 64


@dataclass
class AdaptRecipe(SavedRecipe):
    """An adaptation run.

    Attributes:
        output_dir: Folder for the run; the adapted base ends in ``model`` in it.
        base: Hub id or folder of a causal language model, or ``builtin`` for the small one in the package.
        texts: The training texts.
        attention: ``bidirectional`` or ``causal``.
        masking: Which tokens are masked, and by what.
        tune: What trains: a ``lora`` adapter, which is merged at the end, or the ``full`` model.
        lora: ``paper`` (r 16, alpha 32, dropout 0.1, all linear layers) or fields of a ``peft.LoraConfig``.
        merge: Weight of the trained model in the result, 0 to 1, the rest being the base's. Of a list, the one with
            the best masked accuracy is used. None keeps the trained weights.
        max_seq_length: Longest text in tokens.
        long_texts: ``cut`` makes several texts of a longer one; ``truncate`` leaves the rest out.
        training: Steps, learning rate, precision, logging. What concerns pairs (``pooling_learning_rate``,
            ``batch_sampler``) does not apply here.
        evaluation: On what the masked accuracy is measured.
        allow_partial: Accept layers that cannot be made bidirectional.
        attn_implementation: As in transformers.
        trust_remote_code: Allow the base to run code of its own.
        revision: Branch, tag or commit of the base.
        seed: Of order, masks and dropout.

    Raises:
        ConfigurationError: From the constructor, if a number is out of range or no text is named.

    Example:
        >>> AdaptRecipe("runs/adapted", "builtin", [TextSettings("texts.txt")]).masking.mlm_probability
        0.2
    """

    output_dir: str
    base: str
    texts: list[TextSettings]
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    tune: Literal["lora", "full"] = "lora"
    lora: str | dict[str, Any] = "paper"
    merge: float | list[float] | None = None
    max_seq_length: Annotated[int, Range(2)] = 512  # of two tokens one is predicted, from the other
    long_texts: Literal["cut", "truncate"] = "cut"
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: AdaptEvaluationSettings = field(default_factory=AdaptEvaluationSettings)
    allow_partial: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_filled(self, "output_dir", "base")
        if not self.texts:
            raise ConfigurationError("texts is empty: name at least one set, such as texts: [{source: texts.txt}].")
        check_merge(self.merge)
        super().__post_init__()
        if self.training.optim in OPTIMIZERS:
            raise ConfigurationError(
                f"training.optim={self.training.optim} is for contrastive training only; use adamw_torch, for example."
            )
        if self.training.sparse_tuning is not None:
            raise ConfigurationError(
                "training.sparse_tuning is for contrastive training only; leave it out of an adaptation."
            )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the adapter or the full model."""
        return self.training.rate_of(self.tune)
