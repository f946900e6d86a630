"""Importance-aware sparse tuning: a few layers' adapters train at a time, drawn by how much they matter to the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..modules.attention import decoder_layers
from ..modules.errors import ConfigurationError
from .recipe import SparseTuningSettings


class SparseTuning(TrainerCallback, ExportableState):
    """Trains the adapters of n layers at a time, drawn by importance (IST, Yao et al. 2024, arXiv 2410.11772).

    Each layer l has an importance I_l, at first 0. Every `interval` steps

    * K sets S_k of half the layers are drawn without replacement, each layer by σ(−I_l); with the adapters in S_k
      weakened to `suppression` of their effect and no dropout, the step's batch has the loss L_k, and its reward is
      r_k = exp(−L_k). A set that can be weakened at little loss has a high one, and its layers lose importance:
      I_l ← I_l − μ σ(I_l) (1 − σ(I_l)) Σ_{k: l ∈ S_k} (r_k − mean r), with the rate μ;
    * the n layers that train until then are drawn without replacement, each by σ(I_l). The others' adapters get no
      gradient and keep their values, and their optimizer state.

    The formulas are those of the authors' published code, with the sign of I turned round; there the layers are redrawn
    at each step, and measured on a separate batch. Pooling, and adapters outside the layers, always train.

    What is drawn depends on seed, step and importance; the loss is the mean over all processes, so they all draw the
    same. Importance is in the checkpoints.

    Args:
        settings: How many layers, how often, how measured.
        model: The model with its adapter.
        loss: What is trained on, called with features and labels.
        seed: Of what is drawn.
    """

    def __init__(
        self, settings: SparseTuningSettings, model: SentenceTransformer, loss: nn.Module, *, seed: int = 0
    ) -> None:
        self.settings = settings
        self.seed = seed
        self._model = model
        self._loss = loss
        layers = decoder_layers(model.transformers_model)
        self._layers = [layer for layer in layers if any(weight.requires_grad for weight in layer.parameters())]
        self._weights = [[weight for weight in layer.parameters() if weight.requires_grad] for layer in self._layers]
        check_number_of_layers(settings, len(self._weights))
        self.importance = np.zeros(len(self._weights))
        self._batch: tuple[Any, ...] | None = None
        self._is_due = False
        loss.register_forward_pre_hook(self._keep_batch)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the importance of an earlier part of the run, and its layers."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        if saved is not None:
            self.importance = np.array(saved["attributes"]["importance"])
        self._switch(state.global_step - state.global_step % self.settings.interval)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the layers that train from now on, if it is time."""
        if state.global_step % self.settings.interval == 0:
            self._switch(state.global_step)
        self._is_due = (state.global_step + 1) % self.settings.interval == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure importance, if it is time; before the checkpoint of this step is written."""
        if self._batch is not None:
            self._measure(state.global_step)
            self._batch = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave all adapters trainable, as they were."""
        for weight in (weight for weights in self._weights for weight in weights):
            weight.requires_grad_(True)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"importance": self.importance.tolist()}}

    def draw(self, step: int) -> list[int]:
        """Return the layers that train from `step` on, as places among those with an adapter."""
        return _draw(np.random.default_rng([self.seed, step, 0]), self.importance, self.settings.layers)

    def _switch(self, step: int) -> None:
        chosen = self.draw(step)
        for place, weights in enumerate(self._weights):
            for weight in weights:
                weight.requires_grad_(place in chosen)
                weight.grad = None

    def _keep_batch(self, loss: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._is_due:
            features, *others = inputs
            self._batch = ([dict(column) for column in features], *others)  # a forward may add to them
            self._is_due = False

    def _measure(self, step: int) -> None:
        half = max(len(self._weights) // 2, 1)
        generator = np.random.default_rng([self.seed, step, 1])
        sets = [_draw(generator, -self.importance, half) for _ in range(self.settings.trials)]
        self._model.eval()
        losses = torch.stack([self._loss_without(weakened) for weakened in sets])
        self._model.train()
        rewards = [math.exp(-loss) for loss in reduce(losses, "mean").tolist()]
        self.importance = updated_importance(self.importance, sets, rewards, self.settings.importance_rate)

    def _loss_without(self, weakened: Sequence[int]) -> torch.Tensor:
        from peft.helpers import rescale_adapter_scale

        assert self._batch is not None
        layers = nn.ModuleList(self._layers[place] for place in weakened)
        with torch.no_grad(), rescale_adapter_scale(layers, self.settings.suppression):
            return self._loss([*map(dict, self._batch[0])], *self._batch[1:])


def updated_importance(
    importance: np.ndarray, sets: Sequence[Sequence[int]], rewards: Sequence[float], rate: float
) -> np.ndarray:
    """Return the importance (L,) after trials in which `sets` of layers were weakened; see :class:`SparseTuning`."""
    probability = _sigmoid(importance)
    advantage = np.zeros_like(importance)
    for weakened, reward in zip(sets, rewards, strict=True):
        advantage[list(weakened)] += reward - np.mean(rewards)
    return importance - rate * probability * (1 - probability) * advantage


def check_number_of_layers(settings: SparseTuningSettings, found: int) -> None:
    """Refuse to choose more layers than the `found` ones that have a trainable adapter."""
    if settings.layers > found:
        raise ConfigurationError(
            f"training.sparse_tuning.layers={settings.layers} is more than the {found} layers whose adapter can train."
        )


def _draw(generator: np.random.Generator, scores: np.ndarray, count: int) -> list[int]:
    weights = _sigmoid(scores)
    chosen = generator.choice(len(scores), size=count, replace=False, p=weights / weights.sum())
    return sorted(chosen.tolist())


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -values))
