"""Find the largest batch that a recipe can train with in a given memory, by training with it."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from transformers import TrainerCallback

from ..data.training_data import load_pairs
from ..modules.errors import ConfigurationError, StLlmpoolError
from ..training.recipe import DEFAULT_LENGTH, Recipe
from ..training.run import train

# What errors say that are no MemoryError: torch's on a CPU, cuBLAS's, and CUDA's own.
_RAN_OUT = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
#: The optimizer's state is there from the first step's end on, so the second is the one that counts.
STEPS = 2
GIB = 2**30
#: Seconds between two readings of a process's memory.
_INTERVAL = 0.05


@dataclass(frozen=True)
class BatchTrial:
    """Two training steps with one batch size.

    Attributes:
        batch_size: Queries per step.
        fits: Whether they ran within the memory.
        memory: Peak memory in GiB; None if they did not fit.
        seconds: Of the second step; None if they did not fit.
    """

    batch_size: int
    fits: bool
    memory: float | None = None
    seconds: float | None = None

    def describe(self) -> str:
        """Return it in words."""
        return f"A batch of {self.batch_size} takes {'too much' if self.memory is None else f'{self.memory:.2f} GiB'}"


def free_memory() -> float:
    """Return the GiB that are free on the GPU, or on this machine if it has none."""
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return free / GIB


def largest_batch(
    recipe: Recipe, memory: float, *, at_most: int = 4096, on_trial: Callable[[BatchTrial], None] = lambda trial: None
) -> list[BatchTrial]:
    """Try batch sizes, each in a process of its own that trains two steps on texts of the full length.

    From ``training.batch_size`` on it doubles or halves, then bisects until the largest that fits is known to an
    eighth. What is tried is the recipe's own training (model, adapter, loss, precision, optimizer) on one process; its
    stages and evaluation are left out, and nothing is kept.

    Args:
        recipe: What to train.
        memory: Limit in GiB: of what torch reserves on a GPU, else of resident memory, loading included.
        at_most: The largest batch to try.
        on_trial: Called after each trial.

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
        on_trial(trial)
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
    """Return the trials for a terminal.

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
    """Return the recipe with this batch, on rows of texts that are longer than the model reads."""
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
    values["training"] |= {"max_steps": STEPS, "batch_size": size, "save_steps": STEPS}
    return Recipe.from_dict(values)


def _try(recipe: Recipe, folder: Path, memory: float) -> BatchTrial:
    size, limit = recipe.training.batch_size, int(memory * GIB)
    recipe.to_yaml(folder / "recipe.yaml")
    command = [sys.executable, "-m", __name__, str(folder / "recipe.yaml"), str(limit)]
    quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with open(folder / "log", "w") as log, open(folder / "answer", "w") as answer:
        process, returned = psutil.Popen(command, stdout=answer, stderr=log, env=os.environ | quiet), None
        try:
            while returned is None:
                with suppress(psutil.TimeoutExpired):
                    returned = process.wait(_INTERVAL)
                if returned is None and not torch.cuda.is_available() and process.memory_info().rss > limit:
                    break
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if returned in (None, -signal.SIGKILL):  # by which a system saves its last memory
        return BatchTrial(size, fits=False)
    lines, reason = (folder / "answer").read_text().splitlines(), (folder / "log").read_text().strip()[-2000:]
    found: dict[str, Any] = json.loads(lines[-1]) if returned == 0 else {"refused": reason}
    if "refused" in found:
        raise ConfigurationError(f"A batch of {size} cannot be trained with: {found['refused']}")
    if not found or found["memory"] > limit:  # between two looks at it
        return BatchTrial(size, fits=False)
    return BatchTrial(size, True, found["memory"] / GIB, found["seconds"])


class _Enough(Exception):
    """Ends the run before anything is saved."""


class _Stopwatch(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.started
        if state.global_step == STEPS:
            raise _Enough


def run_trial(recipe_file: str, memory: int) -> dict[str, Any]:
    """Run one trial in this process, which may run out of memory; a CPU's memory is watched from outside.

    Args:
        recipe_file: The recipe.
        memory: Limit in bytes on a GPU.

    Returns:
        The peak ``memory`` in bytes (reserved by torch on a GPU, resident on a CPU) and the ``seconds`` of the last
        step, or the reason why the recipe is ``refused``; nothing if it does not fit.
    """
    stopwatch = _Stopwatch()
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / torch.cuda.mem_get_info()[1]))
    try:
        train(Recipe.from_yaml(recipe_file), callbacks=[stopwatch])
    except _Enough:
        return {"memory": _peak(), "seconds": stopwatch.seconds}
    except (torch.OutOfMemoryError, MemoryError):
        return {}
    except StLlmpoolError as error:
        return {"refused": str(error)}
    except RuntimeError as error:
        if any(words in str(error) for words in _RAN_OUT):
            return {}
        raise
    raise RuntimeError(f"The run ended before step {STEPS}.")


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_trial(sys.argv[1], int(sys.argv[2]))) + "\n")
