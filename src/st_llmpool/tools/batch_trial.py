"""Runs two training steps of a recipe and says what they took; a process of its own, which may run out of memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback

from ..modules.errors import StLlmpoolError
from ..training.recipe import Recipe
from ..training.run import train

#: What the process returns if the steps do not fit, and if the recipe is refused.
DOES_NOT_FIT, REFUSED = 75, 76
# What errors say that are no MemoryError: torch's on a CPU, cuBLAS's, and CUDA's own.
_RAN_OUT = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
#: The optimizer's state is there from the first step's end on, so the second is the one that counts.
STEPS = 2


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


def main(recipe_file: str, memory: int) -> int:
    """Runs the steps within `memory` bytes of a GPU; a CPU's memory is watched from outside.

    Writes a JSON object with the peak in bytes (on a GPU what torch reserved, on a CPU what was resident) and the
    seconds of the last step; or why the recipe is refused.
    """
    stopwatch = _Stopwatch()
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / torch.cuda.mem_get_info()[1]))
    try:
        train(Recipe.from_yaml(recipe_file), callbacks=[stopwatch])
    except _Enough:
        sys.stdout.write(json.dumps({"memory": _peak(), "seconds": stopwatch.seconds}) + "\n")
        return 0
    except (torch.OutOfMemoryError, MemoryError):
        return DOES_NOT_FIT
    except StLlmpoolError as error:
        sys.stdout.write(json.dumps({"refused": str(error)}) + "\n")
        return REFUSED
    except RuntimeError as error:
        if any(words in str(error) for words in _RAN_OUT):
            return DOES_NOT_FIT
        raise
    raise RuntimeError(f"The run ended before step {STEPS}.")


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
