"""Finds the largest batch that a recipe can train with in a given memory, by training with it."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.table import Table

from ..data.training_data import load_pairs
from ..modules.errors import ConfigurationError
from ..training.recipe import DEFAULT_LENGTH, Recipe
from .batch_trial import DOES_NOT_FIT, REFUSED, STEPS

GIB = 2**30
#: Seconds between two looks at a process's memory.
_INTERVAL = 0.05


@dataclass(frozen=True)
class BatchTrial:
    """Two training steps with one batch size.

    Attributes:
        batch_size: Queries to a step.
        fits: Whether they ran within the memory.
        memory: The most memory that they took, in GiB; None if they did not fit.
        seconds: Of the second step; None if they did not fit.
    """

    batch_size: int
    fits: bool
    memory: float | None = None
    seconds: float | None = None

    def describe(self) -> str:
        """Returns it in words.

        Example:
            >>> BatchTrial(64, fits=True, memory=7.5, seconds=1.0).describe()
            'A batch of 64 takes 7.50 GiB'
        """
        return f"A batch of {self.batch_size} takes {'too much' if self.memory is None else f'{self.memory:.2f} GiB'}"


def free_memory() -> float:
    """Returns the GiB that are free on the GPU, or on this machine if it has none."""
    import torch

    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return free / GIB


def largest_batch(
    recipe: Recipe, memory: float, *, at_most: int = 4096, told: Callable[[BatchTrial], None] = lambda trial: None
) -> list[BatchTrial]:
    """Tries batch sizes, each in a process of its own that trains two steps on texts of the full length.

    From ``training.batch_size`` on it doubles or halves, then bisects until the largest that fits is known to an
    eighth. What is tried is the recipe's own training (model, adapter, loss, precision, optimizer) on one process; its
    stages and evaluation are left out, and nothing is kept.

    Args:
        recipe: What to train.
        memory: GiB that a process may take: of a GPU what torch reserves, else what is resident, loading included.
        at_most: The largest batch to try.
        told: Called after each trial.

    Returns:
        The trials, by batch size; the last one that fits is the answer.

    Raises:
        ConfigurationError: If not even the smallest batch fits, or a trial fails for another reason.

    Example:
        >>> trials = largest_batch(Recipe.from_yaml("recipe.yaml"), memory=20)  # doctest: +SKIP
        >>> max(trial.batch_size for trial in trials if trial.fits)  # doctest: +SKIP
        96
    """
    columns = max(len(load_pairs(item, recipe.loss.num_negatives).column_names) for item in recipe.data)
    instruction = next((item.instruction for item in recipe.data if item.instruction), None)
    smallest = 2  # below it a query has no negatives
    fits, too_large, trials = 0, at_most + 1, []
    size = min(max(recipe.training.batch_size, smallest), at_most)
    while too_large - fits > max(1, fits // 8):
        with tempfile.TemporaryDirectory() as folder:
            trial = _try(_recipe_of(recipe, size, columns, instruction, Path(folder)), Path(folder), memory)
        trials.append(trial)
        told(trial)
        if trial.fits:
            fits = size
        elif size == smallest:
            raise ConfigurationError(
                f"Not even a batch of {size} fits in {memory:g} GiB. Set loss.mini_batch_size=1, "
                f"training.gradient_checkpointing=true, model.quantization=nf4 or a shorter model.max_seq_length."
            )
        else:
            too_large = size
        size = min(2 * fits, at_most) if too_large > at_most else max((fits + too_large) // 2, smallest)
    return sorted(trials, key=lambda trial: trial.batch_size)


def batch_table(trials: list[BatchTrial], memory: float) -> Table:
    """Returns the trials for a terminal.

    Example:
        >>> batch_table([BatchTrial(64, True, 7.5, 1.0), BatchTrial(128, False)], memory=8).row_count
        2
    """
    table = Table(title=f"Training steps within {memory:g} GiB", title_justify="left")
    for heading in ("batch", "memory, GiB", "seconds a step", "queries a second"):
        table.add_column(heading, justify="right")
    for trial in trials:
        if trial.memory is None or trial.seconds is None:
            table.add_row(f"{trial.batch_size:,}", "too much", "", "")
        else:
            speed = f"{trial.batch_size / trial.seconds:.1f}"
            table.add_row(f"{trial.batch_size:,}", f"{trial.memory:.2f}", f"{trial.seconds:.2f}", speed)
    return table


def _recipe_of(recipe: Recipe, size: int, columns: int, instruction: str | None, folder: Path) -> Recipe:
    """Returns the recipe with this batch, on rows of texts that are longer than the model reads."""
    rng = random.Random(0)
    names = ["query", "positive", *(f"negative_{number}" for number in range(1, columns - 1))]

    def text() -> str:  # one word is a token at least
        return " ".join(str(rng.randrange(10**6)) for _ in range(recipe.model.max_seq_length or DEFAULT_LENGTH))

    source = folder / "rows.jsonl"
    source.write_text("\n".join(json.dumps({name: text() for name in names}) for _ in range(STEPS * size)))
    negatives = {"negative": names[2:]} if columns > 2 else {}
    values = recipe.to_dict()
    values |= {
        "output_dir": str(folder / "run"),
        "stages": [],
        "evaluation": {},
        "data": [{"source": str(source), "columns": negatives, "instruction": instruction}],
    }
    values["training"] |= {"steps": STEPS, "batch_size": size, "save_steps": STEPS}
    return Recipe.from_dict(values)


def _try(recipe: Recipe, folder: Path, memory: float) -> BatchTrial:
    size, limit = recipe.training.batch_size, int(memory * GIB)
    recipe.to_yaml(folder / "recipe.yaml")
    command = [sys.executable, "-m", f"{__package__}.batch_trial", str(folder / "recipe.yaml"), str(limit)]
    with open(folder / "log", "w+") as log, open(folder / "answer", "w+") as answer:
        quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        process = psutil.Popen(command, stdout=answer, stderr=log, env=os.environ | quiet)
        try:
            returned = _wait(process, limit)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if returned in (DOES_NOT_FIT, -signal.SIGKILL):  # by which a system saves its last memory
            return BatchTrial(size, fits=False)
        log.seek(0)
        answer.seek(0)
        if returned not in (0, REFUSED):
            raise ConfigurationError(f"A batch of {size} cannot be trained with: {log.read().strip()[-2000:]}")
        found = json.loads(answer.read().splitlines()[-1])
        if returned == REFUSED:
            raise ConfigurationError(f"A batch of {size} cannot be trained with: {found['refused']}")
    if found["memory"] > limit:  # between two looks at it
        return BatchTrial(size, fits=False)
    return BatchTrial(size, True, found["memory"] / GIB, found["seconds"])


def _wait(process: psutil.Popen, limit: int) -> int:
    """Waits for a process to end, and on a CPU ends it when it takes too much."""
    import torch

    while True:
        try:
            return int(process.wait(_INTERVAL))
        except psutil.TimeoutExpired:
            if not torch.cuda.is_available() and process.memory_info().rss > limit:
                return DOES_NOT_FIT
