"""A suite as an evaluator for use during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator

from ..fast_inference import optimized_inference
from ..modules.errors import ConfigurationError
from ..utils.random_state import preserve_rng_state
from .encoder import FiniteEncoder
from .run import run_tasks
from .tasks import load_suite


class SuiteEvaluator(BaseEvaluator):
    """Score a model on a local suite at every evaluation step, without changing the training.

    The random state is preserved, so data order and dropout are those of a training without evaluation. Every call
    scores the same rows; nothing is cached.

    Args:
        suite: A shipped suite or a suite file.
        data_dir: Parent of the suite's data folders.
        tasks: Names of the tasks to run; None for all.
        limit: Largest number of rows, queries or documents per task; None for all.
        batch_size: Batch size.
        name: Prefix of the metrics.

    Raises:
        ConfigurationError: As `load_suite`.
        DataError: As `load_suite`.

    Returns on call:
        `{"[name_]<task>_<metric>": score, ..., "[name_]mean": mean of the scores}`; the mean is the primary metric.

    Example:
        >>> evaluator = SuiteEvaluator("squad", "data", limit=200)  # doctest: +SKIP
        >>> SentenceTransformerTrainer(model, args, train, evaluator=evaluator, loss=loss)  # doctest: +SKIP
    """

    def __init__(
        self,
        suite: str | Path = "builtin",
        data_dir: str | Path | None = None,
        *,
        tasks: Sequence[str] | None = None,
        limit: int | None = 200,
        batch_size: int = 32,
        name: str = "",
    ) -> None:
        super().__init__()
        self.tasks = load_suite(suite, data_dir, tasks=tasks, limit=limit)
        if not self.tasks:
            raise ConfigurationError("tasks is empty; leave it out to run all tasks.")
        self.suite = str(suite)
        self.limit = limit
        self.batch_size = batch_size
        self.name = name
        self.primary_metric = f"{name}_mean" if name else "mean"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return the scores, and record them in the model card.

        Raises:
            InputError: If the model gives an embedding that is not finite.
        """
        with preserve_rng_state(), optimized_inference(model):
            tasks = [type(task)() for task in self.tasks]  # fresh ones: a task has its own random generator
            rows = run_tasks(FiniteEncoder(model, tasks), tasks, None, self.batch_size, show_progress=False)
        scores = {f"{row.task}_{row.metric}": row.score for row in rows}
        scores["mean"] = sum(row.score for row in rows) / len(rows)
        metrics = self.prefix_name_to_metrics(scores, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def get_config_dict(self) -> dict[str, object]:
        """Return the evaluator's settings for the model card."""
        return {"suite": self.suite, "limit": self.limit}
